"""EScAIP: symmetries, derivatives, options and official files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, make_supercell, molecule
from scipy.spatial.transform import Rotation
from torch import Tensor

import zoo
from domains.atoms.models.escaip import EScAIP
from domains.atoms.structures import Structures
from domains.atoms.weights.escaip import EScAIPOfficial
from zoo.attention import backend, capture
from zoo.errors import CheckpointError, ConfigError, DataError

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "cutoff": 4.0,
    "knn_k": 8,
    "atom_embedding_size": 6,
    "node_direction_embedding_size": 5,
    "node_direction_expansion_size": 4,
    "edge_distance_expansion_size": 12,
    "edge_distance_embedding_size": 10,
    "frequency_list": [4, 2, 2],
    "smooth_orders": False,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"forces": "direct"},
    {"forces": None},
    {"angle_embedding": "scalar", "use_message_gate": True, "stress": True},
    {"angle_embedding": "bias", "angle_embedding_size": 3, "use_graph_attention": True},
    {"forces": "direct", "use_graph_attention": True, "use_global_readout": True, "energy_reduce": "mean"},
    {"frequency_list": None, "normalization": "layernorm", "activation": "smelu"},
    {"frequency_list": [0, 5, 3], "normalization": "skip", "activation": "squared_relu"},
    {"knn_soft": False, "distance_function": "linear_sigmoid", "activation": "star_relu"},
    {"knn_low_mem": False, "use_envelope": False, "distance_function": "sigmoid"},
    {"smooth_orders": True, "activation": "leaky_relu"},
    {"ffn_multiplier": 0, "readout_multiplier": 0, "output_multiplier": 0},
]


def small(dtype: torch.dtype = torch.float64, **options: Any) -> EScAIP:
    """With weights of the size of trained ones, so that nothing is near zero."""
    torch.manual_seed(0)
    model = zoo.create_model("escaip_mini", **SMALL | options).eval().to(dtype)
    assert isinstance(model, EScAIP)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "atom" in name:
                parameter.normal_()
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rattled(atoms: Atoms, seed: int = 0) -> Atoms:
    atoms.positions += np.random.default_rng(seed).normal(0, 0.08, atoms.positions.shape)
    return atoms


def frames() -> list[Atoms]:
    """A molecule, a crystal whose cell is smaller than the cutoff, a lone atom, a slab."""
    slab = Atoms("Cu4", bulk("Cu", cubic=True).positions, cell=[3.6, 3.6, 9.0], pbc=[True, True, False])
    return [rattled(molecule("CH3OH")), rattled(bulk("NaCl", "rocksalt", 5.6)), Atoms("He"), rattled(slab)]


def batch(atoms: list[Atoms] | None = None, dtype: torch.dtype = torch.float64) -> Structures:
    return Structures.from_ase(frames() if atoms is None else atoms, dtype)


def close(first: Tensor, second: Tensor, tolerance: float = 1e-9) -> bool:
    return bool(torch.allclose(first, second, rtol=tolerance, atol=tolerance))


# ---- symmetries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forces", ["direct", "conservative"])
def test_atoms_may_stand_anywhere_and_in_any_order(forces: str) -> None:
    model, atoms = small(forces=forces), rattled(bulk("NaCl", "rocksalt", 5.6, cubic=True))
    order = np.random.default_rng(0).permutation(len(atoms))
    moved = atoms[order]
    moved.positions += [1.3, -7.1, 0.4]
    before, after = model(batch([atoms])), model(batch([moved]))
    assert close(before["energy"], after["energy"])
    assert close(before["forces"][torch.tensor(order)], after["forces"])


def test_conservative_models_turn_with_the_structure() -> None:
    model, atoms = small(stress=True), frames()
    turn = Rotation.from_euler("xyz", [0.3, -1.1, 2.0]).as_matrix()
    turned = [frame.copy() for frame in atoms]
    for frame in turned:
        frame.set_cell(frame.cell.array @ turn.T)
        frame.positions = frame.positions @ turn.T
    before, after, matrix = model(batch(atoms)), model(batch(turned)), torch.tensor(turn)
    assert close(before["energy"], after["energy"])
    assert close(before["forces"] @ matrix.T, after["forces"])
    periodic = [1, 3]
    assert close((matrix @ before["stress"] @ matrix.T)[periodic], after["stress"][periodic])
    assert float(before["forces"].detach().abs().max()) > 0.01
    assert float(before["stress"][periodic].detach().abs().max()) > 1e-4


def test_direct_forces_do_not_turn() -> None:
    """By design: what the specification measured, and what augmentation is for."""
    model, atoms = small(forces="direct"), rattled(molecule("CH3OH"))
    before = model(batch([atoms]))["forces"].detach()
    turn = Rotation.from_euler("xyz", [0.3, -1.1, 2.0]).as_matrix()
    atoms.positions = atoms.positions @ turn.T
    after = model(batch([atoms]))["forces"].detach()
    assert float((before @ torch.tensor(turn).T - after).abs().max()) > 0.01 * float(before.abs().max())


@pytest.mark.parametrize("repeat", [np.diag([2, 1, 1]), np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]])])
def test_a_supercell_has_the_energy_of_its_cells(repeat: np.ndarray) -> None:
    model, cell = small(stress=True), rattled(bulk("NaCl", "rocksalt", 5.6))
    one, many = model(batch([cell])), model(batch([make_supercell(cell, repeat)]))
    assert close(round(abs(np.linalg.det(repeat))) * one["energy"], many["energy"])
    assert close(one["stress"], many["stress"])


def test_a_batch_is_its_members_and_far_structures_add_up() -> None:
    model, atoms = small(), [rattled(molecule("CH3OH")), rattled(molecule("H2O"), 1), Atoms("He")]
    whole = model(batch(atoms))
    singles = [model(batch([frame])) for frame in atoms]
    assert close(whole["energy"], torch.cat([single["energy"] for single in singles]))
    assert close(whole["forces"], torch.cat([single["forces"] for single in singles]))
    apart = sum((Atoms(f.symbols, f.positions + 50 * i) for i, f in enumerate(atoms)), Atoms())
    assert close(model(batch([apart]))["energy"], whole["energy"].sum()[None])


# ---- derivatives -------------------------------------------------------------------------------------------


def test_forces_and_stress_are_derivatives_of_the_energy() -> None:
    """Central differences in float64, 1e-6 of the largest."""
    model, structures = small(stress=True), batch()
    found, step = model(structures), 1e-4

    def energy(positions: Tensor, cell: Tensor) -> Tensor:
        with torch.no_grad():
            return model(replace(structures, positions=positions, cell=cell))["energy"].sum()

    positions, cell = structures.positions, structures.cell
    for atom, axis in [(0, 0), (4, 2), (7, 1), (10, 1)]:
        shift = torch.zeros_like(positions)
        shift[atom, axis] = step
        slope = (energy(positions + shift, cell) - energy(positions - shift, cell)) / (2 * step)
        assert float(slope + found["forces"][atom, axis]) == pytest.approx(0, abs=1e-6)
    crystal = structures.batch == 1
    volume = torch.linalg.det(cell[1]).abs()
    for i, j in [(0, 0), (0, 1), (2, 1)]:
        strain = torch.zeros(3, 3).double()
        strain[i, j] = step
        strain = (strain + strain.T) / 2
        ends = []
        for sign in (1, -1):
            deformed = torch.eye(3).double() + sign * strain
            moved = torch.where(crystal[:, None], positions @ deformed, positions)
            cells = cell.clone()
            cells[1] = cell[1] @ deformed
            ends.append(energy(moved, cells))
        slope = (ends[0] - ends[1]) / (2 * step) / volume
        assert float(slope) == pytest.approx(float(found["stress"][1, i, j]), abs=1e-7)
    assert bool(found["stress"][0].isnan().all())


def test_no_net_force() -> None:
    forces = small()(batch())["forces"]
    assert float(forces[:6].sum(0).abs().max()) < 1e-10
    assert not forces[8].any()


def test_forces_are_there_in_any_grad_mode() -> None:
    model, structures = small(stress=True), batch()
    expected = model(structures)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = model(batch())
        assert not any(value.requires_grad for value in found.values())
        assert all(close(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_reaches_every_weight(options: dict[str, Any]) -> None:
    """Through forces and stress where there are any; the gradients are numbers."""
    model, structures = small(torch.float32, **options), batch(dtype=torch.float32)
    found = model.train()(structures)
    loss = sum(value.nan_to_num().square().mean() for value in found.values())
    assert isinstance(loss, Tensor)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name


def test_the_gradient_of_a_loss_of_forces_is_right() -> None:
    """The second derivative, by central differences in one weight."""
    model, structures = small(), batch()
    weight: Tensor = model.network.blocks[0].attention.attention.qkv.weight  # pyright: ignore
    loss = model(structures)["forces"].square().sum()
    (slope,) = torch.autograd.grad(loss, weight)
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            weight[3, 5] += step
            ends.append(float(model(structures)["forces"].square().sum()))
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(slope[3, 5]), rel=1e-5)


@pytest.mark.parametrize("smooth_orders", [True, False])
def test_the_energy_is_smooth_where_an_atom_leaves(smooth_orders: bool) -> None:
    """Steps of 1/100 Å across the cutoff, and across the place of the k-th neighbour.

    Official order parameters count each neighbour in full, however weak its envelope: there the energy jumps.
    """
    model = small(knn_k=4, smooth_orders=smooth_orders)
    lines = [
        Atoms("OHHCH", [[0, 0, 0], [0.9, 0, 0], [0, 1.2, 0], [0, 0, 2.1], [x, 0, 0.3]])
        for x in np.linspace(2.6, 4.4, 181)
    ]
    with torch.no_grad():
        energies = model(batch(lines))["energy"]
    steps = energies.diff()
    assert float(energies[0] - energies[-1]) != 0
    assert float(steps[-10:].abs().max()) < 1e-9
    jump = float(steps.diff().abs().max() / (energies.max() - energies.min()))
    assert jump < 0.02 if smooth_orders else jump > 0.1


# ---- the ways to compute it --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS[1], OPTIONS[3]], ids=str)
def test_the_network_compiles_whole(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = small(**options, num_layers=1)
    graph = model.graph(batch())
    compiled = torch.compile(model.network, backend="eager", fullgraph=True)(graph)
    assert all(close(compiled[name], value) for name, value in model.network(graph).items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backends_agree(options: dict[str, Any]) -> None:
    model, structures = small(**options), batch()
    expected = model(structures)
    with backend("reference"):
        found = model(structures)
    assert all(close(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


def test_half_precision_is_close_and_results_stay_wide() -> None:
    model, structures = small(torch.float32), batch(dtype=torch.float32)
    expected = model(structures)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(structures)
    assert found["energy"].dtype == torch.float32
    assert torch.allclose(found["energy"], expected["energy"], rtol=0.05, atol=0.1)
    assert torch.allclose(found["forces"], expected["forces"], rtol=0.2, atol=0.1)


def test_attention_is_captured_layer_by_layer() -> None:
    model, structures = small(forces="direct"), batch()
    expected = model(structures)["energy"]
    with capture(model) as maps:
        assert close(model(structures)["energy"], expected)
    assert list(maps) == [f"network.blocks.{i}.attention.attention" for i in range(2)]
    graph = model.graph(structures)
    weights = maps["network.blocks.0.attention.attention"].weights
    assert weights.shape[2:] == (graph.index.shape[1],) * 2
    unused = ~graph.mask[:, None, None].expand_as(weights)
    assert not weights[unused].any()
    assert close(weights.sum(-1), torch.ones(()).double())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tiles_change_nothing(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, structures = small(**options), batch()
    expected = model(structures)
    assert model.graph(structures).tiling is None
    monkeypatch.setattr(model, "tile_slots", lambda device: 30)
    tiling = model.graph(structures).tiling
    assert tiling is not None
    assert len(tiling.tiles) > 2
    found = model(structures)
    assert all(close(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


def test_edges_that_nobody_reads_are_not_missed() -> None:
    model, structures = small(), batch()
    expected = model(structures)["energy"]
    blocks: Any = model.network.blocks
    assert blocks[-1].only_node
    blocks[-1].only_node = False
    assert close(model(structures)["energy"], expected)


def test_more_neighbours_than_official_slots_are_all_used() -> None:
    """A crystal at the official setting: shells share their ranks, so more than k are neighbours."""
    model = small(knn_k=14, cutoff=6.0)
    graph = model.graph(batch([bulk("Fe", "bcc", 2.87, cubic=True)]))
    assert graph.mask.sum(1).tolist() == [15, 15]
    assert bool(graph.mask.all())


def test_periodicity_of_the_structure_or_of_the_official_flag() -> None:
    atoms = rattled(Atoms("Cu2", [[0, 0, 0], [1.9, 1.9, 0]], cell=[3.8, 3.8, 2.6], pbc=[True, True, False]))
    own, whole, none = (small(use_pbc=flag) for flag in (None, True, False))
    slab, crystal = batch([atoms]), batch([atoms])
    crystal.pbc[:] = True
    assert close(whole(slab)["energy"], own(crystal)["energy"])
    molecule_like = replace(slab, pbc=torch.zeros_like(slab.pbc))
    assert close(none(slab)["energy"], own(molecule_like)["energy"])
    assert not close(own(slab)["energy"], own(crystal)["energy"])
    with pytest.raises(DataError, match="without lattice vector"):
        whole(batch([molecule("H2O")]))


# ---- official files, and mistakes --------------------------------------------------------------------------


OFFICIAL = {
    "hidden_size": "hidden_size",
    "num_heads": "atten_num_heads",
    "cutoff": "max_radius",
    "knn_k": "knn_k",
    "frequency_list": "freequency_list",
    "knn_soft": "knn_soft",
    "knn_low_mem": "knn_use_low_mem",
    "use_envelope": "use_envelope",
    "distance_function": "distance_function",
    "activation": "activation",
    "energy_reduce": "energy_reduce",
}


def official_options(options: dict[str, Any]) -> dict[str, Any]:
    given = SMALL | options
    told = {theirs: given[ours] for ours, theirs in OFFICIAL.items() if ours in given}
    if told["freequency_list"] is None:
        told |= {"use_frequency_embedding": False, "freequency_list": []}
    return told | {"regress_stress": given.get("stress", False), "use_padding": True, "max_atoms": 64}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_official_layout_and_back(options: dict[str, Any]) -> None:
    """Of all but `smooth_orders`, which the official program does not have."""
    options = options | {"smooth_orders": False}
    model, structures = small(torch.float32, **options), batch(dtype=torch.float32)
    state = zoo.to_official(model)
    assert all(name.startswith(("backbone.", "output_heads.")) for name in state)
    again = zoo.from_official("escaip_h512l10", state, **official_options(options))
    expected, found = model(structures), again(structures)
    assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


def test_heads_have_any_name_and_wrapper() -> None:
    model = small(torch.float32)
    state = {
        f"module.{name.replace('output_heads.energy.', 'output_heads.energyandforcehead.head.')}": value
        for name, value in zoo.to_official(model).items()
    }
    again = zoo.from_official("escaip_mini", state, **official_options({}))
    structures = batch(dtype=torch.float32)
    assert torch.equal(again(structures)["energy"], model(structures)["energy"])


def test_what_a_file_says_counts() -> None:
    state = zoo.to_official(small(torch.float32, forces="direct"))
    assert EScAIPOfficial.matches(state)
    with pytest.raises(CheckpointError, match="forces='direct', not 'conservative'"):
        zoo.from_official("escaip_mini", state, **official_options({}), direct_forces=False)
    with pytest.raises(CheckpointError, match="has num_layers=2, not 3"):
        zoo.from_official("escaip_mini", state, **official_options({}), num_layers=3)
    with pytest.raises(ConfigError, match=r"no option 'knn_kk'\. Did you mean 'knn_k'"):
        zoo.from_official("escaip_mini", state, knn_kk=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "hidden_size=16 is not divisible by num_heads=3"),
        ({"frequency_list": [4, 4, 4]}, "adds up to 12, but a head has hidden_size / num_heads = 8"),
        ({"forces": "direct", "stress": True}, "stress=True needs forces='conservative'"),
        ({"forces": "conserved"}, "forces are 'direct', 'conservative' or None"),
        ({"activation": "gelo"}, "not 'gelo'. Did you mean 'gelu'"),
        ({"energy_reduce": "max"}, "energy_reduce is one of sum, mean"),
        ({"cutoff": 0.0}, "cutoff is a positive number"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_an_unknown_element_is_named() -> None:
    with pytest.raises(DataError, match=r"Atom 1 \(Cl\) of structure 0: this model knows .* number 16"):
        small(max_num_elements=17)(batch([Atoms("NaCl", [[0, 0, 0], [2.5, 0, 0]])]))


@pytest.mark.parametrize(
    ("name", "forces", "millions"),
    [
        ("escaip_h512l10", "direct", 88.6),
        ("escaip_h512l10", "conservative", 71.0),
        ("escaip_h640l6", "direct", 85.1),
        ("escaip_h1024l8", "direct", 271.6),
    ],
)
def test_published_sizes(name: str, forces: str, millions: float) -> None:
    with torch.device("meta"):
        model = zoo.create_model(name, forces=forces)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
