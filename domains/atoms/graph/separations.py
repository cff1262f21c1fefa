"""Distances between all atoms of a structure, to the nearest image.

Letters in shapes: T structures of n atoms each, padded within a bucket of similar size; M images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from domains.atoms.graph.biknn import cell_images
from domains.atoms.graph.features import lengths
from domains.atoms.structures import Structures, completed
from zoo.attention import Groups


def separations(structures: Structures, groups: Groups, cutoff: float) -> list[Tensor]:
    """For each bucket of `groups` (atoms by structure) the distances `(T, n, n)` in Å; 0 where no atom is.

    The nearest is sought among the images that the cutoff asks for, as officially, without gradient and one
    after the other: memory is that of one image. Differentiable in positions and cells.
    """
    positions, cell, batch = structures.positions, structures.cell, structures.batch
    wrapped = _wrapping(structures)
    parts = []
    for bucket in groups.plan:
        at = bucket.queries.clamp(min=0)
        graphs = batch[at[:, 0]]
        where, home, cells = positions[at], wrapped[at], cell[graphs]
        shift = torch.stack(
            [
                _nearest(
                    where[t].detach() + home[t] @ cells[t].detach(),
                    cells[t].detach(),
                    structures.pbc[g],
                    cutoff,
                )
                for t, g in enumerate(graphs.tolist())
            ]
        )
        shift = shift + home[:, None] - home[:, :, None]
        vectors = where[:, None] - where[:, :, None]
        if bool(structures.pbc[graphs].any()):
            vectors = vectors + (shift.flatten(1, 2) @ cells).view_as(vectors)
        present = bucket.queries >= 0
        parts.append(lengths(vectors * (present[:, None] & present[:, :, None])[..., None]))
    return parts


def _wrapping(structures: Structures) -> Tensor:
    """`(N, 3)`: how many lattice vectors bring each atom into its cell, along periodic axes."""
    cell = completed(structures.cell.detach(), structures.pbc)[structures.batch]
    fractional = torch.linalg.solve(cell.double().mT, structures.positions.detach().double())
    return -(fractional.floor() * structures.pbc[structures.batch]).to(structures.positions)


def _nearest(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> Tensor:
    """`(n, n, 3)`: the image of each second atom that is nearest to the first, in lattice vectors."""
    best = torch.full((len(positions), len(positions)), torch.inf).to(positions)
    shift = positions.new_zeros(*best.shape, 3)
    between = positions[None] - positions[:, None]
    for image in cell_images(cell, pbc, cutoff).to(positions):
        square = (between + image @ cell).square().sum(-1)
        nearer = square < best
        best, shift = torch.where(nearer, square, best), torch.where(nearer[..., None], image, shift)
    return shift
