"""`zoo bench domain=atoms`: EScAIP beside its plain layout, from 15 to 4,096 atoms; energy and forces.

Both get positions, and find neighbours within the time that is taken. Where `mace-torch` is installed, a MACE
of its smallest published size is drawn beside ours over the number of atoms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from domains.atoms.models.escaip import EScAIP
from domains.atoms.structures import Structures
from zoo.bench.compare import Job, gradient_norm
from zoo.bench.peer import load_peer
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call
from zoo.create import create_model
from zoo.errors import require
from zoo.weights.exchange import to_official

if TYPE_CHECKING:
    import ase

RATTLE = 0.05
"""Å that atoms of crystals are off their sites, so that no two neighbours are equally far."""
ACETYLACETONE = (
    ("C", -2.55, 0.80, 0.00),
    ("C", -1.27, 0.00, 0.00),
    ("O", -1.27, -1.22, 0.00),
    ("C", 0.00, 0.85, 0.00),
    ("C", 1.27, 0.00, 0.00),
    ("O", 1.27, -1.22, 0.00),
    ("C", 2.55, 0.80, 0.00),
    ("H", -3.40, 0.13, 0.00),
    ("H", -2.57, 1.44, 0.88),
    ("H", -2.57, 1.44, -0.88),
    ("H", 0.00, 1.50, 0.88),
    ("H", 0.00, 1.50, -0.88),
    ("H", 3.40, 0.13, 0.00),
    ("H", 2.57, 1.44, 0.88),
    ("H", 2.57, 1.44, -0.88),
)
"""The diketone, drawn by hand: elements and positions in Å."""
ATOMS = (64, 512, 1728, 4096)
"""Atoms of silicon, over which costs are drawn."""
LARGER = (108, 256, 500)
"""Atoms of copper; the plain layout of more takes gigabytes."""
FORCES = ("direct", "conservative")


# ---- systems -----------------------------------------------------------------------------------------------


def molecule() -> ase.Atoms:
    """15 atoms, free."""
    symbols, *axes = zip(*ACETYLACETONE, strict=True)
    return _rattled(require("ase", "atoms").Atoms(symbols, torch.tensor(axes).T.numpy()))


def crystal(element: str, count: int) -> ase.Atoms:
    """A cube of `count` atoms, as many as whole unit cells have.

    Raises:
        ValueError: a cube has another number of atoms.
    """
    cell = require("ase.build", "atoms").bulk(element, cubic=True)
    side = round((count / len(cell)) ** (1 / 3))
    if len(cell) * side**3 != count:
        raise ValueError(f"Cubes of {element} have {len(cell)} n^3 atoms, not {count}.")
    return _rattled(cell.repeat(side))


def _rattled(atoms: ase.Atoms) -> ase.Atoms:
    atoms.rattle(RATTLE, seed=0)
    return atoms


# ---- contestants -------------------------------------------------------------------------------------------


def potential(name: str, device: torch.device, **options: Any) -> EScAIP:
    """The model in evaluation, as officially, with norms and biases off their initial values."""
    torch.manual_seed(0)
    model = create_model(f"atoms/{name}", smooth_orders=False, **options).eval()
    assert isinstance(model, EScAIP)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device)


def plain_peer(model: EScAIP, structures: Structures) -> nn.Module:
    """The peer in `benchmarks/plain` with the same weights.

    Its table has the published 1.5 slots per wanted neighbour, or as many as these structures need.
    """
    plain, network = load_peer("escaip"), model.network
    knn, sizes = model.knn, network.sizes
    settings = plain.Settings(
        num_layers=len(network.blocks),
        hidden=sizes.hidden_size,
        num_heads=sizes.num_heads,
        cutoff=knn.cutoff,
        k=knn.k,
        slots=max(3 * knn.k // 2, model.graph(structures).mask.shape[1]),
        rank_scale=knn.sigmoid_scale,
        envelope_scale=knn.lse_scale,
        num_gaussians=sizes.edge_distance_expansion_size,
        num_degrees=sizes.node_direction_expansion_size,
        frequencies=sizes.frequency_list,
        elements=sizes.max_num_elements,
        atom=sizes.atom_embedding_size,
        direction=sizes.node_direction_embedding_size,
        distance=sizes.edge_distance_embedding_size,
        multiple=sizes.ffn_multiplier,
        direct=model.forces == "direct",
    )
    peer = plain.PlainEScAIP(settings, stress=model.stress).eval()
    peer.load_official(to_official(model))
    return peer.to(structures.positions.device)


Outputs = dict[str, Tensor]


def contestants(model: EScAIP, structures: Structures) -> list[tuple[nn.Module, Callable[[], Outputs]]]:
    """The model and its peer, each with a call that gives its outputs."""
    peer = plain_peer(model, structures)
    system = (
        structures.positions,
        structures.atomic_numbers,
        structures.cell,
        structures.pbc.any(1).tolist(),
        structures.natoms.tolist(),
    )
    return [(model, lambda: model(structures)), (peer, lambda: peer(*system))]


def comparable(run: Callable[[], dict[str, Tensor]], units: dict[str, Tensor]) -> Callable[[], Tensor]:
    """All outputs in one row, each over its largest value; `units` are filled by whoever runs first."""

    def flat() -> Tensor:
        outputs = {key: value.detach() for key, value in run().items()}
        for key, value in outputs.items():
            units.setdefault(key, value.abs().max())
        return torch.cat([(outputs[key] / units[key]).flatten() for key in sorted(outputs)])

    return flat


# ---- cases -------------------------------------------------------------------------------------------------


def inference(
    name: str,
    system: str,
    atoms: Callable[[], ase.Atoms],
    *,
    forces: str,
    target: float | None = None,
    rounds: int | None = None,
    **options: Any,
) -> Case:
    """Energy and forces of one structure; of a crystal with conservative forces also the stress."""

    def build(device: torch.device) -> Job:
        structures = Structures.from_ase([atoms()]).to(device)
        stress = forces == "conservative" and bool(structures.pbc.any())
        model = potential(name, device, forces=forces, stress=stress, **options)
        ours, peer = (torch.no_grad()(run) for _, run in contestants(model, structures))
        units: Outputs = {}
        return Job(name, ours, peer, comparable(ours, units), comparable(peer, units))

    return Case(f"{name}, {forces}, {system}", build, target, rounds=rounds)


def training(name: str, count: int, *, forces: str, **options: Any) -> Case:
    """Forward, a loss of energies and forces, backward; what is compared is the norm of all gradients."""

    def build(device: torch.device) -> Job:
        structures = Structures.from_ase([molecule()] * count).to(device)

        def step(network: nn.Module, run: Callable[[], Outputs]) -> Callable[[], Tensor]:
            network.train()

            def once() -> Tensor:
                outputs = run()
                loss = outputs["energy"].abs().mean() + outputs["forces"].norm(dim=1).mean()
                return gradient_norm(network, loss)

            return once

        model = potential(name, device, forces=forces, **options)
        ours, peer = (step(network, run) for network, run in contestants(model, structures))
        return Job(name, ours, peer, ours, peer)

    return Case(f"{name}, {forces}, training step, {count} molecules of 15 atoms", build, items=count)


def growth(name: str, forces: str) -> Growth:
    """Energy and forces of silicon over the number of atoms."""

    def build(count: int, device: torch.device) -> Call:
        structures = Structures.from_ase([crystal("Si", count)]).to(device)
        model = potential(name, device, forces=forces)
        return torch.no_grad()(lambda: model(structures))

    return Growth(f"{name}, {forces}", build, ATOMS)


def mace(count: int, device: torch.device) -> Call:
    """Energy and forces of silicon by a MACE of the smallest published size, with random weights."""
    # The e3nn that it pins can be imported on recent torch only after it.
    tools, data, modules = (import_module(f"mace.{part}") for part in ("tools", "data", "modules"))
    irreps = import_module("e3nn.o3").Irreps
    numbers = list(range(1, 90))
    layer = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    torch.manual_seed(0)
    model = modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=layer,
        interaction_cls_first=layer,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=irreps("128x0e"),
        MLP_irreps=irreps("16x0e"),
        atomic_energies=torch.zeros(len(numbers)).numpy(),
        avg_num_neighbors=40.0,
        atomic_numbers=numbers,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    ).to(device)
    table = tools.utils.AtomicNumberTable(numbers)
    atoms = crystal("Si", count)

    def run() -> Outputs:
        graph = data.AtomicData.from_config(data.config_from_atoms(atoms), z_table=table, cutoff=6.0)
        batch = next(iter(tools.torch_geometric.dataloader.DataLoader([graph], batch_size=1)))
        return model(batch.to(device).to_dict(), compute_force=True)

    return run


SYSTEMS: dict[str, tuple[Callable[[], ase.Atoms], float | None]] = {
    "15 atoms": (molecule, 3.0),
    "Cu, 32 atoms": (partial(crystal, "Cu", 32), None),
    "Si, 64 atoms": (partial(crystal, "Si", 64), 2.0),
}
"""What is computed, and how many times as fast as the plain layout that is to be."""
SUITE = Suite(
    (
        *(
            inference("escaip_h512l10", system, atoms, forces=forces, target=target, rounds=3)
            for forces in FORCES
            for system, (atoms, target) in SYSTEMS.items()
        ),
        *(
            inference(
                "escaip_mini", f"Cu, {count} atoms", partial(crystal, "Cu", count), forces=forces, rounds=3
            )
            for forces in FORCES
            for count in LARGER
        ),
        training("escaip_mini", 8, forces="conservative"),
    ),
    (
        *(growth("escaip_mini", forces) for forces in FORCES),
        *([Growth("MACE, 2 layers of 128 scalars", mace, ATOMS)] if find_spec("mace") else []),
    ),
)
