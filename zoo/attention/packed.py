"""Patterns given by token indices: groups by ids, and neighbour lists."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.errors import AttentionError
from zoo.attention.patterns import Index, Pattern, Rule, Tile, same_device


class Bucket(NamedTuple):
    """Tiles of one size, by token index into (batch of the pattern) x N, flattened; -1 = no token."""

    queries: Tensor  # (T, nq)
    keys: Tensor  # (T, nk)
    ragged: bool


class Packed(Pattern):
    """A pattern given by token indices: the tiles are gathered, computed, and put back.

    Tiles are kept in buckets of similar size (within a factor of two), so that one large group or one busy
    node does not pad all the others. The plan is made with the pattern: once, and outside of `torch.compile`.
    """

    tiled = True
    name: str
    plan: list[Bucket]
    batch: int | None  # None: the same for every batch entry
    tokens: int

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if nq != nk or nq != self.tokens:
            raise AttentionError(f"{self.name} of {self.tokens} tokens do not fit Nq = {nq}, Nk = {nk}")
        if self.batch not in (None, batch):
            raise AttentionError(f"{self.name} of {self.batch} batch entries do not fit B = {batch}")
        same_device(self.name, self.plan[0].queries, device)

    def tile_rule(self, nq: int, nk: int) -> None:
        return None

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B N, H, D)
        tiles = []
        for bucket in self._batched(q.shape[0] // self.tokens):
            i, j = (torch.where(at < 0, -1, at % self.tokens) for at in (bucket.queries, bucket.keys))
            index = Index(bucket.queries.amax(1, keepdim=True) // self.tokens, i, j)
            rows = _gather(q, bucket.queries), _gather(k, bucket.keys), _gather(v, bucket.keys)
            tiles.append(Tile(*rows, index, bucket.ragged))
        return tiles

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        rows = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])  # (T nq, H, Dv)
        at = torch.cat([bucket.queries.flatten() for bucket in self._batched(batch)])
        # Places without a token write to one further row, which is dropped.
        out = rows.new_empty((batch * nq + 1, *rows.shape[1:]))
        out = out.index_copy(0, torch.where(at < 0, batch * nq, at), rows)
        return out[:-1].unflatten(0, (batch, nq)).transpose(1, 2)

    def _batched(self, batch: int) -> list[Bucket]:
        """The plan for the whole batch: as it is, or repeated with an offset for each entry."""
        single = not torch.compiler.is_compiling() and batch == 1  # an export is for batches of any size
        if self.batch is not None or single:
            return self.plan
        return [
            Bucket(self._repeat(b.queries, batch), self._repeat(b.keys, batch), b.ragged) for b in self.plan
        ]

    def _repeat(self, table: Tensor, batch: int) -> Tensor:
        offset = torch.arange(batch, device=table.device)[:, None, None] * self.tokens
        return torch.where(table < 0, -1, table + offset).flatten(0, 1)


def _gather(x: Tensor, at: Tensor) -> Tensor:
    """Rows of x `(tokens, H, D)` at `(T, n)` as `(T, H, n, D)`; a place without a token gets some row."""
    return x.index_select(0, at.clamp(min=0).flatten()).unflatten(0, at.shape).transpose(1, 2)


class Groups(Packed):
    """Tokens with equal ids see each other; groups may have any sizes and any order.

    Args:
        ids: integers `(N,)` for the whole batch, or `(B, N)`.
    """

    name = "groups"
    ordered = True

    def __init__(self, ids: Tensor) -> None:
        if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise AttentionError(f"group ids are integers (N,) or (B, N), not {ids.dtype} {tuple(ids.shape)}")
        self.ids = ids
        self.batch = len(ids) if ids.ndim == 2 else None
        self.tokens = ids.shape[-1]
        if not ids.numel():
            raise AttentionError("there are no tokens to group")
        self.plan = _group_plan(ids.view(self.batch or 1, self.tokens))

    def rule(self, nq: int, nk: int) -> Rule:
        ids = self.ids
        if self.batch is None:
            return lambda b, h, i, j: ids[i] == ids[j]
        return lambda b, h, i, j: ids[b, i] == ids[b, j]

    def to(self, device: torch.device | str) -> Groups:
        return Groups(self.ids.to(device))

    def __repr__(self) -> str:
        return f"Groups({tuple(self.ids.shape)})"


def _group_plan(ids: Tensor) -> list[Bucket]:
    """`ids` (B or 1, N); members stand in ascending order."""
    names = ids.unique(return_inverse=True)[1]
    entry = torch.arange(len(ids), device=ids.device)[:, None]
    group = (names + entry * ids.numel()).flatten().unique(return_inverse=True)[1]
    members, counts = group.argsort(stable=True), group.bincount()
    starts = counts.cumsum(0) - counts
    plan = []
    for groups, width in _buckets(counts):
        rank = torch.arange(width, device=ids.device)
        at = (starts[groups, None] + rank).clamp(max=len(members) - 1)
        table = torch.where(rank < counts[groups, None], members[at], -1)
        plan.append(Bucket(table, table, bool((table < 0).any())))
    return plan


class OrderedGroups(Packed):
    """Groups of tokens that follow each other in another order than their own; the last may be smaller.

    Args:
        order: a permutation `(N,)`: which token is first, second, ...
        size: tokens in a group.
    """

    name = "ordered groups"
    ordered = True
    batch = None

    def __init__(self, order: Tensor, size: int) -> None:
        if order.ndim != 1 or order.is_floating_point() or not order.numel():
            raise AttentionError(f"an order is a permutation (N,), not {order.dtype} {tuple(order.shape)}")
        if size < 1:
            raise AttentionError(f"a group has at least one member, not {size}")
        self.order, self.size, self.tokens = order, size, len(order)
        missing = -self.tokens % size
        rows = F.pad(order, (0, missing), value=self.tokens).view(-1, size).sort(-1).values
        rows = rows.masked_fill(rows == self.tokens, -1)
        self.plan = [Bucket(rows, rows, bool(missing))]

    def rule(self, nq: int, nk: int) -> Rule:
        group = self.order.argsort() // self.size
        return lambda b, h, i, j: group[i] == group[j]

    def to(self, device: torch.device | str) -> OrderedGroups:
        return OrderedGroups(self.order.to(device), self.size)

    def __repr__(self) -> str:
        return f"OrderedGroups({self.tokens}, size={self.size})"


class ShiftedGroups(Packed):
    """Consecutive tokens in groups of `size`, the first of which has but `shift`; a query sees its own group.

    Args:
        tokens: N; the last group has what is left.
        size, shift: `0 <= shift < size`.
        device: as that of the queries.
    """

    name = "shifted groups"
    ordered = True
    batch = None

    def __init__(self, tokens: int, size: int, shift: int, device: torch.device | str | None = None) -> None:
        if tokens < 1 or not 0 <= shift < size:
            raise AttentionError(
                f"groups of {size} tokens are shifted by 0 .. {size - 1}, and hold a token at least: not "
                f"{tokens} tokens shifted by {shift}"
            )
        self.tokens, self.size, self.shift = tokens, size, shift
        place = torch.arange(tokens, device=device)
        end = shift + max(tokens - shift, 0) // size * size
        ends = [part for part in (place[:shift], place[end:]) if len(part)]
        tables = [place[shift:end].view(-1, size)] if end > shift else []
        if ends:
            width = max(len(part) for part in ends)
            tables.append(torch.stack([F.pad(part, (0, width - len(part)), value=-1) for part in ends]))
        self.plan = [Bucket(table, table, ragged=True) for table in tables]

    def rule(self, nq: int, nk: int) -> Rule:
        size, shift = self.size, self.shift
        return lambda b, h, i, j: (i - shift) // size == (j - shift) // size

    def to(self, device: torch.device | str) -> ShiftedGroups:
        return ShiftedGroups(self.tokens, self.size, self.shift, device)

    def __repr__(self) -> str:
        return f"ShiftedGroups({self.tokens}, {self.size}, {self.shift})"


class Neighbours(Packed):
    """A neighbour list: a query sees the tokens listed for it, in memory linear in the number of pairs.

    Args:
        index: integers `(N, K)` for the whole batch, or `(B, N, K)`; -1 fills up rows. A token sees itself
            only where it is listed; a token with no neighbour gets zeros.

    Raises:
        AttentionError: an index that names no token, or one neighbour twice in a row.
    """

    name = "neighbour lists"

    def __init__(self, index: Tensor) -> None:
        if index.ndim not in (2, 3) or index.is_floating_point() or index.dtype == torch.bool:
            raise AttentionError(
                f"neighbours are integers (N, K) or (B, N, K), not {index.dtype} {tuple(index.shape)}"
            )
        self.batch = len(index) if index.ndim == 3 else None
        self.tokens = index.shape[-2]
        if not index.shape[-1]:
            raise AttentionError("neighbour lists need room for at least one neighbour: fill up with -1")
        if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < self.tokens:
            raise AttentionError(f"neighbour indices must lie in -1 .. {self.tokens - 1}")
        index = index.sort(-1).values
        twice = (index[..., 1:] == index[..., :-1]) & (index[..., 1:] >= 0)
        if twice.any():
            row = twice.nonzero()[0].tolist()
            raise AttentionError(f"token {row[-2]} lists neighbour {int(index[..., 1:][tuple(row)])} twice")
        self.index = index
        self.plan = _neighbour_plan(index.view(self.batch or 1, self.tokens, index.shape[-1]))

    @classmethod
    def from_edges(cls, edges: Tensor, num_nodes: int) -> Neighbours:
        """From `edge_index` `(2, E)` of (source, target): the target sees the source (the flow of PyG)."""
        if edges.ndim != 2 or len(edges) != 2:
            raise AttentionError(f"edges have shape (2, E), not {tuple(edges.shape)}")
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < num_nodes:
            raise AttentionError(f"edges must name nodes 0 .. {num_nodes - 1}")
        source, target = edges[:, edges[1].argsort(stable=True)]
        counts = target.bincount(minlength=num_nodes)
        rank = torch.arange(len(target), device=edges.device) - (counts.cumsum(0) - counts)[target]
        index = edges.new_full((num_nodes, max(1, int(counts.max()))), -1)
        index[target, rank] = source
        return cls(index)

    def rule(self, nq: int, nk: int) -> Rule:
        index = self.index
        if self.batch is None:
            return lambda b, h, i, j: (index[i] == j[..., None]).any(-1)
        return lambda b, h, i, j: (index[b, i] == j[..., None]).any(-1)

    def to(self, device: torch.device | str) -> Neighbours:
        return Neighbours(self.index.to(device))

    def __repr__(self) -> str:
        return f"Neighbours({tuple(self.index.shape)})"


def _neighbour_plan(index: Tensor) -> list[Bucket]:
    """`index` (B or 1, N, K), each row ascending: the -1 stand first. A token alone gets one masked place."""
    batch, tokens, _ = index.shape
    offset = torch.arange(batch, device=index.device)[:, None, None] * tokens
    flat = torch.where(index < 0, -1, index + offset).flatten(0, 1)
    plan = []
    for rows, width in _buckets((flat >= 0).sum(-1).clamp(min=1)):
        keys = flat[rows, flat.shape[1] - width :]
        plan.append(Bucket(rows[:, None], keys, bool((keys < 0).any())))
    return plan


def _buckets(sizes: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of sizes up to the same power of two, and their largest size."""
    exponent = sizes.double().log2().ceil()
    rows = [(exponent == e).nonzero()[:, 0] for e in exponent.unique()]
    return [(row, int(sizes[row].max())) for row in rows]
