"""Lists of neighbouring pairs, found by vesin in time linear in the number of atoms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from domains.atoms.structures import Pairs, Structures, completed
from zoo.errors import DataError, require

OVERLAP = 1e-3
"""Å: atoms closer than this are one counted twice. (The models take less than 1e-6 for the atom itself.)"""


def candidate_pairs(structures: Structures, cutoff: float) -> Pairs:
    """All pairs closer than `cutoff`, images included: cells may be far smaller than the cutoff.

    Periodicity is that of each axis of each structure. The search runs on the CPU; the result lies beside the
    positions.

    Raises:
        DataError: positions that are no numbers; two atoms at one place, by structure and atom.
        MissingExtra: vesin is not installed.
    """
    search = require("vesin", "atoms").NeighborList(cutoff=cutoff, full_list=False, n_threads=1)
    positions = structures.positions.detach().double().cpu()
    if not bool(positions.isfinite().all()):
        structures.check()
    cells = completed(structures.cell.detach().double(), structures.pbc).cpu().numpy()
    pbc, natoms = structures.pbc.cpu().numpy(), structures.natoms.tolist()
    parts, start = [], 0
    for points, cell, periodic in zip(positions.split(natoms), cells, pbc, strict=True):
        i, j, shift, distance = search.compute(points.numpy(), cell, periodic, "ijSd")
        if len(distance) and distance.min() < OVERLAP:
            _refuse(structures, start, i, j, distance)
        parts.append(_both_ways(i, j, shift, cutoff))
        start += len(points)
    return Pairs.concat(parts, natoms).to(structures.positions.device)


def pairs_of(structures: Structures, cutoff: float) -> Pairs:
    """The pairs that a batch brings if they reach as far as `cutoff`; else they are searched."""
    found = structures.pairs
    return candidate_pairs(structures, cutoff) if found is None or found.cutoff < cutoff else found


def pair_vectors(structures: Structures, pairs: Pairs) -> Tensor:
    """`(P, 3)` in Å from centre to neighbour; differentiable in positions and cells."""
    positions = structures.positions
    cells = structures.cell[structures.batch[pairs.centre]]
    offset = (pairs.shift.to(positions)[:, None] @ cells)[:, 0]
    return positions[pairs.neighbour] + offset - positions[pairs.centre]


def _both_ways(i: np.ndarray, j: np.ndarray, shift: np.ndarray, cutoff: float) -> Pairs:
    """Each pair once -> each pair from both sides, by centre, neighbour and image in ascending order."""
    i, j, shift = i.astype(np.int64), j.astype(np.int64), shift.astype(np.int64)
    centre, neighbour = np.concatenate([i, j]), np.concatenate([j, i])
    image = np.concatenate([shift, -shift])
    order = np.lexsort((*image.T[::-1], neighbour, centre))
    first, second, images = (torch.from_numpy(column[order]) for column in (centre, neighbour, image))
    return Pairs(first, second, images, cutoff)


def _refuse(structures: Structures, start: int, i: np.ndarray, j: np.ndarray, distance: np.ndarray) -> None:
    nearest = int(distance.argmin())
    other = int(j[nearest])
    raise DataError(
        f"{structures.place(start + int(i[nearest]))} and atom {other} lie {distance[nearest]:.2g} Å apart: "
        "two atoms at one place."
    )
