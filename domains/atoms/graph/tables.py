"""Neighbours as tables: K slots for each atom, as many as the atom with the most neighbours has.

The official programs have tables of a fixed width. Here the width follows the batch: nothing is computed for
slots that nobody uses, and no neighbour is dropped.

Letters in shapes: N atoms, K slots.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.atoms.graph.biknn import Edges, row_table
from domains.atoms.graph.features import lengths


class Neighbours(NamedTuple):
    """The neighbours of each atom by ascending envelope coordinate. Slot 0 is the atom itself.

    Attributes:
        index: `(N, K)`, the neighbour; in unused slots the atom itself.
        mask: `(N, K)` bool, which slots are used.
        vectors: `(N, K, 3)` in Å from atom to neighbour; zero for the atom itself and in unused slots.
        envelope: `(N, K)`, 0 for the atom itself, +inf in unused slots.
        pair: `(N, K)`, the number of the pair; for the atom itself and unused slots one more than the last.
    """

    index: Tensor
    mask: Tensor
    vectors: Tensor
    envelope: Tensor
    pair: Tensor


class TwoSided(NamedTuple):
    """The same neighbours in two layouts: slots of each centre (source) and of each neighbour (destination).

    A tensor `x (N, K, ...)` goes from source to destination layout by `x[dst_index[0], dst_index[1]]`, and
    back by `src_index`. Unused slots map to themselves.

    Attributes:
        source: the neighbours of each centre.
        dst_envelope: `(N, K)` in destination layout.
        dst_index: `(2, N, K)`, for each destination slot its atom and slot in source layout.
        src_index: `(2, N, K)`, the inverse.
        dropped: how many neighbours did not fit into the width asked for.
    """

    source: Neighbours
    dst_envelope: Tensor
    dst_index: Tensor
    src_index: Tensor
    dropped: int


def neighbour_table(edges: Edges, num_atoms: int) -> Neighbours:
    """One-sided table (EScAIP), as wide as is needed; more neighbours than official slots are all used."""
    _, table = _ranked(edges.centre, edges.envelope, num_atoms)
    return _filled(edges, table, num_atoms)


def pair_lengths(edges: Edges) -> Tensor:
    """`(pairs + 1,)` in Å, the last one 0: what a table's `pair` points to.

    Of both directions, which may round differently, that of the first edge counts.
    """
    count = int(edges.pair.amax()) + 1 if len(edges.pair) else 0
    places = torch.arange(len(edges.pair), device=edges.pair.device)
    first = places.new_zeros(count).scatter_reduce(0, edges.pair, places, "amin", include_self=False)
    return F.pad(lengths(edges.vectors[first]), (0, 1))


def two_sided_table(edges: Edges, num_atoms: int, width: int | None = None) -> TwoSided:
    """Both layouts (AllScAIP).

    Args:
        width: drop what is not among the first `width` slots on both sides, as the official program does to
            fit its fixed tables; the table has at most this width. None: nothing is dropped.
    """
    source, destination = two_sided_ranks(edges, num_atoms)
    dropped = 0
    if width is not None:
        kept = ((source < width) & (destination < width)).nonzero()[:, 0]
        dropped = len(source) - len(kept)
        edges = Edges(*(value[kept] for value in edges))
        source, destination = source[kept], destination[kept]
    device = edges.centre.device
    needed = int(torch.cat([source, destination]).amax()) + 1 if len(source) else 1
    table = torch.full((num_atoms, needed - 1), len(source), device=device)
    flipped = table.clone()
    places = torch.arange(len(source), device=device)
    table[edges.centre, source - 1] = places
    flipped[edges.neighbour, destination - 1] = places
    layout = _filled(edges, table, num_atoms)
    axes = (torch.arange(n, device=device) for n in layout.index.shape)
    own = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    dst_index, src_index = own.clone(), own
    dst_index[:, edges.neighbour, destination] = torch.stack([edges.centre, source])
    src_index[:, edges.centre, source] = torch.stack([edges.neighbour, destination])
    return TwoSided(layout, _envelopes(edges, flipped), dst_index, src_index, dropped)


def two_sided_ranks(edges: Edges, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Slots `(E,)` of each edge among those of its centre, and among those of its neighbour, from 1 on."""
    source, _ = _ranked(edges.centre, edges.envelope, num_atoms)
    destination, _ = _ranked(edges.neighbour, edges.envelope, num_atoms)
    return source, destination


def _ranked(row: Tensor, envelope: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """Slots of the edges of each row, 1 and up, by ascending envelope; the table `(N, K - 1)` of edges."""
    by_row = row.argsort(stable=True)
    table = row_table(row[by_row], num_atoms)
    places = torch.cat([by_row, by_row.new_full((1,), len(row))])[table]
    known = torch.cat([envelope.detach(), envelope.new_full((1,), torch.inf)])[places]
    table = places.gather(1, known.argsort(dim=1, stable=True))
    slots = torch.empty(len(row) + 1, dtype=torch.long, device=row.device)
    slots[table] = torch.arange(1, table.shape[1] + 1, device=row.device).expand_as(table)
    return slots[:-1], table


def _filled(edges: Edges, table: Tensor, num_atoms: int) -> Neighbours:
    own = torch.arange(num_atoms, device=table.device)[:, None]
    used = table < len(edges.centre)
    neighbour = torch.cat([edges.neighbour, edges.neighbour.new_zeros(1)])[table]
    vectors = torch.cat([edges.vectors, edges.vectors.new_zeros(1, 3)])[table]
    nobody = edges.pair.amax(0, keepdim=True) + 1 if len(edges.pair) else edges.pair.new_zeros(1)
    pair = torch.cat([edges.pair, nobody])[table]
    return Neighbours(
        torch.cat([own, torch.where(used, neighbour, own)], 1),
        torch.cat([torch.ones_like(own, dtype=torch.bool), used], 1),
        torch.cat([vectors.new_zeros(num_atoms, 1, 3), vectors], 1),
        _envelopes(edges, table),
        torch.cat([nobody.expand(num_atoms, 1), pair], 1),
    )


def _envelopes(edges: Edges, table: Tensor) -> Tensor:
    envelope = torch.cat([edges.envelope, edges.envelope.new_full((1,), torch.inf)])[table]
    return torch.cat([envelope.new_zeros(len(table), 1), envelope], 1)
