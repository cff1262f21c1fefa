"""Backends: ways to compute the same attention.

| name | how | softmax only | log-sum-exp | device |
| --- | --- | --- | --- | --- |
| reference | the definition: one dense mask, explicit weights | no | yes | any |
| blocked | explicit weights, tile by tile, some rows of a large tile at a time | no | yes | any |
| sdpa | torch's fused kernels, tile by tile | yes | CPU | any |
| flex | `flex_attention` with the pattern as block mask | yes | yes | CUDA |

Unless one is forced, `sdpa` runs what it can and `blocked` the rest. Measured on two CPU cores in float32
against explicit products, forward and backward: 1.2x and 2.5x faster at 5,200 x 8 heads of 12 tokens, width 8
(0.07 and 0.16 s), 2.6x and 2.5x at 192 x 8 heads of 325 tokens (0.26 and 0.62 s); a boolean mask is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from zoo.attention.errors import AttentionError
from zoo.attention.fused import softmax_with_lse
from zoo.attention.kernels import Kernel, softmax
from zoo.attention.patterns import Causal, Index, Pattern, Tile, whole

SCORES = 2**20
"""Explicit scores that are in memory at once, where a tile has more: 4 MiB in float32.

Measured on one CPU core with 4 heads of 1,536 tokens, forward and backward: 2.2 times (grouped softmax), 1.4
times (stick-breaking) and once (softmax with a bias) as fast as the whole at once, though the backward pass
computes scores again; 2**18 and 2**22 are slower.
"""
LONG = 512
"""Tokens of a tile from which causal attention to padded rows does without a mask on a CPU.

Measured on one busy core with 8 heads of width 64, forward and backward: 1.17 times as fast at 1,024 tokens,
0.8 times at 256.
"""


class Problem(NamedTuple):
    """One checked call of `attend`: q `(B, H, Nq, D)`, k `(B, Hk, Nk, D)`, v `(B, Hk, Nk, Dv)`."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: Pattern
    bias: Tensor | None
    scale: float
    dropout: float
    kernel: Kernel
    return_lse: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.q.shape[0], self.q.shape[2], self.k.shape[2]


class Result(NamedTuple):
    """Of a tile: out `(T, H, nq, Dv)`, lse `(T, H, nq)`, weights and scores `(T, H, nq, nk)`."""

    out: Tensor
    lse: Tensor
    weights: Tensor
    scores: Tensor


def reference(p: Problem) -> tuple[Tensor, Tensor]:
    """The definition of every pattern and kernel, on the dense mask."""
    mask = p.pattern.mask(*p.sizes, p.q.device)
    result = explicit(Tile(p.q, p.k, p.v), mask, p.bias, p)
    return result.out, result.lse


def blocked(p: Problem) -> tuple[Tensor, Tensor]:
    """Explicit weights in each tile of the pattern, in parts of a large one."""
    return join(p, [_in_parts(tile, p) for tile in p.pattern.cut(p.q, p.k, p.v)])


