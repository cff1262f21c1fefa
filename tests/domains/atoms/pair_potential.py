"""A potential that is known in closed form, to hold everything around potentials to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor, nn

from domains.atoms.graph.pairs import pair_vectors, pairs_of
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from zoo import registry


class Morse(nn.Module):
    """`D (1 - exp(-a (r - r0)))^2 - D` of every pair, times a smooth step to zero at the cutoff."""

    def __init__(self, depth: float, stiffness: float, length: float, cutoff: float, charged: float) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor(float(depth)))
        self.stiffness, self.length, self.cutoff, self.charged = stiffness, length, cutoff, charged

    def forward(self, graph: dict[str, Tensor]) -> dict[str, Tensor]:
        lengths = graph["vectors"].norm(dim=1)
        well = (1 - torch.exp(-self.stiffness * (lengths - self.length))) ** 2 - 1
        share = (1 - (lengths / self.cutoff) ** 2).clamp(min=0) ** 4
        pairs = self.depth * well * share / 2
        energy = pairs.new_zeros(len(graph["charge"])).index_add(0, graph["structure"], pairs)
        found = {"energy": energy + self.charged * graph["charge"] ** 2}
        if "atoms" in graph:
            # A head with forces of its own: half the true ones, and turned.
            push = (self.depth * share)[:, None] * graph["vectors"].roll(1, 1)
            found["forces"] = push.new_zeros(len(graph["atoms"]), 3).index_add(0, graph["centre"], push)
        return found


class PairPotential(Potential):
    """Pairs of atoms alone, whatever the elements.

    Args:
        depth: eV.
        length: Å, of the well.
        charged: eV times the square of the total charge.
    """

    invariant = True

    def __init__(
        self,
        *,
        forces: str | None = "conservative",
        stress: bool = True,
        cutoff: float = 5.0,
        depth: float = 0.35,
        stiffness: float = 1.4,
        length: float = 2.6,
        charged: float = 0.0,
        max_atomic_number: int = 90,
    ) -> None:
        super().__init__(
            forces=forces, stress=stress, cutoff=cutoff, margin=0.0, max_atomic_number=max_atomic_number
        )
        self.network = Morse(depth, stiffness, length, cutoff, charged)

    def graph(self, structures: Structures) -> dict[str, Tensor]:
        pairs = pairs_of(structures, self.cutoff)
        graph = {
            "vectors": pair_vectors(structures, pairs),
            "centre": pairs.centre,
            "structure": structures.batch[pairs.centre],
            "charge": structures.charge,
        }
        return graph | ({"atoms": structures.atomic_numbers} if self.forces == "direct" else {})


@contextmanager
def registered() -> Iterator[str]:
    """Within, `zoo.create_model("pair_potential")` makes one."""
    registry.get_domain("atoms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_MODELS", dict(registry._MODELS))

        def pair_potential(**options: Any) -> nn.Module:
            return PairPotential(**options)

        pair_potential.__module__ = "domains.atoms.models.pair_potential"
        registry.register_model(
            model=PairPotential,
            summary="pairs alone",
            paper="none",
            licence="none",
            source="none",
            status="re-implementation",
        )(pair_potential)
        yield "pair_potential"


def energy_by_hand(atoms: Atoms, potential: PairPotential) -> float:
    """The same energy, summed over images in numpy."""
    cell, network = atoms.cell.complete().array, potential.network
    assert isinstance(network, Morse)
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    reach = np.where(atoms.pbc, np.ceil(network.cutoff / heights) + 1, 0).astype(int)
    shifts = np.array(list(np.ndindex(*(2 * reach + 1)))) - reach
    positions = atoms.get_positions(wrap=True)
    vectors = positions[None, :, None] + (shifts @ cell)[None, None] - positions[:, None, None]
    lengths = np.linalg.norm(vectors, axis=-1).reshape(-1)
    lengths = lengths[(lengths > 1e-6) & (lengths < network.cutoff)]
    well = (1 - np.exp(-network.stiffness * (lengths - network.length))) ** 2 - 1
    share = (1 - (lengths / network.cutoff) ** 2) ** 4
    return float(network.depth.detach().double()) * float((well * share).sum()) / 2
