"""Mixture of heads on maps: the cosine attention of TransNeXt (Shi 2024, arXiv 2311.17132) with routed heads.

Shapes: N tokens of a map of h x w, H heads of width D, windows of W = window x window tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.backends import rows_at_once
from zoo.attention.errors import AttentionError
from zoo.attention.halo import Near
from zoo.attention.layers.base import Inputs, Supports
from zoo.attention.layers.mixture_of_heads import RoutedHeads
from zoo.attention.layers.multihead import split_heads
from zoo.attention.merge import merge
from zoo.attention.select import by_rows


class _Cosine(RoutedHeads):
    """`softmax((q / |q| + e) softplus(t) log(number of keys) . k / |k| + bias)` and its learned parts.

    The bias is an MLP of the distance between query and key along rows and columns, of which the logarithm
    is taken, so that it goes on beyond the distances of training.
    """

    supports = Supports(bidirectional=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        shared_heads: int,
        routed_heads: int,
        balance_weight: float,
        shape: Sequence[int] | None,
        trained_shape: Sequence[int] | None,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, balance_weight)
        for sizes in (shape, trained_shape):
            if sizes is not None and len(sizes) not in (1, 2):
                raise AttentionError(f"tokens lie on one or two axes, not on {len(sizes)}")
        self.shape = None if shape is None else tuple(shape)
        self.trained_shape = None if trained_shape is None else tuple(trained_shape)
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.expm1(1 / 0.24))))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads))
        nn.init.trunc_normal_(self.query_embedding, std=0.02)
        self.cpb_fc1, self.cpb_fc2 = nn.Linear(2, 512), nn.Linear(512, num_heads)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the tokens `(B, N, C)`; a sequence is one row."""
        shape = (x.shape[1],) if self.shape is None else self.shape
        if prod(shape) != x.shape[1]:
            raise AttentionError(f"{x.shape[1]} tokens do not fill a grid of {shape}")
        return shape if len(shape) == 2 else (1, *shape)  # pyright: ignore[reportReturnType]

    def scaled(self, q: Tensor, keys: Tensor) -> Tensor:
        """Normalised queries `(B, H, N, D)` ready for the product with keys, of which each sees so many."""
        return (q + self.query_embedding) * F.softplus(self.temperature) * keys.to(q.dtype).log()

    def by_rows(self, part: Callable[..., Tensor], q: Tensor, keys: int) -> Tensor:
        """`part(q, places, keys)` for some rows of queries `(B, H, N, D)` at a time, with their places."""
        place = torch.arange(q.shape[2], device=q.device)[None, None]
        return by_rows(part, q, place, keys=keys, rows=rows_at_once(q, keys), causal=False)

    def position_bias(self, shape: tuple[int, int], keys: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """Between a map and the middles of its P1 x P2 pools: places `(n,)` to biases `(H, n, P1 P2)`."""
        trained = shape if self.trained_shape is None else (1, *self.trained_shape)[-2:]
        weight = self.cpb_fc1.weight
        axes = [_distances(n, m, t, weight) for n, m, t in zip(shape, keys, trained, strict=True)]
        (rows, at_row), (columns, at_column) = axes
        table = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(table)))  # (distances, distances, H)
        table = table.flatten(0, 1)

        def rows_of(place: Tensor) -> Tensor:
            row, column = at_row(place // shape[1]), at_column(place % shape[1])
            at = row[:, :, None] * len(columns) + column[:, None]
            return table.index_select(0, at.flatten()).view(len(place), prod(keys), -1).permute(2, 0, 1)

        return rows_of


def _distances(n: int, pools: int, trained: int, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The distinct distances on an axis of n tokens from the middles of its pools, scaled and as logarithms,
    and which of them those of tokens `(m,)` to the pools are: `(m, pools)`.

    `sign(d) log2(1 + |d|) / 3` with d = 8 at the far end of an axis of `trained` tokens.
    """
    twice = [p * n // pools - (-(p + 1) * n // pools) - 1 for p in range(pools)]
    step = 2 if len({middle % 2 for middle in twice}) == 1 else 1
    doubled = torch.arange(-max(twice), 2 * n - 1 - min(twice), step, device=like.device)
    d = (doubled / 2).to(like.dtype) / max(trained - 1, 1) * 8
    first = torch.tensor([(max(twice) - middle) // step for middle in twice], device=like.device)

    def at(tokens: Tensor) -> Tensor:
        return 2 // step * tokens[:, None] + first

    return d.sign() * (d.abs() + 1).log2() / 3, at


class CosineMixtureOfHeads(_Cosine, name="moh_cosine"):
    """MoH in the full cosine attention of TransNeXt, the last stage of MoH-ViT; for bias and scale see the
    module. Memory is linear in the tokens: the bias is made for some queries at a time.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: Hs, the first heads.
        routed_heads: k, how many of the H - Hs others act on a token.
        shape: tokens along each of the one or two axes; by default one axis of any length.
        trained_shape: the shape that distances are measured by; by default that of the tokens.
        qkv_bias: of the projection in; the one out has a bias.
        balance_weight: of `balance_loss` in `aux_loss`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int,
        routed_heads: int,
        shape: Sequence[int] | None = None,
        trained_shape: Sequence[int] | None = None,
        qkv_bias: bool = True,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, balance_weight, shape, trained_shape)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, given: Inputs) -> Tensor:
        x = given.x
        shape = self.grid(x)
        q, k, v = (split_heads(rows, self.num_heads) for rows in self.qkv(x).chunk(3, dim=-1))
        q = self.scaled(F.normalize(q, dim=-1), torch.tensor(x.shape[1], device=x.device))
        k, bias = F.normalize(k, dim=-1), self.position_bias(shape, shape)

        def part(q: Tensor, place: Tensor, _seen: int) -> Tensor:
            return attend(q, k, v, bias=bias(place[0, 0]), scale=1.0)

        return self.proj(self.gated(self.by_rows(part, q, keys=k.shape[2]), x))