def rows_at_once(q: Tensor, num_keys: int) -> int:
    """How many rows of queries `(T, H, nq, D)` have about `SCORES` scores with all keys."""
    if torch.compiler.is_exporting():  # for batches of any size
        return q.shape[2]
    return max(32, SCORES // (q.shape[0] * q.shape[1] * num_keys))


def _in_parts(tile: Tile, p: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a tile, some rows at a time; the backward pass computes each part again."""
    nq, nk = tile.q.shape[2], tile.k.shape[2]
    size = rows_at_once(tile.q, nk)
    if size >= nq or not p.pattern.by_index or getattr(p.kernel, "placed", False):
        result = _explicit_tile(tile, p)
        return result.out, result.lse
    index = tile.index or whole(*p.sizes, tile.q.device)

    def part(q: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        result = _explicit_tile(tile._replace(q=q, index=Index(index.b, i, index.j)), p)
        return result.out, result.lse.contiguous()  # a column of the scores would keep them all

    run: Callable[..., Any] = part
    if torch.is_grad_enabled():
        run = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=bool(p.dropout))
    pieces = zip(tile.q.split(size, 2), index.i.split(size, 1), strict=True)
    outs, lses = zip(*(run(q, i) for q, i in pieces), strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def explicit_tiles(p: Problem) -> list[tuple[Tile, Result]]:
    """The tiles of the pattern, each with its weights."""
    return [(tile, _explicit_tile(tile, p)) for tile in p.pattern.cut(p.q, p.k, p.v)]


def _explicit_tile(tile: Tile, p: Problem) -> Result:
    return explicit(tile, p.pattern.tile_mask(tile, *p.sizes), _tile_bias(p, tile), p)


def join(p: Problem, parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the whole from those of the tiles."""
    batch, nq, _ = p.sizes
    out = p.pattern.join([out for out, _ in parts], batch, nq)
    lse = p.pattern.join([lse[..., None] for _, lse in parts], batch, nq)[..., 0]
    return out, lse


def explicit(tile: Tile, mask: Tensor | None, bias: Tensor | None, p: Problem) -> Result:
    """Scores, weights and output of a dense problem, in float32 or wider; dropout acts on the weights."""
    wide = torch.promote_types(tile.q.dtype, torch.float32)
    heads, nq, nk = tile.q.shape[1], tile.q.shape[2], tile.k.shape[2]
    q, k, v = tile.q.to(wide), tile.k.to(wide), tile.v.to(wide)
    # The query heads of one key/value head stand beside each other as rows: nothing is repeated.
    rows = (q * p.scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    scores = (rows @ k.transpose(-2, -1)).view(-1, heads, nq, nk)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights, lse = p.kernel(scores)
    kept = F.dropout(weights, p.dropout) if p.dropout else weights
    out = kept.reshape(*rows.shape[:-1], nk) @ v
    return Result(out.view(-1, heads, nq, v.shape[-1]).to(tile.v.dtype), lse, weights, scores)


def sdpa(p: Problem) -> tuple[Tensor, Tensor | None]:
    """Each tile through torch's fused kernels."""
    parts = [_fused(tile, _tile_bias(p, tile), p) for tile in p.pattern.cut(p.q, p.k, p.v)]
    batch, nq, _ = p.sizes
    out = p.pattern.join([out for out, _ in parts], batch, nq)
    columns = [lse[..., None] for _, lse in parts if lse is not None]
    return out, p.pattern.join(columns, batch, nq)[..., 0] if columns else None


def _fused(tile: Tile, bias: Tensor | None, p: Problem) -> tuple[Tensor, Tensor | None]:
    if tile.q.shape[2] == 1 and tile.q.shape[1] != tile.k.shape[1] and bias is None:
        return _fused_single(tile, p)
    if bias is None and _markable(tile, p):
        keys = p.pattern.causal_keys(tile, *p.sizes[1:])
        if keys is not None:
            return _causal_to(keys, tile, p)
    # is_causal of torch is aligned top-left: the same only for equal lengths.
    is_causal = bias is None and p.pattern.causal_tiles(*p.sizes[1:])
    mask = None if is_causal else p.pattern.tile_mask(tile, *p.sizes)
    dtype = torch.promote_types(tile.q.dtype, torch.float32) if p.return_lse else tile.q.dtype
    if bias is not None:
        bias = bias.to(dtype)
        mask = bias if mask is None else torch.where(mask, bias, -torch.inf)
    q, k, v = (_widened(x.to(dtype), tile) for x in (tile.q, tile.k, tile.v))
    if p.return_lse:
        out, lse = softmax_with_lse(q, k, v, mask, is_causal, p.scale)
        return out[..., : tile.v.shape[-1]].to(tile.q.dtype), lse
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=p.dropout,
        is_causal=is_causal,
        scale=p.scale,
        enable_gqa=bool(q.shape[1] != k.shape[1]),
    )
    return out[..., : tile.v.shape[-1]], None


def _markable(tile: Tile, p: Problem) -> bool:
    """Whether `_causal_to` holds, and pays: float16 has no number low enough."""
    eager = not torch.compiler.is_exporting() and tile.q.device.type == "cpu"
    return eager and tile.q.shape[2] >= LONG and tile.q.dtype != torch.float16 and p.scale > 0


def _causal_to(keys: Tensor, tile: Tile, p: Problem) -> tuple[Tensor, Tensor | None]:
    """Causal attention to the keys of bool `(T or 1, 1, 1, n)` without a mask of n x n: a further channel of
    the keys makes the weights of all others vanish."""
    mark = torch.where(keys.mT, 0.0, -1e30).to(tile.k.dtype).expand(*tile.k.shape[:3], 1)
    q = torch.cat([tile.q, torch.ones_like(tile.q[..., :1])], -1)
    marked = tile._replace(q=q, k=torch.cat([tile.k, mark], -1))
    out, lse = _fused(marked, None, p._replace(pattern=Causal()))
    blind = keys[:, :, 0].cumsum(-1) == 0
    return out.masked_fill(blind[..., None], 0), None if lse is None else lse.masked_fill(blind, -torch.inf)


def _fused_single(tile: Tile, p: Problem) -> tuple[Tensor, Tensor | None]:
    """One query: its heads that share keys are rows of one head, and the keys are read once.

    Decoding 16 heads on 4,096 keys of width 576 is 3.2 times faster (one CPU thread, float32).
    """
    rows = tile.q.unflatten(1, (tile.k.shape[1], -1)).squeeze(3)
    out, lse = _fused(tile._replace(q=rows), None, p)
    return out.flatten(1, 2)[:, :, None], None if lse is None else lse.flatten(1, 2)[..., None]


def _widened(x: Tensor, tile: Tile) -> Tensor:
    """`x` with zero channels where the CPU kernel is faster with them; a single query is not.

    Values of another width than the keys would make it store all weights: 4 heads of 1,024 tokens with 16 and
    32 channels take 2.3 times as long and ten times the memory. Heads narrower than 16 take 1.6 times as long
    (325 and 2,000 tokens of width 8), unless there are few tokens. Forward and backward, float32.
    """
    nq, nk = tile.q.shape[2], tile.k.shape[2]
    if nq == 1 or x.device.type != "cpu":
        return x
    width = max(tile.q.shape[-1], tile.v.shape[-1])
    if min(nq, nk) >= 64 and x.dtype == torch.float32:
        width = max(width, 16)
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def flex(p: Problem) -> tuple[Tensor, Tensor | None]:
    """The whole pattern as a block mask of flex_attention: blocks that nobody sees are skipped."""
    batch, nq, nk = p.sizes
    rule, bias = p.pattern.rule(nq, nk), p.bias
    mask = None if rule is None else create_block_mask(rule, batch, None, nq, nk, device=str(p.q.device))
    full = None if bias is None else bias.expand(batch, p.q.shape[1], nq, nk)
    add = None if full is None else lambda score, b, h, i, j: score + full[b, h, i, j]
    out, aux = _flex_kernel()(
        p.q,
        p.k,
        p.v,
        score_mod=add,
        block_mask=mask,
        scale=p.scale,
        enable_gqa=p.q.shape[1] != p.k.shape[1],
        return_aux=AuxRequest(lse=p.return_lse),
    )
    return out, aux.lse


@cache
def _flex_kernel() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def _tile_bias(p: Problem, tile: Tile) -> Tensor | None:
    """The bias `(T, H, nq, nk)` of a tile; a place without a token gets some value, and is masked."""
    if p.bias is None or tile.index is None:
        return p.bias
    batch, nq, nk = p.sizes
    b, i, j = tile.index
    full = p.bias.expand(batch, p.q.shape[1], nq, nk)
    return full[b[:, :, None], :, i[:, :, None], j[:, None, :]].permute(0, 3, 1, 2)


Backend = Callable[[Problem], tuple[Tensor, Tensor | None]]
BACKENDS: dict[str, Backend] = {"reference": reference, "blocked": blocked, "sdpa": sdpa, "flex": flex}
_forced: str | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every `attend` inside on one backend, process-wide; what that cannot do raises."""
    global _forced
    if name not in BACKENDS:
        raise AttentionError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def is_forced(name: str) -> bool:
    """Whether `backend(name)` is in force."""
    return _forced == name


def chosen(p: Problem) -> Backend:
    """The forced backend, checked against the problem, or the fastest one that can."""
    fusible = p.kernel is softmax and (not p.return_lse or _fusible_lse(p))
    if _forced is None:
        return sdpa if fusible else blocked
    if _forced == "sdpa" and not fusible:
        raise AttentionError(
            "backend 'sdpa' computes softmax, and its log-sum-exp only on CPU without dropout and bias "
            "gradients: use 'blocked' or 'reference'"
        )
    if _forced == "flex" and (p.kernel is not softmax or p.dropout or p.q.device.type != "cuda"):
        raise AttentionError(
            "backend 'flex' computes softmax without dropout, on CUDA: use 'sdpa' or 'blocked'"
        )
    return BACKENDS[_forced]


def _fusible_lse(p: Problem) -> bool:
    """Whether the fused kernel gives the log-sum-exp.

    It has no second derivative: `sdpa_kernel(SDPBackend.MATH)` around eager code rules it out.
    """
    if p.q.device.type != "cpu" or p.dropout or (p.bias is not None and p.bias.requires_grad):
        return False
    return torch.compiler.is_compiling() or torch.backends.cuda.flash_sdp_enabled()
