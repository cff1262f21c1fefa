"""Selection: each query picks blocks of keys, or single keys, and attends to those alone.

`select` turns scores into indices, `attend_blocks` attends to what they name. Indices are int64 `(..., S)`,
ascending, with -1 in places that stay free.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.attention.attend import attend
from zoo.attention.capture import recorder
from zoo.attention.errors import AttentionError
from zoo.attention.merge import merge
from zoo.attention.patterns import Causal, Dense, Padding, Pattern, Rule

ROWS = 512
"""Queries whose scores with all keys are in memory at once."""
GATHERED = 2**22
"""Numbers of keys and values that are gathered at a time for each batch entry: 16 MiB in float32."""


@torch.no_grad()
def select(scores: Tensor, k: int, forced: Tensor | None = None) -> Tensor:
    """Indices `(..., k)` of the k largest scores `(..., M)` of each row; equal scores: the lower index first.

    Args:
        scores: -inf = may not be selected. They get no gradient.
        k: with fewer than k candidates, the places left over hold -1; k > M warns.
        forced: bool, broadcastable to the scores: selected before all others, whatever they score.

    Returns:
        Ascending indices, the -1 last.
    """
    if k < 1:
        raise AttentionError(f"select takes k >= 1, not {k}")
    size = scores.shape[-1]
    if k > size:
        warnings.warn(f"{k} of {size} candidates to select: all are, the other places are -1", stacklevel=2)
        return F.pad(select(scores, size, forced), (0, k - size), value=-1)
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    best = scores.topk(k, dim=-1)
    threshold = best.values[..., -1:]
    above = best.values > threshold
    # `topk` takes any of those that score as much as the last; here, the lowest come first, then `size`.
    backward = torch.arange(size, 0, -1, dtype=torch.int32, device=scores.device)
    level = (scores == threshold) & (threshold > -torch.inf)
    lowest = size - torch.where(level, backward, 0).topk(k, dim=-1).values.long()
    rank = torch.arange(k, device=scores.device) - above.sum(-1, keepdim=True)
    index = torch.where(above, best.indices, lowest.gather(-1, rank.clamp(min=0))).sort(-1).values
    return index.masked_fill(index == size, -1)


def select_up_to(scores: Tensor, k: int, forced: Tensor | None = None) -> Tensor:
    """`select` of k places, those that the candidates cannot fill holding -1."""
    index = select(scores, min(k, scores.shape[-1]), forced)
    return F.pad(index, (0, k - index.shape[-1]), value=-1)


def listed(index: Tensor, number: int) -> Tensor:
    """Bool `(..., number)`: which of so many candidates stand in the indices `(..., S)`."""
    at = torch.where(index < 0, number, index.clamp(max=number))  # the last column is dropped
    table = torch.zeros(*index.shape[:-1], number + 1, dtype=torch.bool, device=index.device)
    return table.scatter(-1, at, 1)[..., :number]


def by_rows(
    part: Callable[..., Tensor], *tensors: Tensor, keys: int, rows: int | None = None, causal: bool = True
) -> Tensor:
    """`part(*tensors, seen)` for some rows of queries at a time, so that what it needs stays small.

    The backward pass computes each part again. While a capture runs, all rows are one part.

    Args:
        part: to `(B, H, n, ...)`.
        tensors: `(B, H, Nq, ...)`; the last query stands at the last key.
        keys: Nk.
        rows: queries of a part; `ROWS` by default.
        causal: `seen` is the number of keys up to the last query of the part; else Nk.
    """
    nq, rows = tensors[0].shape[2], ROWS if rows is None else rows
    if nq <= rows or recorder() is not None:
        return part(*tensors, keys)
    seen = [keys - nq + min(start + rows, nq) if causal else keys for start in range(0, nq, rows)]
    pieces = zip(*(x.split(rows, 2) for x in tensors), seen, strict=True)
    run: Callable[..., Any] = part
    if torch.is_grad_enabled():
        run = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    parts: list[Any] = [run(*piece) for piece in pieces]
    return torch.cat(parts, 2)


def block_means(x: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """Means `(B, H, ceil(N / size), D)` of blocks of tokens `(B, H, N, D)`, over the real tokens of each.

    Args:
        mask: bool `(B, N)`, True = a real token; a block without any has the mean 0.
    """
    real = x.new_ones(1, x.shape[2]) if mask is None else mask.to(x.dtype)
    real = real[:, None, :, None]
    total = _blocks(x * real, size).sum(-2)
    return total / _blocks(real, size).sum(-2).clamp(min=1)


def gather_blocks(x: Tensor, index: Tensor, size: int = 1) -> Tensor:
    """Tokens `(B, H, N, S * size, D)` of the blocks that each query selected.

    Args:
        x: `(B, H, M, D)`, in blocks of `size` tokens; the last may be shorter, and is filled up with zeros.
        index: `(B, H, N, S)`; a place of -1 gets tokens of block 0.
    """
    blocks = _blocks(x, size)
    number = blocks.shape[2]
    rows = torch.arange(blocks.shape[0] * blocks.shape[1], device=x.device).view(*blocks.shape[:2], 1, 1)
    at = (rows * number + index.clamp(min=0)).flatten()
    return blocks.flatten(0, 2).index_select(0, at).view(*index.shape[:3], -1, x.shape[-1])


def _blocks(x: Tensor, size: int) -> Tensor:
    """`(..., N, D)` to `(..., ceil(N / size), size, D)`, filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).unflatten(-2, (-1, size))


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    size: int = 1,
    *,
    causal: bool = True,
    reach: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of each query to the blocks of keys that it selected: one softmax over all their tokens.

    There are three forms, all in memory linear in N. *Dense* is the definition: -inf is added to the scores
    of what was not selected, for some hundred queries at a time. *Gathered* copies the keys of each query,
    which pays for few queries and for few tokens. *By block* copies the queries of each block, and merges
    what a query found in its blocks by the log-sum-exp, as Flash Sparse Attention does (arXiv 2508.18224).

    Args:
        q: `(B, H, Nq, D)`; the last query stands at the last key.
        k: `(B, Hk, Nk, D)`.
        v: `(B, Hk, Nk, Dv)`.
        index: of `select`, `(B, I, Nq, S)`, none twice: for each query head (I = H), or for each of I groups
            of key/value heads (I divides Hk; I = 1: one selection for all).
        size: tokens per block.
        causal: see no later keys, in whatever block.
        reach: `(B, I, Nq, 2)`, the first and the last key that a query sees, in place of `causal`.
        mask: bool `(B, Nk)`, True = a real key.
        scale: `D ** -0.5` by default.

    Returns:
        `(B, H, Nq, Dv)`; zeros where nothing is selected.
    """
    _check(q, k, index, mask)
    heads, selecting = q.shape[1], index.shape[1]
    options = _Options(size, causal and reach is None, reach is not None, mask, scale)
    if reach is not None and (reach.dtype, reach.shape) != (torch.int64, (*index.shape[:3], 2)):
        raise AttentionError(
            f"reach is int64 {(*index.shape[:3], 2)}, first and last keys, not {reach.dtype} "
            f"{tuple(reach.shape)}"
        )
    ends = (_reach(q, k, causal) if reach is None else reach).expand(len(q), selecting, -1, -1)
    if recorder() is not None:  # one map of all heads
        index, ends = (x.repeat_interleave(heads // selecting, 1) for x in (index, ends))
        return _among_all(q, k, v, index, ends, options)
    # Heads that select for themselves are problems of their own.
    groups = min(selecting, k.shape[1])
    q, k, v, index, ends = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (q, k, v, index, ends))
    if mask is not None:
        options = options._replace(mask=mask.repeat_interleave(groups, 0))
    out = _form(q, k, index, size)(q, k, v, index, ends, options)
    return out.unflatten(0, (-1, groups)).flatten(1, 2)


def attend_shared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    rows: int,
    size: int = 1,
    causal: bool = True,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attend_blocks` where the queries of a block share what they selected: a few dense products.

    Blocks of queries are counted from the first key too, so that the first and the last may be cut. What is
    gathered at a time stays small; the backward pass gathers it again.

    Args:
        q, k, v, size, causal, mask, scale: as for `attend_blocks`.
        index: `(B or 1, I, R, S)` for the R blocks that hold the queries.
        rows: queries of a block.
    """
    before = (k.shape[2] - q.shape[2]) % rows
    blocks = -(-(before + q.shape[2]) // rows)
    if index.shape[2] != blocks:
        raise AttentionError(f"{q.shape[2]} queries lie in {blocks} blocks of {rows}, not {index.shape[2]}")
    index = index.expand(len(q), -1, -1, -1)
    if q.shape[2] < rows // 4 or recorder() is not None:
        index = index.repeat_interleave(rows, 2)[:, :, before : before + q.shape[2]]
        return attend_blocks(q, k, v, index, size, causal=causal, mask=mask, scale=scale)
    groups, selecting = min(index.shape[1], k.shape[1]), index.shape[1]
    tiles = F.pad(q, (0, 0, before, blocks * rows - before - q.shape[2])).unflatten(2, (blocks, rows))
    tiles, k, v, index = (x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (tiles, k, v, index))
    mask = None if mask is None else mask.repeat_interleave(groups, 0)
    place = torch.arange(blocks * rows, device=q.device) + (k.shape[2] - q.shape[2] - before)
    place = place if causal else torch.full_like(place, k.shape[2])
    options = _Options(size, causal, False, mask, scale)

    def part(tiles: Tensor, index: Tensor, place: Tensor, _seen: int) -> Tensor:
        return _shared_tiles(tiles, k, v, index, place[0, 0], options)

    gathered = k.shape[1] * max(1, selecting // groups) * index.shape[-1] * size * (q.shape[-1] + v.shape[-1])
    out = by_rows(
        part, tiles, index, place.view(1, 1, blocks, rows), keys=blocks, rows=max(1, GATHERED // gathered)
    )
    out = out.unflatten(0, (-1, groups)).flatten(1, 2).flatten(2, 3)
    return out[:, :, before : before + q.shape[2]]


def _shared_tiles(q: Tensor, k: Tensor, v: Tensor, index: Tensor, place: Tensor, options: _Options) -> Tensor:
    """Blocks of queries `(B, H, R, n, D)` that stand at `place` `(R, n)`, with index `(B, I, R, S)`."""
    shape, size, nk = q.shape[:4], options.size, k.shape[2]
    q, index = _heads_as_tokens(q, index)
    tiles, place = index.shape[1], place.repeat(index.shape[1] // len(place), 1)
    at = index[..., None] * size + torch.arange(size, device=q.device)
    at = at.masked_fill((index[..., None] < 0) | (at >= nk), -1).flatten(2)
    if options.mask is not None:
        real = options.mask.gather(1, at.clamp(min=0).flatten(1)).view(at.shape)
        at = at.masked_fill(~real, -1)
    shared = index[:, None].expand(-1, k.shape[1], -1, -1)
    keys, values = (gather_blocks(x, shared, size).transpose(1, 2).flatten(0, 1) for x in (k, v))
    pattern = Standing(place.repeat(len(q), 1), at.flatten(0, 1))
    queries = q.transpose(1, 2).flatten(0, 1)
    out = attend(queries, keys, values, pattern=pattern, scale=options.scale)
    return out.unflatten(0, (-1, tiles)).transpose(1, 2).reshape(*shape, -1)


def _check(q: Tensor, k: Tensor, index: Tensor, mask: Tensor | None) -> None:
    if index.dtype != torch.int64:
        raise AttentionError(f"selected blocks are int64, not {index.dtype}")
    if index.ndim != 4 or (index.shape[0], index.shape[2]) != (q.shape[0], q.shape[2]):
        raise AttentionError(
            f"selected blocks are (B, I, Nq, S) with B, Nq as in q {tuple(q.shape)}, not {tuple(index.shape)}"
        )
    selecting, heads, shared = index.shape[1], q.shape[1], k.shape[1]
    if selecting not in (heads, shared) and shared % selecting:
        raise AttentionError(
            f"selections of {selecting} heads fit neither {heads} query nor {shared} key heads"
        )
    if mask is not None:
        Padding(mask).check(len(q), q.shape[2], k.shape[2], q.device)


class _Options(NamedTuple):
    """Of `attend_blocks`. The forms take index `(B, I, Nq, S)` with I = 1, or with I = H and Hk = 1, and the
    first and the last key that queries see, `(B, I, Nq, 2)`."""

    size: int
    causal: bool
    reaching: bool  # what a query sees is not given by its place
    mask: Tensor | None
    scale: float | None


_Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, _Options], Tensor]


def _form(q: Tensor, k: Tensor, index: Tensor, size: int) -> _Form:
    """The fastest form by what each costs for a query and a key/value head, in products of a dense tile.

    Measured on CPU in float32, forward and backward, with 1,024 to 4,096 tokens of width 64: to gather a key
    costs 100 products however many heads share it, to read a block by block 400 for each head that does.
    """
    nq, nk, slots = q.shape[2], k.shape[2], index.shape[-1]
    sharing = q.shape[1] // k.shape[1] if index.shape[1] == 1 else 1
    dense, gathered, by_block = nk * sharing, 100 * slots * size, 400 * slots * sharing
    if nq < 16:  # decoding: what counts is how many keys are read
        return _gathered if nk > 4 * slots * size else _dense
    if dense <= min(gathered, by_block):
        return _dense
    return _gathered if gathered <= by_block else _by_block


def _dense(q: Tensor, k: Tensor, v: Tensor, index: Tensor, reach: Tensor, options: _Options) -> Tensor:
    def part(q: Tensor, index: Tensor, reach: Tensor, seen: int) -> Tensor:
        mask = None if options.mask is None else options.mask[:, :seen]
        return _among_all(q, k[:, :, :seen], v[:, :, :seen], index, reach, options._replace(mask=mask))

    return by_rows(part, q, index, reach, keys=k.shape[2], causal=options.causal)


def _among_all(q: Tensor, k: Tensor, v: Tensor, index: Tensor, reach: Tensor, options: _Options) -> Tensor:
    """The definition."""
    nk = k.shape[2]
    chosen = listed(index, -(-nk // options.size)).repeat_interleave(options.size, -1)[..., :nk]
    if options.reaching:
        place = torch.arange(nk, device=q.device)
        chosen = chosen & (place >= reach[..., :1]) & (place <= reach[..., 1:])
    bias = q.new_zeros(chosen.shape).masked_fill(~chosen, -torch.inf)
    pattern = Causal() if options.causal else Dense()
    if options.mask is not None:
        pattern = pattern & Padding(options.mask)
    return attend(q, k, v, pattern=pattern, bias=bias, scale=options.scale)


def _gathered(q: Tensor, k: Tensor, v: Tensor, index: Tensor, reach: Tensor, options: _Options) -> Tensor:
    size, shared, nk = options.size, k.shape[1], k.shape[2]

    def part(q: Tensor, index: Tensor, reach: Tensor, _seen: int) -> Tensor:
        shape, (first, last) = q.shape[:3], reach.flatten(1, 2)[..., None].unbind(2)
        q, index = _heads_as_tokens(q, index)
        at = (index[..., None] * size + torch.arange(size, device=q.device)).flatten(2)
        visible = (at >= first) & (at <= last)
        if options.mask is not None:
            visible &= options.mask.gather(1, at.clamp(0, nk - 1).flatten(1)).view(at.shape)

        def tiles(x: Tensor) -> Tensor:  # (B, Hk, N, ...) to one problem for each query and key/value head
            return x.flatten(0, 2)[:, None]

        index, visible = (x[:, None].expand(-1, shared, -1, -1) for x in (index, visible))
        rows = tiles(q.unflatten(1, (shared, -1)).transpose(2, 3))
        keys, values = (tiles(gather_blocks(x, index, size)) for x in (k, v))
        out = attend(rows, keys, values, pattern=Padding(visible.flatten(0, 2)), scale=options.scale)
        return out.reshape(*index.shape[:3], -1, v.shape[-1]).transpose(2, 3).reshape(*shape, -1)

    rows = max(32, 2**16 // (index.shape[-1] * size * shared))
    return by_rows(part, q, index, reach, keys=nk, rows=rows, causal=options.causal)


def _reach(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """`(1, 1, Nq, 2)`: all keys, or those up to a query's place; the last query stands at the last key."""
    nq, nk = q.shape[2], k.shape[2]
    place = torch.arange(nk - nq, nk, device=q.device)
    last = place if causal else torch.full_like(place, nk - 1)
    return torch.stack([torch.zeros_like(last), last], -1)[None, None]


def _heads_as_tokens(q: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """q `(B, H, N, D)` and index `(B, N, S)`; heads that select for themselves make `(B, 1, H N, D)`."""
    if index.shape[1] > 1:
        q = q.flatten(1, 2)[:, None]
    return q, index.flatten(1, 2)


class Standing(Pattern):
    """Queries `(T, nq)` and keys `(T, nk)` stand at given places; a query sees the keys up to its own.

    Args:
        first: `(T, nq)`, the first place that a query sees; 0 by default, which leaves out keys at -1.
    """

    def __init__(self, queries: Tensor, keys: Tensor, first: Tensor | None = None) -> None:
        self.queries, self.keys = queries, keys
        self.first = torch.zeros_like(queries) if first is None else first

    def rule(self, nq: int, nk: int) -> Rule:
        queries, keys, first = self.queries, self.keys, self.first
        return lambda b, h, i, j: (keys[b, j] >= first[b, i]) & (keys[b, j] <= queries[b, i])


def _by_block(q: Tensor, k: Tensor, v: Tensor, index: Tensor, reach: Tensor, options: _Options) -> Tensor:
    size, nk, shape = options.size, k.shape[2], q.shape[:3]
    first, last = reach.flatten(0, 2).unbind(-1)
    q, index = _heads_as_tokens(q, index)
    keys = torch.arange(nk, device=q.device).expand(len(q), nk)
    keys = keys if options.mask is None else keys.masked_fill(~options.mask, -1)
    keys = F.pad(keys, (0, -nk % size), value=-1).unflatten(1, (-1, size))
    block, pair = _tiles(index, keys.shape[1])
    query = pair.clamp(min=0) // index.shape[-1]
    rows = q.transpose(1, 2).flatten(0, 1).index_select(0, query.flatten()).unflatten(0, pair.shape)
    tiles = (_blocks(x, size).transpose(1, 2).flatten(0, 1).index_select(0, block) for x in (k, v))
    places = keys.flatten(0, 1)[block]
    pattern = Standing(torch.where(pair < 0, -1, last[query]), places, first[query])
    out, lse = attend(rows.transpose(1, 2), *tiles, pattern=pattern, scale=options.scale, return_lse=True)

    # Places that hold no pair write to one further row, which is dropped.
    at = torch.where(pair < 0, index.numel(), pair).flatten()

    def by_query(x: Tensor, nothing: float) -> Tensor:  # (T, H, rows, ...) to (B, N, S, H, ...)
        x = x.transpose(1, 2).flatten(0, 1)
        found = x.new_full((index.numel() + 1, *x.shape[1:]), nothing).index_copy(0, at, x)
        return found[:-1].unflatten(0, index.shape)

    parts = zip(by_query(out, 0.0).unbind(2), by_query(lse, -torch.inf).unbind(2), strict=True)
    return merge(*parts)[0].transpose(1, 2).reshape(*shape, -1)


def _tiles(index: Tensor, number: int, rows: int = 64) -> tuple[Tensor, Tensor]:
    """The pairs of `index` `(B, Nq, S)` in tiles of one block each.

    The pairs stand in the order of their blocks, those of each block filled up to whole tiles: no more than
    `pairs / rows + blocks` tiles, a number that does not depend on the data.

    Returns:
        Blocks `(T,)`, counted through the batch with `number` each, and pairs `(T, rows)`, -1 = none.
    """
    batch, total = len(index), index.numel()
    blocks = index + torch.arange(batch, device=index.device)[:, None, None] * number
    blocks = torch.where(index < 0, batch * number, blocks).flatten()  # free places come last
    ordered, pairs = blocks.sort(stable=True)
    edges = torch.searchsorted(ordered, torch.arange(batch * number + 1, device=index.device))
    needed = -(-edges.diff() // rows)
    ends = needed.cumsum(0)
    tiles = -(-total // rows) + batch * number
    own = ordered.clamp(max=batch * number - 1)
    to = (ends - needed)[own] * rows + torch.arange(total, device=index.device) - edges[own]
    to = torch.where(ordered < batch * number, to, tiles * rows)
    table = index.new_full((tiles * rows + 1,), -1).scatter(0, to, pairs)[:-1].view(tiles, rows)
    owner = torch.searchsorted(ends, torch.arange(tiles, device=index.device), right=True)
    return owner.clamp(max=batch * number - 1), table
