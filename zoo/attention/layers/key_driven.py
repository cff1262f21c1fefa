"""Grouped queries whose groups follow the keys: Khan et al. 2024, "Beyond uniform query distribution"."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.heads import allocate, expand, key_norms, map_of, min_max, shared_map
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.patterns import Dense


class _Grouped(AttentionLayer):
    """Projections of H query heads and Hk key/value heads of width C / H; no positions are added."""

    paper = "https://arxiv.org/abs/2408.08454"
    supports = Supports(bidirectional=True, cross=True, padding=True, packed=True, batch_invariant=False)

    def __init__(self, dim: int, num_heads: int, *, num_kv_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        kv_width = num_kv_heads * head_width(dim, num_heads)
        if not 1 <= num_kv_heads <= num_heads:
            raise AttentionError(f"key/value heads are 1 .. {num_heads}, not {num_kv_heads}")
        self.dim, self.num_heads, self.num_kv_heads = dim, num_heads, num_kv_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, kv_width, bias=qkv_bias)
        self.v = nn.Linear(dim, kv_width, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask = given.x, given.context, given.mask
        source = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        out = self.attention(q, k, v, mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    def split(self, x: Tensor) -> Tensor:
        """`(B, N, H D)` to `(B, H, N, D)`."""
        return x.unflatten(-1, (-1, self.dim // self.num_heads)).transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Queries `(B, H, Nq, D)` to keys and values `(B, Hk, Nk, D)`."""
        raise NotImplementedError


class _Allocating(_Grouped):
    """Deals the query heads to the key/value heads at each call, for the whole batch alike."""

    def __init__(self, dim: int, num_heads: int, *, num_kv_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, qkv_bias=qkv_bias)
        if num_kv_heads < 2:
            raise AttentionError("queries are dealt among at least 2 key/value heads, not 1")

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        real = k if mask is None or mask.dtype != torch.bool else k * mask[:, None, :, None]
        head_map = map_of(self.allocation(key_norms(real)), self.num_heads)
        return attend(q, expand(k, head_map), expand(v, head_map), pattern=masked(Dense(), mask))

    def allocation(self, norms: Tensor) -> Tensor:
        """How many query heads each key/value head serves `(Hk,)`, from the norms of the keys `(Hk,)`."""
        raise NotImplementedError


class KeyDrivenGQA(_Allocating, name="kdgqa"):
    """KDGQA: a key/value head serves query heads in proportion to its min-max normalised key norm.

    The weakest head starts with none. Equal norms give equal groups. A row's result depends on its batch.
    """

    def allocation(self, norms: Tensor) -> Tensor:
        return allocate(min_max(norms), self.num_heads)


class DynamicGQA(_Allocating, name="dgqa"):
    """DGQA: groups follow how the key norms `n` move: `|cache - n|` (diff) or `0.9 n + 0.1 cache` (ema).

    Training deals anew every `window_size` steps, and then `cache = (cache + n) / window_size`; before the
    first time, groups are equal. Evaluation deals at each call and changes nothing, unless `eval_updates`
    asks for the authors' rule, `cache = n`. Their program gives the new value the 0.9 of ema, the paper's
    text the old one.
    """

    cache: Tensor
    counts: Tensor
    steps: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int,
        qkv_bias: bool = True,
        kind: Literal["diff", "ema"] = "diff",
        window_size: int = 300,
        eval_updates: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, qkv_bias=qkv_bias)
        if kind not in ("diff", "ema"):
            raise AttentionError(f"kind is 'diff' or 'ema', not {kind!r}")
        if window_size < 1:
            raise AttentionError(f"window_size counts steps, from 1, not {window_size}")
        self.kind, self.window_size, self.eval_updates = kind, window_size, eval_updates
        self.register_buffer("cache", torch.zeros(num_kv_heads))
        # Not in official checkpoints: after loading one, training starts a new window with equal groups.
        self.register_buffer("counts", allocate(torch.ones(num_kv_heads), num_heads), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def allocation(self, norms: Tensor) -> Tensor:
        moved = (self.cache - norms).abs() if self.kind == "diff" else 0.9 * norms + 0.1 * self.cache
        counts = allocate(moved, self.num_heads)
        if not self.training:
            if self.eval_updates:
                self.cache.copy_(norms)
            return counts
        self.steps += 1
        due = self.steps % self.window_size == 0
        counts = torch.where(due, counts, self.counts)
        self.cache.copy_(torch.where(due, (self.cache + norms) / self.window_size, self.cache))
        self.counts.copy_(counts)
        return counts


class PerturbedGQA(_Grouped, name="pgqa"):
    """PGQA: static groups; noise with the mean and spread of a head's outputs is taken off them.

    The paper speaks of noise on attention maps, the authors' program perturbs outputs, in evaluation too: of
    all tokens of a row together, so that padding would change the others. Training draws the noise anew at
    each call, by torch's generator; evaluation always has the same.
    """

    supports = Supports(bidirectional=True, cross=True)

    def __init__(self, dim: int, num_heads: int, *, num_kv_heads: int, qkv_bias: bool = True) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, qkv_bias=qkv_bias)
        shared_map(num_heads, num_kv_heads)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = attend(q, k, v)
        group, size = self.num_heads // self.num_kv_heads, out.shape[2] * out.shape[3]
        return perturb(out, self.draw((self.num_kv_heads, group, size), out.device))

    def draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Numbers spread evenly over [0, 1): random ones in training, else multiples of the golden ratio."""
        if self.training:
            return torch.rand(shape, device=device)
        places = torch.arange(math.prod(shape), dtype=torch.double, device=device)
        return (places * (math.sqrt(5) / 2 - 0.5) % 1).view(shape)


def perturb(out: Tensor, uniform: Tensor) -> Tensor:
    """Outputs `(B, H, N, D)` less noise `(Hk, G, N D)` with the mean and deviation of each head's outputs."""
    wide = torch.promote_types(out.dtype, torch.float32)
    rows = out.to(wide).unflatten(1, uniform.shape[:2]).flatten(3)  # (B, Hk, G, N D)
    diagonal = torch.eye(*uniform.shape[1:], dtype=torch.bool, device=uniform.device)
    noise = uniform.to(wide).masked_fill(diagonal, 0.0)
    spread = noise.std(-1, keepdim=True)
    noise = (noise - noise.mean(-1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    rows = rows - (noise * rows.std(-1, keepdim=True) + rows.mean(-1, keepdim=True))
    return rows.view_as(out).to(out.dtype)
