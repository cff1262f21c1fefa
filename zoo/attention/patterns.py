"""Patterns: which keys a query sees.

A pattern says it twice. `rule(nq, nk)` is the definition: a predicate on (batch, head, query, key) indices,
from which the reference backend makes its dense mask and flex_attention its block mask. `cut` and `join` are
the cheap way: they break the problem into tiles, small dense problems of one size, so that no N x N tensor is
made where few keys are seen.

Shapes: B batch, H heads, Hk key/value heads, N tokens, D head width; T tiles of nq queries and nk keys each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import and_
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.errors import AttentionError

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Index(NamedTuple):
    """Where the queries and keys of T tiles come from; -1 marks a place that holds no token."""

    b: Tensor  # (T, 1)
    i: Tensor  # (T, nq), or (1, nq)
    j: Tensor  # (T, nk), or (1, nk)

    def allowed(self, rule: Rule) -> Tensor:
        """Bool `(T, 1, nq, nk)`, or with 1 where the rule does not depend on an axis; True = attend."""
        head = torch.zeros((), dtype=torch.long, device=self.b.device)
        return rule(self.b[:, :, None], head, self.i[:, :, None], self.j[:, None, :])[:, None]


class Tile(NamedTuple):
    """A dense problem: q `(T, H, nq, D)`, k, v `(T, Hk, nk, D)`. Without index: the whole problem, T = B."""

    q: Tensor
    k: Tensor
    v: Tensor
    index: Index | None = None
    ragged: bool = False  # some keys of the index are -1


def whole(batch: int, nq: int, nk: int, device: torch.device) -> Index:
    """The index of the whole problem as one tile per batch entry."""
    b, i, j = (torch.arange(n, device=device) for n in (batch, nq, nk))
    return Index(b[:, None], i[None], j[None])


class Pattern:
    """Every query sees every key; subclasses narrow that. `a & b` sees what both see."""

    tiled = False
    ordered = False
    """In its tiles, queries and keys are the same tokens in their order, places without a token last."""
    by_index = True
    """`tile_mask` reads the index of a tile and nothing else of it: any of its rows are a tile as well."""

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        """Raises `AttentionError` where the pattern does not fit tensors of these sizes."""

    def rule(self, nq: int, nk: int) -> Rule | None:
        """The definition, on broadcastable index tensors; None = everything is seen."""
        return None

    def tile_rule(self, nq: int, nk: int) -> Rule | None:
        """What is left of the rule to apply inside the tiles of `cut`."""
        return self.rule(nq, nk)

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        """The tiles that together compute every row of the output."""
        return [Tile(q, k, v)]

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        """Tile outputs `(T, H, nq, Dv)` to `(B, H, Nq, Dv)`."""
        return parts[0]

    def mask(self, batch: int, nq: int, nk: int, device: torch.device) -> Tensor | None:
        """Bool, broadcastable to `(B, 1, Nq, Nk)`, True = attend: the whole pattern as a dense mask."""
        rule = self.rule(nq, nk)
        return None if rule is None else whole(batch, nq, nk, device).allowed(rule)

    def tile_mask(self, tile: Tile, batch: int, nq: int, nk: int) -> Tensor | None:
        """Bool, broadcastable to `(T, 1, nq, nk)`, for one tile of a problem of Nq queries and Nk keys."""
        if tile.index is None:
            return self.mask(batch, nq, nk, tile.q.device)
        rule = self.tile_rule(nq, nk)
        present = (tile.index.j >= 0)[:, None, None, :] if tile.ragged else None
        if rule is None:
            return present
        allowed = tile.index.allowed(rule)
        return allowed if present is None else allowed & present

    def causal_tiles(self, nq: int, nk: int) -> bool:
        """Whether a query of a tile sees its keys up to its own place in it: what kernels do without mask."""
        return False

    def causal_keys(self, tile: Tile, nq: int, nk: int) -> Tensor | None:
        """Bool `(T or 1, 1, 1, nk)`, where a query of a tile sees just those of these keys up to its own
        place in it."""
        return None

    def to(self, device: torch.device | str) -> Pattern:
        """The same pattern with its tensors on `device`."""
        return self

    def __and__(self, other: Pattern) -> Pattern:
        return Both(self, other)


class Dense(Pattern):
    """Every query sees every key."""

    def __repr__(self) -> str:
        return "Dense()"


class Causal(Pattern):
    """A query sees the keys up to its own place.

    Cross lengths are aligned bottom-right: the last query sees the last key (SDPA aligns top-left).
    """

    def rule(self, nq: int, nk: int) -> Rule | None:
        if nq == 1:
            return None
        return lambda b, h, i, j: j <= i + (nk - nq)

    def causal_tiles(self, nq: int, nk: int) -> bool:
        return nq == nk

    def __repr__(self) -> str:
        return "Causal()"


class Padding(Pattern):
    """Only real keys are seen.

    Args:
        mask: bool `(B, Nk)` or `(1, Nk)`, True = attend, as in SDPA (not as in `nn.MultiheadAttention`).
    """

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool:
            raise AttentionError(f"a key mask is bool with True = attend, not {mask.dtype}")
        if mask.ndim != 2:
            raise AttentionError(f"a key mask has shape (B, Nk), not {tuple(mask.shape)}")
        self.keys = mask

    @classmethod
    def from_lengths(cls, lengths: Tensor, num_keys: int) -> Padding:
        """From the number of real keys `(B,)` of each batch entry; real keys stand first."""
        return cls(torch.arange(num_keys, device=lengths.device) < lengths[:, None])

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if tuple(self.keys.shape) not in ((batch, nk), (1, nk)):
            raise AttentionError(f"key mask {tuple(self.keys.shape)} does not fit B = {batch}, Nk = {nk}")
        same_device("key mask", self.keys, device)

    def rule(self, nq: int, nk: int) -> Rule:
        keys = self.keys
        if len(keys) == 1:
            return lambda b, h, i, j: keys[0][j]
        return lambda b, h, i, j: keys[b, j]

    def to(self, device: torch.device | str) -> Padding:
        return Padding(self.keys.to(device))

    def __repr__(self) -> str:
        return f"Padding({tuple(self.keys.shape)})"


class Window(Pattern):
    """A sliding window over one axis, cut at its ends, in memory linear in N.

    Args:
        size: number of keys a query sees. Causal: itself and the `size - 1` before it. Otherwise odd: itself
            and `(size - 1) / 2` on each side.
        causal: look back only.

    With more keys than queries, the last query stands at the last key.
    """

    tiled = True
    by_index = False

    def __init__(self, size: int, *, causal: bool = False) -> None:
        if size < 1 or not (causal or size % 2):
            raise AttentionError(f"a window has a positive size, odd unless causal, not {size}")
        self.size = size
        self.left = size - 1 if causal else (size - 1) // 2
        self.right = size - 1 - self.left

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if self.size > nk:
            raise AttentionError(f"window of {self.size} is larger than the axis of {nk} keys")
        if nq > nk:
            raise AttentionError(f"a window needs a key for each query, but Nq = {nq} > Nk = {nk}")

    def rule(self, nq: int, nk: int) -> Rule:
        offset, left, right = nk - nq, self.left, self.right
        return lambda b, h, i, j: (j >= i + (offset - left)) & (j <= i + (offset + right))

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        batch, nq, nk = q.shape[0], q.shape[2], k.shape[2]
        block = self._block(nq)
        blocks = -(-nq // block)
        index = self._index(batch, nq, nk, block, q.device)
        at = index.j[:blocks].clamp(min=0).flatten()

        def spans(x: Tensor) -> Tensor:
            x = x.transpose(1, 2).index_select(1, at)  # its backward is faster than that of `unfold`
            return x.unflatten(1, (blocks, -1)).flatten(0, 1).transpose(1, 2)

        rows = F.pad(q.transpose(1, 2), (0, 0, 0, 0, 0, blocks * block - nq)).unflatten(1, (blocks, block))
        return [Tile(rows.flatten(0, 1).transpose(1, 2), spans(k), spans(v), index, ragged=True)]

    def tile_mask(self, tile: Tile, batch: int, nq: int, nk: int) -> Tensor:
        assert tile.index is not None
        _, i, j = tile.index
        # The key in column c of a tile stands `c - r - left` places after the query in row r.
        ahead = torch.arange(j.shape[1], device=j.device) - torch.arange(i.shape[1], device=j.device)[:, None]
        band = (ahead >= 0) & (ahead < self.size)
        return (band & (j >= 0)[:, None])[:, None]

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        rows = parts[0].transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2)
        return rows[:, :nq].transpose(1, 2)

    def _block(self, nq: int) -> int:
        """Queries per tile: many waste products outside of the window, few repeat its keys in memory."""
        return min(max(self.size // 2, 32), 256, nq)

    def _index(self, batch: int, nq: int, nk: int, block: int, device: torch.device) -> Index:
        starts = torch.arange(0, nq, block, device=device)[:, None]
        i = starts + torch.arange(block, device=device)
        j = starts + torch.arange(block + self.size - 1, device=device) + (nk - nq - self.left)
        i = i.masked_fill(i >= nq, -1)
        j = j.masked_fill((j < 0) | (j >= nk), -1)
        b = torch.arange(batch, device=device).repeat_interleave(len(starts))[:, None]
        return Index(b, i.repeat(batch, 1), j.repeat(batch, 1))

    def __repr__(self) -> str:
        return f"Window({self.size}, causal={self.right == 0})"


class EqualGroups(Pattern):
    """Consecutive tokens in groups of `size`; a query sees its own group. A reshape."""

    tiled = ordered = True

    def __init__(self, size: int) -> None:
        if size < 1:
            raise AttentionError(f"a group has at least one member, not {size}")
        self.size = size

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if nq != nk or nq % self.size:
            raise AttentionError(
                f"groups of {self.size} need Nq = Nk divisible by it, not Nq = {nq}, Nk = {nk}"
            )

    def rule(self, nq: int, nk: int) -> Rule:
        return lambda b, h, i, j: i // self.size == j // self.size

    def tile_rule(self, nq: int, nk: int) -> None:
        return None

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        def groups(x: Tensor) -> Tensor:
            return x.transpose(1, 2).unflatten(1, (-1, self.size)).flatten(0, 1).transpose(1, 2)

        batch, nq = q.shape[0], q.shape[2]
        members = torch.arange(nq, device=q.device).view(-1, self.size).repeat(batch, 1)
        b = torch.arange(batch, device=q.device).repeat_interleave(nq // self.size)[:, None]
        return [Tile(groups(q), groups(k), groups(v), Index(b, members, members))]

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        return parts[0].transpose(1, 2).unflatten(0, (batch, -1)).flatten(1, 2).transpose(1, 2)

    def __repr__(self) -> str:
        return f"EqualGroups({self.size})"


class Both(Pattern):
    """Keys that both patterns allow, cut as the tiled one of the two is."""

    def __init__(self, first: Pattern, second: Pattern) -> None:
        self.leader, self.other = (first, second) if first.tiled or not second.tiled else (second, first)
        self.tiled, self.by_index = self.leader.tiled, self.leader.by_index

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        self.leader.check(batch, nq, nk, device)
        self.other.check(batch, nq, nk, device)

    def rule(self, nq: int, nk: int) -> Rule | None:
        return _conjunction(self.leader.rule(nq, nk), self.other.rule(nq, nk))

    def tile_mask(self, tile: Tile, batch: int, nq: int, nk: int) -> Tensor | None:
        if tile.index is None:
            return self.mask(batch, nq, nk, tile.q.device)
        first, rule = self.leader.tile_mask(tile, batch, nq, nk), self.other.rule(nq, nk)
        if rule is None:
            return first
        allowed = tile.index.allowed(rule)
        return allowed if first is None else allowed & first

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        return self.leader.cut(q, k, v)

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        return self.leader.join(parts, batch, nq)

    def causal_tiles(self, nq: int, nk: int) -> bool:
        return self.leader.ordered and isinstance(self.other, Causal) and nq == nk

    def causal_keys(self, tile: Tile, nq: int, nk: int) -> Tensor | None:
        parts = _parts(self)
        padding = [part for part in parts if isinstance(part, Padding)]
        rest = [part for part in parts if not isinstance(part, Padding)]
        if not padding or not rest or not reduce(and_, rest).causal_tiles(nq, nk):
            return None
        index = tile.index
        return reduce(
            and_, (p.keys[:, None, None] if index is None else index.allowed(p.rule(nq, nk)) for p in padding)
        )

    def to(self, device: torch.device | str) -> Both:
        return Both(self.leader.to(device), self.other.to(device))

    def __repr__(self) -> str:
        return f"{self.leader} & {self.other}"


def _parts(pattern: Pattern) -> list[Pattern]:
    """Those that `pattern` is the conjunction of."""
    return [*_parts(pattern.leader), *_parts(pattern.other)] if isinstance(pattern, Both) else [pattern]


def _conjunction(first: Rule | None, second: Rule | None) -> Rule | None:
    if first is None or second is None:
        return first or second
    return lambda b, h, i, j: first(b, h, i, j) & second(b, h, i, j)


def same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raises where a tensor of a pattern does not lie beside the queries."""
    if tensor.device != device:
        raise AttentionError(
            f"{name} on {tensor.device}, queries on {device}: use pattern.to({str(device)!r})"
        )
