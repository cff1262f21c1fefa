"""Who is a neighbour: the two-sided k-nearest envelope of EScAIP and AllScAIP, on sparse pairs.

The official programs rank all N x N x images pairs. The same numbers follow from pairs up to a little beyond
the cutoff: a pair counts only below the cutoff, and a step function that has ended makes atoms further away
than `Knn.margin` beyond it weigh nothing in its rank.

Letters in shapes: N atoms, P candidate pairs, E pairs that are neighbours, C candidates of one atom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, pi
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.atoms.graph.features import lengths
from domains.atoms.graph.pairs import pair_vectors, pairs_of
from domains.atoms.structures import Pairs, Structures
from zoo.errors import ConfigError

FURTHER = 20
"""The low-memory ranks look at the k + 20 nearest candidates, the atom itself among them."""
FAR = 1e3
"""Å: the distance of an empty place."""


def sine_step(x: Tensor) -> Tensor:
    """0 below -pi, 1 above pi, a half period of a sine between (EScAIP)."""
    return 0.5 + 0.5 * (0.5 * x.clamp(-pi, pi)).sin()


def bump_step(x: Tensor) -> Tensor:
    """0 below -4, 1 above 4, all derivatives continuous (AllScAIP)."""
    inside = x.abs() < 4
    u = x.masked_fill(~inside, 0.0) / 4
    rising, falling = (-2 / (1 + u)).exp(), (-2 / (1 - u)).exp()
    return torch.where(inside, rising / (rising + falling), (x >= 0).to(x))


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "sine": (sine_step, pi),
    "bump": (bump_step, 4.0),
}
"""Smooth steps, and where they end."""


@dataclass(frozen=True)
class Knn:
    """How neighbours are chosen.

    Attributes:
        k: number of neighbours that ranks are measured by; dense surroundings have a few more.
        cutoff: Å.
        soft: differentiable ranks; else the place in the sorted list.
        low_mem: soft ranks by steps that end (see `STEPS`); else by a sigmoid, over all images.
        sigmoid_scale: Å, width of the steps.
        lse_scale: how soft the maximum of ranks and distance is.
        step: one of `STEPS`.
    """

    k: int
    cutoff: float
    soft: bool = True
    low_mem: bool = True
    sigmoid_scale: float = 0.2
    lse_scale: float = 0.1
    step: str = "sine"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"knn_k is at least 1, not {self.k}.")
        if self.sigmoid_scale <= 0 or self.lse_scale <= 0:
            raise ConfigError(
                f"knn_sigmoid_scale and knn_lse_scale are positive, not {self.sigmoid_scale} and "
                f"{self.lse_scale}."
            )

    @property
    def margin(self) -> float:
        """Å beyond the cutoff within which atoms count in the ranks."""
        return STEPS[self.step][1] * self.sigmoid_scale if self.soft and self.low_mem else 0.0


class Edges(NamedTuple):
    """Pairs whose envelope coordinate is below 1, in canonical order, without those of an atom to itself.

    centre, neighbour: `(E,)`; vectors: `(E, 3)` in Å; envelope: `(E,)` in (0, 1); pair: `(E,)`, the same
    number for both directions, from 0 on.
    """

    centre: Tensor
    neighbour: Tensor
    vectors: Tensor
    envelope: Tensor
    pair: Tensor


def find_edges(structures: Structures, knn: Knn) -> Edges:
    """All neighbours of all atoms; differentiable (twice) in positions and cells.

    Pairs that a batch brings are used where they reach far enough. The full soft ranks have no end: they look
    at every image of the official set, of which there are N^2 times the number of images.
    """
    full = knn.soft and not knn.low_mem
    pairs = image_pairs(structures, knn.cutoff) if full else pairs_of(structures, knn.cutoff + knn.margin)
    vectors = pair_vectors(structures, pairs)
    distance = lengths(vectors)
    near = (distance.detach() < knn.cutoff).nonzero()[:, 0]
    source, destination = pair_ranks(distance, pairs, structures, knn)
    envelope = envelope_coordinate(source[near], destination[near], distance[near], knn)
    kept = (envelope.detach() < 1).nonzero()[:, 0]
    chosen = near[kept]
    centre, neighbour = pairs.centre[chosen], pairs.neighbour[chosen]
    pair = _undirected(centre, neighbour, pairs.shift[chosen], structures.num_atoms)
    return Edges(centre, neighbour, vectors[chosen], envelope[kept], pair)


def _undirected(centre: Tensor, neighbour: Tensor, shift: Tensor, num_atoms: int) -> Tensor:
    """Numbers `(E,)` of the pairs of atoms and images, the same for both directions."""
    reach = int(shift.abs().amax()) if len(shift) else 0
    base = 2 * reach + 1

    def key(first: Tensor, second: Tensor, image: Tensor) -> Tensor:
        x, y, z = (image + reach).unbind(1)
        return (((first * num_atoms + second) * base + x) * base + y) * base + z

    keys = torch.minimum(key(centre, neighbour, shift), key(neighbour, centre, -shift))
    return keys.unique(return_inverse=True)[1]


def envelope_coordinate(source: Tensor, destination: Tensor, distance: Tensor, knn: Knn) -> Tensor:
    """The (soft) maximum of both ranks over k and the distance over the cutoff; a neighbour is below 1.

    All `(E,)`; +inf where a rank is.
    """
    ranked = source.isfinite() & destination.isfinite()
    parts = torch.stack([source / knn.k, destination / knn.k, distance / knn.cutoff])
    # Infinite ranks would make the gradient of the finite ones nan.
    parts = parts.masked_fill(~ranked, 0.0)
    soft = knn.lse_scale * (parts / knn.lse_scale).logsumexp(0) if knn.soft else parts.amax(0)
    return soft.masked_fill(~ranked, torch.inf)


def pair_ranks(distance: Tensor, pairs: Pairs, structures: Structures, knn: Knn) -> tuple[Tensor, Tensor]:
    """The ranks `(P,)` of each pair among those of its centre, and among those of its neighbour.

    The first of all is the atom itself. +inf beyond the cutoff, and for what the low-memory ranks do not look
    at. The second are not read from the reverse pairs, whose distances may round differently: close to 1 the
    envelope shows that, and of two opposite images each side's own order decides which hard rank comes first.
    """
    rank = _soft_pair_ranks if knn.soft else _hard_pair_ranks
    source = rank(distance, pairs.centre, structures, knn)
    order = pairs.neighbour.argsort(stable=True)
    incoming = rank(distance[order], pairs.neighbour[order], structures, knn)
    return source, torch.zeros_like(incoming).index_copy(0, order, incoming)


def _hard_pair_ranks(distance: Tensor, row: Tensor, structures: Structures, knn: Knn) -> Tensor:
    """Places in the sorted list of each row; `row (P,)` ascends."""
    table = row_table(row, structures.num_atoms)
    order = _filled(distance.detach(), table, torch.inf).argsort(dim=1, stable=True)
    ranks = torch.arange(1, table.shape[1] + 1, device=row.device).to(distance).expand_as(table)
    out = distance.new_empty(len(distance) + 1)
    out[table.gather(1, order)] = ranks
    return out[:-1]


def _soft_pair_ranks(distance: Tensor, row: Tensor, structures: Structures, knn: Knn) -> Tensor:
    """Sums of steps over each row; `row (P,)` ascends."""
    table = row_table(row, structures.num_atoms)
    rows, order = _filled(distance.detach(), table, FAR).sort(dim=1, stable=True)
    table = table.gather(1, order)
    within = int((rows < knn.cutoff).sum(1).amax()) if rows.shape[1] else 0
    if knn.low_mem:
        width = _seen(structures, knn)
        table = F.pad(table[:, :width], (0, max(0, width - table.shape[1])), value=len(row))
        within = min(within, width, _rankable(rows[:, :width], knn))
    values = _filled(distance, table, FAR)
    ranks = soft_ranks(F.pad(values, (1, 0)), within + 1, knn)[:, 1:]
    # One place more takes what the empty places of the table point to.
    out = distance.new_full((len(distance) + 1,), torch.inf)
    return out.index_put((table[:, :within].flatten(),), ranks.flatten())[:-1]


def _seen(structures: Structures, knn: Knn) -> int:
    """How many candidates the low-memory ranks add up.

    What is too far adds 0, but the order of a sum shows in its last digit, which the envelope enlarges a
    thousandfold where it is close to 1.
    """
    most = knn.k + FURTHER - 1
    return most if bool(structures.pbc.any()) else min(most, int(structures.natoms.max()) - 1)


def _rankable(rows: Tensor, knn: Knn) -> int:
    """How many of the nearest candidates, at most, have a rank below k; others are no neighbours.

    What is nearer counts at least half (as do a candidate itself, and the atom in the middle), and as one
    where it is nearer by the reach of the step.
    """
    rows = rows.contiguous()
    passed = torch.searchsorted(rows, rows - knn.margin)
    place = torch.arange(rows.shape[1], device=rows.device)
    return int((0.5 * (place + passed) + 1 < knn.k).sum(1).amax()) if rows.shape[1] else 0


def soft_ranks(rows: Tensor, count: int, knn: Knn) -> Tensor:
    """Soft ranks `(N, count)` of the first columns of `rows (N, C)`: `sum_b step((r_a - r_b) / scale)`.

    A distance counts half in its own rank.
    """
    step = STEPS[knn.step][0] if knn.low_mem else torch.sigmoid
    return step((rows[:, :count, None] - rows[:, None, :]) / knn.sigmoid_scale).sum(-1)


def row_table(row: Tensor, num_rows: int) -> Tensor:
    """`(num_rows, C)`: which entries of the sorted `row (P,)` are those of each row; P where none is left."""
    counts = row.bincount(minlength=num_rows)
    width = int(counts.amax())
    starts = counts.cumsum(0) - counts
    columns = torch.arange(width, device=row.device)
    table = starts[:, None] + columns
    return table.masked_fill(columns >= counts[:, None], len(row))


def _filled(values: Tensor, table: Tensor, fill: float) -> Tensor:
    return torch.cat([values, values.new_full((1,), fill)])[table]


def image_pairs(structures: Structures, cutoff: float) -> Pairs:
    """Every pair of the official image set, dense: `n = ceil(cutoff / height)` cells to each side.

    The set covers the cutoff only where positions are wrapped into their cells.
    """
    parts = []
    cells = structures.cell.detach()
    for graph, count in enumerate(structures.natoms.tolist()):
        images = cell_images(cells[graph], structures.pbc[graph], cutoff)
        parts.append(_dense_pairs(count, images, cutoff))
    return Pairs.concat(parts, structures.natoms.tolist()).to(structures.positions.device)


def cell_images(cell: Tensor, pbc: Tensor, cutoff: float) -> Tensor:
    """`(M, 3)` in lexicographic order: the zero image stands in the middle."""
    axes = []
    volume = torch.linalg.det(cell).abs()
    for axis in range(3):
        reach = 0
        if pbc[axis]:
            first, second = cell[(axis + 1) % 3], cell[(axis + 2) % 3]
            reach = ceil(cutoff * float(torch.linalg.cross(first, second).norm() / volume))
        axes.append(torch.arange(-reach, reach + 1))
    return torch.cartesian_prod(*axes)


def _dense_pairs(count: int, images: Tensor, cutoff: float) -> Pairs:
    axes = (torch.arange(count), torch.arange(count), torch.arange(len(images)))
    i, j, m = (index.flatten() for index in torch.meshgrid(*axes, indexing="ij"))
    kept = (i != j) | (m != len(images) // 2)
    return Pairs(i[kept], j[kept], images[m][kept], cutoff)