class AggregatedMixtureOfHeads(_Cosine, name="moh_aggregated"):
    """MoH in the aggregated attention of TransNeXt, the first stages of MoH-ViT.

    One softmax over the tokens of the window around a query and over pools of the whole map; at the border a
    window holds fewer. Beside it, learned tokens give the window weights of their own, `q / |q| . t + b`.
    The cost is linear in the tokens at a fixed number of pools, and no window is copied.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: Hs, the first heads.
        routed_heads: k, how many of the H - Hs others act on a token.
        window: tokens along a side of the window, odd.
        sr_ratio: tokens of the map along a side of each pool; the map has at least one.
        shape: tokens along each of the one or two axes; by default one axis of any length.
        trained_shape: the shape that distances are measured by; by default that of the tokens.
        qkv_bias: of the projections in; the one out has a bias.
        balance_weight: of `balance_loss` in `aux_loss`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int,
        routed_heads: int,
        window: int = 3,
        sr_ratio: int = 8,
        shape: Sequence[int] | None = None,
        trained_shape: Sequence[int] | None = None,
        qkv_bias: bool = True,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, balance_weight, shape, trained_shape)
        if window < 1 or window % 2 == 0 or sr_ratio < 1:
            raise AttentionError(
                f"a window is odd and pools hold tokens: window {window}, sr_ratio {sr_ratio}"
            )
        self.window, self.sr_ratio = window, sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim)
        width, places = dim // num_heads, window**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, places))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, width, places))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, places))
        nn.init.trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        nn.init.trunc_normal_(self.learnable_tokens, std=0.02)

    def mix(self, given: Inputs) -> Tensor:
        x = given.x
        shape = self.grid(x)
        pools = max(1, shape[0] // self.sr_ratio), max(1, shape[1] // self.sr_ratio)
        direct = F.normalize(split_heads(self.q(x), self.num_heads), dim=-1)
        q = self.scaled(direct, self._seen(shape, x.device)[:, None] + prod(pools))
        k, v = self._keys(x)
        far_k, far_v = self._keys(self._pooled(x, shape, pools))
        bias = self.position_bias(shape, pools)

        def part(q: Tensor, place: Tensor, _seen: int) -> Tensor:
            out, lse = attend(q, far_k, far_v, bias=bias(place[0, 0]), scale=1.0, return_lse=True)
            return torch.cat([out.to(lse.dtype), lse[..., None]], -1)

        far = self.by_rows(part, q, keys=prod(pools))
        out, _ = merge(self._near(q, k, v, shape), (far[..., :-1].to(q.dtype), far[..., -1]))
        return self.proj(self.gated(out + self._learned(direct, v, shape), x))

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised keys, and values, `(B, H, M, D)`."""
        k, v = (split_heads(rows, self.num_heads) for rows in self.kv(x).chunk(2, dim=-1))
        return F.normalize(k, dim=-1), v

    def _pooled(self, x: Tensor, shape: tuple[int, int], pools: tuple[int, int]) -> Tensor:
        """`(B, P1 P2, C)`"""
        x = F.gelu(self.sr(x.mT.unflatten(2, shape)))
        return self.norm(F.adaptive_avg_pool2d(x, pools).flatten(2).mT)

    def _seen(self, shape: tuple[int, int], device: torch.device) -> Tensor:
        """How many tokens of its window lie on the map, for each token `(N,)`."""
        reach = self.window // 2
        places = [torch.arange(n, device=device) for n in shape]
        counts = [
            (i + reach).clamp(max=n - 1) - (i - reach).clamp(min=0) + 1
            for i, n in zip(places, shape, strict=True)
        ]
        return (counts[0][:, None] * counts[1]).flatten()

    def _near(self, q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Attention within the windows, and its log-sum-exp.

        The bias of a distance is a product: keys mark their place modulo the window, and queries list what
        each mark is worth.
        """
        w, reach = self.window, self.window // 2
        y, x = (torch.arange(n, device=q.device) for n in shape)
        mark = torch.arange(w, device=q.device)
        row, column = ((mark - i[:, None] + reach) % w for i in (y, x))  # (h, w) and (w, w)
        distance = row[:, None, :, None] * w + column[None, :, None, :]
        worth = self.relative_pos_bias_local[:, distance.flatten()].view(1, self.num_heads, -1, w * w)
        marks = F.one_hot((y[:, None] % w * w + x % w).flatten(), w * w).to(k.dtype)
        batch, heads, tokens, _ = q.shape
        q = torch.cat([q, worth.to(q.dtype).expand(batch, -1, -1, -1)], -1)
        k = torch.cat([k, marks.expand(batch, heads, tokens, -1)], -1)
        pattern = Near(shape, reach, device=q.device)
        return attend(q, k, v, pattern=pattern, scale=1.0, return_lse=True)

    def _learned(self, q: Tensor, v: Tensor, shape: tuple[int, int]) -> Tensor:
        """`sum_d (q . t_d + b_d) v_d` over the tokens d of the window; `(B, H, N, D)`."""
        weights = (q @ self.learnable_tokens + self.learnable_bias).unflatten(2, shape)
        reach = self.window // 2
        v = F.pad(v.unflatten(2, shape), (0, 0, reach, reach, reach, reach))
        out = torch.zeros_like(q)
        for d in range(self.window**2):
            row, column = divmod(d, self.window)
            shifted = v[:, :, row : row + shape[0], column : column + shape[1]]
            out = out + (weights[..., d, None] * shifted).flatten(2, 3)
        return out
