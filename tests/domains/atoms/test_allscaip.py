"""AllScAIP: symmetries, derivatives, inputs and limits; parity is held elsewhere."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from allscaip_small import PLAIN, SIZES, batch_of, frames, small_allscaip
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

import zoo
from domains.atoms.graph.separations import separations
from domains.atoms.models.allscaip import AllScAIP
from domains.atoms.structures import Structures
from zoo.attention import Groups, backend, capture
from zoo.errors import ConfigError, DataError

OPTIONS: list[dict[str, Any]] = [
    {},
    PLAIN,
    {"forces": "direct"},
    {"stress": True, "use_node_path": False},
    {"normalization": "layernorm", "activation": "smelu", "energy_reduce": "mean", "use_envelope": False},
    {"normalization": "skip", "ffn_multiplier": 0, "output_multiplier": 0, "knn_soft": False},
    {"knn_low_mem": False, "use_residual_scaling": False, "distance_function": "sigmoid"},
]


def energy(model: AllScAIP, atoms: Atoms) -> float:
    with torch.no_grad():
        return float(model(batch_of(atoms, double=True))["energy"])


# ---- what may share a batch --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")
def test_a_batch_is_its_members_one_by_one(options: dict[str, Any]) -> None:
    model, members = small_allscaip(double=True, **options), frames()
    together = model(batch_of(*members, double=True))
    alone = [model(batch_of(frame, double=True)) for frame in members]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([one[name] for one in alone]), equal_nan=True)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "default")
def test_every_parameter_learns_through_energy_and_forces(options: dict[str, Any]) -> None:
    model = small_allscaip(**options).train()
    out = model(batch_of(*frames()))
    (out["energy"].square().sum() + out["forces"].square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


def test_room_for_all_neighbours_changes_nothing() -> None:
    batch = batch_of(*frames(), double=True)
    free, roomy = (small_allscaip(double=True, max_neighbours=room) for room in (None, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(roomy(batch), free(batch))


def test_neighbours_without_room_are_dropped_with_a_warning() -> None:
    batch = batch_of(bulk("Cu", cubic=True))
    narrow, free = small_allscaip(max_neighbours=6), small_allscaip()
    with pytest.warns(UserWarning, match=r"of \d+ neighbours do not fit into max_neighbours=6"):
        few = narrow(batch)
    assert not torch.allclose(few["energy"], free(batch)["energy"])


# ---- symmetries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_order_of_atoms_does_not_matter(index: int) -> None:
    model, frame = small_allscaip(double=True), frames()[index]
    order = np.random.default_rng(1).permutation(len(frame))
    there, back = (model(batch_of(atoms, double=True)) for atoms in (frame, frame[order]))
    torch.testing.assert_close(back["energy"], there["energy"])
    torch.testing.assert_close(back["forces"], there["forces"][torch.from_numpy(order)])


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_shift_of_everything_does_not_matter(index: int) -> None:
    model, frame = small_allscaip(double=True), frames()[index]
    moved = frame.copy()
    moved.positions += [0.7, -1.3, 5.1]
    there, back = (model(batch_of(atoms, double=True)) for atoms in (frame, moved))
    torch.testing.assert_close(back, there)


def test_a_turn_does_matter() -> None:
    """The official model is not invariant; what is measured must not be zero."""
    model, frame = small_allscaip(double=True), molecule("CH3OH")
    turned = frame.copy()
    turned.rotate(70, (1, 2, 3))
    assert abs(energy(model, turned) - energy(model, frame)) > 1e-3 * abs(energy(model, frame))


def test_without_radial_mask_a_crystal_is_what_its_supercell_is() -> None:
    """Copies of an atom share its weight among all atoms. Distances to nearest images do change."""
    model, cell = small_allscaip(double=True, **PLAIN), frames()[1]
    once, twice = (model(batch_of(atoms, double=True)) for atoms in (cell, cell.repeat((2, 1, 1))))
    torch.testing.assert_close(twice["energy"], 2 * once["energy"])
    torch.testing.assert_close(twice["forces"], once["forces"].repeat(2, 1))


def test_two_molecules_far_apart_add_up_only_without_attention_among_all_atoms() -> None:
    first, second = molecule("CH3OH"), molecule("NH3")
    apart = second.copy()
    apart.translate([60.0, 0, 0])
    both = first + apart
    gaps = []
    for node_path in (True, False):
        model = small_allscaip(double=True, use_node_path=node_path)
        assert model.extensive == (not node_path)
        gaps.append(abs(energy(model, both) - energy(model, first) - energy(model, second)))
    assert gaps[0] > 1e-3
    assert gaps[1] < 1e-9


# ---- derivatives -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 3])
def test_forces_are_the_slope_of_the_energy(index: int) -> None:
    model, frame, step = small_allscaip(double=True), frames()[index], 1e-5
    forces = model(batch_of(frame, double=True))["forces"].detach().numpy()
    for atom, axis in ((0, 0), (1, 2)):
        ends = []
        for sign in (1, -1):
            moved = frame.copy()
            moved.positions[atom, axis] += sign * step
            ends.append(energy(model, moved))
        assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(forces[atom, axis], rel=1e-5, abs=1e-7)


def test_stress_is_the_slope_under_strain() -> None:
    model, frame, step = small_allscaip(double=True, stress=True), frames()[1], 1e-5
    stress = model(batch_of(frame, double=True))["stress"][0].detach().numpy()
    for i, j in ((0, 0), (1, 2)):
        ends = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            strained = frame.copy()
            strained.set_cell(frame.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            ends.append(energy(model, strained))
        slope = (ends[0] - ends[1]) / (2 * step) / frame.get_volume()
        assert slope == pytest.approx(stress[i, j], rel=1e-5, abs=1e-8)


def approach(model: AllScAIP) -> np.ndarray:
    """How much the energy of a molecule changes, in each of 80 steps in which an atom leaves it."""
    path = []
    for distance in np.linspace(3.2, 4.4, 81):
        path.append(molecule("NH3") + Atoms("He", [[0.0, 0, distance]]))
    with torch.no_grad():
        return np.diff(model(batch_of(*path, double=True))["energy"].numpy())


def test_the_energy_is_smooth_where_a_neighbour_goes_but_for_the_bond_order() -> None:
    """Bond order counts a neighbour wholly or not at all, in the official program as here: one step jumps."""
    model = small_allscaip(double=True)
    assert np.abs(np.diff(approach(model))).max() > 0.1
    model.network.embedding.order.weight.data.zero_()
    steps = approach(model)
    assert np.abs(np.diff(steps)).max() < 0.1 * np.abs(steps).max()


def test_training_goes_through_forces_and_stress() -> None:
    """The second derivative by a difference of first ones."""
    model, batch = small_allscaip(double=True, stress=True), batch_of(frames()[1], double=True)
    weight = model.get_parameter("network.blocks.0.source.proj.weight")

    def loss() -> Tensor:
        out = model(batch)
        return out["forces"].square().sum() + 1e3 * out["stress"].square().sum()

    (slope,) = torch.autograd.grad(loss(), weight)
    direction, step = torch.randn_like(weight), 1e-5
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
        ends.append(float(loss().detach()))
        with torch.no_grad():
            weight -= sign * step * direction
    expected = (ends[0] - ends[1]) / (2 * step)
    assert float((slope * direction).sum()) == pytest.approx(expected, rel=1e-5)


# ---- charge and spin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["charge", "spin"])
def test_charge_and_multiplicity_change_the_energy(name: str) -> None:
    model, frame = small_allscaip(double=True), molecule("CH3OH")
    states = []
    for value in (0, 2):
        frame.info[name] = value
        states.append(energy(model, frame))
    assert abs(states[0] - states[1]) > 1e-3


@pytest.mark.parametrize(("charge", "spin"), [(101, 1), (-101, 1), (0, 101), (0, -1)])
def test_a_state_without_embedding_is_refused(charge: int, spin: int) -> None:
    good, bad = molecule("H2O"), molecule("H2O")
    bad.info |= {"charge": charge, "spin": spin}
    message = (
        f"Structure 1 has charge {charge} and multiplicity {spin}.*-100 to 100.*0 \\(not given\\) to 100"
    )
    with pytest.raises(DataError, match=message):
        small_allscaip()(batch_of(good, bad))


# ---- distances of all pairs --------------------------------------------------------------------------------


def test_separations_are_those_of_the_nearest_images() -> None:
    skewed = bulk("Si").repeat((2, 1, 1))
    skewed.pbc = [True, False, True]
    batch = batch_of(skewed, molecule("H2O"), bulk("Cu", cubic=True), double=True)
    groups = Groups(batch.batch)
    found = {
        int(batch.batch[rows[0]]): block[: int((rows >= 0).sum()), : int((rows >= 0).sum())]
        for bucket, blocks in zip(groups.plan, separations(batch, groups, 6.0), strict=True)
        for rows, block in zip(bucket.queries, blocks, strict=True)
    }
    for graph in range(3):
        positions = batch.positions[batch.batch == graph]
        reach = [range(-3, 4) if periodic else [0] for periodic in batch.pbc[graph].tolist()]
        images = torch.cartesian_prod(*(torch.tensor(axis, dtype=torch.float64) for axis in reach))
        shifts = images @ batch.cell[graph]
        vectors = positions[None, :, None] - positions[:, None, None] + shifts
        torch.testing.assert_close(found[graph], vectors.norm(dim=-1).amin(-1))


def test_atoms_that_left_their_cell_have_the_same_separations() -> None:
    """As in dynamics, where positions are not wrapped again."""
    batch = batch_of(bulk("Cu", cubic=True), double=True)
    away = replace(
        batch, positions=batch.positions + torch.tensor([[0.0], [2.0], [-1.0], [3.0]]) * batch.cell[0, 0]
    )
    groups = Groups(batch.batch)
    (here,), (there,) = separations(batch, groups, 4.0), separations(away, groups, 4.0)
    torch.testing.assert_close(there, here)


# ---- running it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reference", "blocked"])
def test_backends_agree(name: str) -> None:
    model, batch = small_allscaip(double=True), batch_of(*frames(), double=True)
    expected = model(batch)
    with backend(name):
        torch.testing.assert_close(model(batch), expected)


def test_capture_sees_every_attention() -> None:
    model, batch = small_allscaip(forces="direct", num_layers=1), batch_of(molecule("CH3OH"))
    with torch.no_grad(), capture(model) as maps:
        model(batch)
    names = {name.partition("#")[0] for name in maps}
    assert names == {f"network.blocks.0.{part}" for part in ("source", "destination", "node_attention")}
    whole = maps["network.blocks.0.node_attention"].weights
    assert whole.shape == (1, 2, 6, 6)
    torch.testing.assert_close(whole.sum(-1), torch.ones(1, 2, 6))


def test_the_network_compiles_whole() -> None:
    model = small_allscaip(forces="direct", num_layers=1, hidden_size=8, frequency_list=[2, 1, 1])
    with torch.no_grad():
        graph = model.graph(batch_of(molecule("CO2")))
        compiled = torch.compile(model.network, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(graph), model.network(graph))


def test_autocast_keeps_geometry_and_sums_wide() -> None:
    model, batch = small_allscaip(stress=True), batch_of(*frames())
    exact = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(batch)
    for name, value in rough.items():
        assert value.dtype == torch.float32
        kept = exact[name].isfinite()
        assert (value - exact[name])[kept].abs().max() < 0.1 * exact[name][kept].abs().max(), name


def test_a_lone_atom_feels_no_force() -> None:
    out = small_allscaip()(batch_of(Atoms("Fe", [[0.0, 0, 0]])))
    assert bool(out["energy"].isfinite().all())
    assert torch.equal(out["forces"], torch.zeros(1, 3))


def test_an_element_without_embedding_is_refused() -> None:
    with pytest.raises(DataError, match=r"Atom 1 \(Fe\) of structure 0.*up to number 20"):
        small_allscaip(max_num_elements=21)(batch_of(Atoms("HFe", [[0.0, 0, 0], [0, 0, 1.6]])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "hidden_size=16 is not divisible by num_heads=3"),
        ({"frequency_list": [3, 2]}, r"frequency_list=\[3, 2\] adds up to 5, but a head has .* = 8"),
        ({"activation": "gleu"}, r"activation is one of .* not 'gleu'\. Did you mean 'gelu'"),
        ({"normalization": "none"}, "normalization is one of rmsnorm, layernorm, skip"),
        ({"energy_reduce": "max"}, "energy_reduce is one of sum, mean"),
        ({"distance_function": "silu"}, "distance_function is one of gaussian, sigmoid, linear_sigmoid"),
        ({"max_neighbours": 0}, "max_neighbours is at least 1"),
        ({"num_layers": 0}, "num_layers is at least 1"),
        ({"forces": "direct", "stress": True}, "stress=True needs forces='conservative'"),
    ],
)
def test_options_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("allscaip_mini", **(SIZES | options))


def test_published_sizes_have_the_published_number_of_parameters() -> None:
    """The specification's counts: 86.0 M conservative, 34.7 M direct."""
    with torch.device("meta"):
        md = zoo.create_model("allscaip_md")
        sm = zoo.create_model("allscaip_sm", forces="direct")
    counts = [sum(p.numel() for p in model.parameters()) for model in (md, sm)]
    assert counts == [85_972_531, 34_658_338]
    assert isinstance(md, AllScAIP)
    assert md.predicts == {"energy", "forces"}


def test_structures_may_be_in_any_precision() -> None:
    batch: Structures = batch_of(*frames(), double=True)
    out = small_allscaip(forces="direct")(batch)
    assert out["energy"].dtype == torch.float32
