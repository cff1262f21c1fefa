"""Frame averaging: a potential that is not invariant to rotation, made (more) invariant by averaging.

Letters in shapes: N atoms of the batch, G structures.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from domains.atoms.batches import random_rotation
from domains.atoms.graph.pairs import pairs_of
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from zoo.errors import ConfigError

PRINCIPAL = "principal"
FLIPS = ((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1))
"""Signs of the three axes of a frame that keep it right-handed."""


class FrameAveraged(Potential):
    """The mean of a potential over several orientations of each structure, turned back.

    Without `rotations`, over the four right-handed frames of a structure's principal axes (Puny et al. 2022,
    "Frame averaging for invariant and equivariant network design"). Energies are then invariant and forces
    equivariant exactly, save where principal axes are not unique: symmetric tops have axes by chance. A
    structure that is periodic along two axes or more is turned by its lattice vectors instead, whose frame
    does not depend on how atoms are wrapped. Forces are the mean of those in each frame: as the frames move
    with the atoms, those of a conservative potential are no longer exact slopes of the mean energy.

    With `rotations`, over so many fixed random orientations, the same for all: the error of a turned
    structure falls with their number, and conservative forces remain exact slopes.

    Args:
        potential: any; it is not copied.
        rotations: number of random orientations; None: principal frames.
        seed: of the orientations.

    Raises:
        ConfigError: fewer than one orientation.

    Example:
        >>> from domains.atoms.models.allscaip import allscaip_mini
        >>> averaged = FrameAveraged(allscaip_mini())
        >>> sorted(averaged.predicts)
        ['energy', 'forces']
    """

    turns: Tensor | None

    def __init__(self, potential: Potential, rotations: int | None = None, seed: int = 0) -> None:
        super().__init__(
            forces=potential.forces,
            stress=potential.stress,
            cutoff=potential.cutoff,
            margin=potential.margin,
            max_atomic_number=potential.max_atomic_number,
        )
        if rotations is not None and rotations < 1:
            raise ConfigError(f"rotations is at least 1, not {rotations}.")
        self.potential, self.scale = potential, potential.scale
        fixed = rotations is not None
        self.elements, self.extensive = potential.elements, potential.extensive and fixed
        self.invariant = potential.invariant or not fixed
        if potential.forces is not None and not fixed:
            self.forces = "direct"  # no slopes, for all that look at it
        turns = None if rotations is None else random_rotations(rotations, seed)
        self.register_buffer("turns", turns, persistent=False)
        self.train(potential.training)

    def forward(self, structures: Structures) -> dict[str, Tensor]:
        """As `Potential.forward`: the mean over all orientations."""
        self.check_elements(structures)
        pairs = pairs_of(structures, self.cutoff + self.margin)
        structures = replace(structures, pairs=pairs)
        frames = self._frames(structures)
        total: dict[str, Tensor] = {}
        for frame in frames:
            for name, value in self._turned(structures, frame).items():
                total[name] = total[name] + value if name in total else value
        return {name: value / len(frames) for name, value in total.items()}

    def _frames(self, structures: Structures) -> Tensor:
        """`(F, G, 3, 3)`, rows are the axes of each frame."""
        if self.turns is not None:
            return self.turns.to(structures.positions)[:, None].expand(-1, len(structures), -1, -1)
        flips = torch.tensor(FLIPS).to(structures.positions)
        return flips[:, None, :, None] * principal_frames(structures)

    def _turned(self, structures: Structures, frame: Tensor) -> dict[str, Tensor]:
        """Outputs in the frame `(G, 3, 3)` of each structure, turned back."""
        of_atom = frame[structures.batch]
        turned = replace(
            structures,
            positions=(of_atom @ structures.positions[..., None])[..., 0],
            cell=structures.cell @ frame.mT,
        )
        found = dict(self.potential(turned))
        if "forces" in found:
            back = of_atom.mT.to(found["forces"])
            found["forces"] = (back @ found["forces"][..., None])[..., 0]
        if "stress" in found:
            back = frame.to(found["stress"])
            found["stress"] = back.mT @ found["stress"] @ back
        return found


def averaged(potential: Potential, orientations: str | int | None) -> Potential:
    """As the option `orientations` says: "principal", a number of random ones, or None for none.

    Raises:
        ConfigError: anything else.
    """
    if orientations is None:
        return potential
    if orientations == PRINCIPAL:
        return FrameAveraged(potential)
    if isinstance(orientations, bool) or not isinstance(orientations, int):
        raise ConfigError(f"orientations={orientations} is neither {PRINCIPAL!r} nor a number of rotations.")
    return FrameAveraged(potential, orientations)


@torch.no_grad()
def principal_frames(structures: Structures) -> Tensor:
    """`(G, 3, 3)`, right-handed: axes by ascending spread of the atoms, or along the lattice.

    With two periodic axes or more the first lies along the first periodic vector, the second in the plane of
    the first two.
    """
    positions, batch = structures.positions.double(), structures.batch
    count = structures.natoms[:, None].double()
    centre = positions.new_zeros(len(structures), 3).index_add(0, batch, positions) / count
    apart = positions - centre[batch]
    spread = apart.new_zeros(len(structures), 3, 3).index_add(0, batch, apart[:, :, None] * apart[:, None])
    axes = torch.linalg.eigh(spread).eigenvectors.mT
    for graph in (structures.pbc.sum(1) >= 2).nonzero()[:, 0].tolist():
        first, second = structures.cell[graph][structures.pbc[graph]][:2].double()
        along = first / first.norm()
        across = second - (second @ along) * along
        axes[graph, 0], axes[graph, 1] = along, across / across.norm()
    axes[:, 2] = torch.linalg.cross(axes[:, 0], axes[:, 1])
    return axes.to(structures.positions)


def random_rotations(count: int, seed: int) -> Tensor:
    """`(count, 3, 3)`, uniform over all rotations."""
    draw = np.random.default_rng(seed)
    return torch.stack([random_rotation(draw) for _ in range(count)])
