"""Attention on grids of 1 to 3 axes: neighbourhoods and shifted windows. Tokens are in row-major order."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import Cache
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.layers.multihead import WindowCache, split_heads
from zoo.attention.layers.window import Reach
from zoo.attention.neighbourhood import Neighbourhood, ShiftedWindows, per_axis
from zoo.attention.patterns import Pattern, Rule


class GridAttention(AttentionLayer):
    """Multi-head attention with one matrix for queries, keys and values; a subclass gives the pattern.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        shape: tokens along each of the 1 to 3 axes; by default one axis of any length.
        qkv_bias, out_bias: biases of the projections.
        dropout: of the attention weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.shape = None if shape is None else tuple(shape)
        self.axes = 1 if shape is None else len(shape)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)

    def pattern(self, shape: tuple[int, ...], device: torch.device) -> Pattern:
        """Which keys the tokens of a grid see."""
        raise NotImplementedError

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = (split_heads(rows, self.num_heads) for rows in self.qkv(x).chunk(3, dim=-1))
        k, v, pattern = self.seen(k, v, cache)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, pattern=masked(pattern, mask), dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))

    def seen(self, k: Tensor, v: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor, Pattern]:
        """Keys and values `(B, H, M, D)` that the queries may see, and which of them they do."""
        shape = (k.shape[2],) if self.shape is None else self.shape
        if prod(shape) != k.shape[2]:
            raise AttentionError(f"{k.shape[2]} tokens do not fill a grid of {shape}")
        return k, v, self.pattern(shape, k.device)


class NeighbourhoodAttention(GridAttention, name="neighbourhood"):
    """Neighbourhood attention by the weights of NATTEN; see `zoo.attention.neighbourhood.Neighbourhood`.

    On one causal axis without stride it decodes step by step. Windows slide at the ends of an axis: it takes
    no padded rows, since a row alone would see other keys, and no axis shorter than kernel x dilation.

    Args:
        kernel, dilation, stride, causal: one value, or one for each axis.
        options: of `GridAttention`.
    """

    supports = Supports(bidirectional=True, causal=True, cache=True, any_length=False)
    paper = "https://arxiv.org/abs/2204.07143"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        named = {"kernel": kernel, "dilation": dilation, "stride": stride, "causal": causal}
        self.options = {name: per_axis(value, self.axes, name) for name, value in named.items()}
        self.causal = all(self.options["causal"])

    def pattern(self, shape: tuple[int, ...], device: torch.device) -> Pattern:
        return Neighbourhood(shape, **self.options, device=device)

    def seen(self, k: Tensor, v: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor, Pattern]:
        if cache is None:
            return super().seen(k, v, cache)
        assert isinstance(cache, WindowCache)
        k, v = cache.append(k, v)
        return k, v, Reach(cache.size, causal=True) & Every(self.options["dilation"][0])

    def init_cache(self, batch_size: int) -> WindowCache:
        if not self.causal or self.axes > 1 or self.options["stride"] != (1,):
            raise AttentionError("step by step decoding needs one axis, causal and without stride")
        (kernel,), (dilation,) = self.options["kernel"], self.options["dilation"]
        return WindowCache(self, (kernel - 1) * dilation + 1)


class Every(Pattern):
    """Only keys at a distance that the step divides; the last query stands at the last key."""

    def __init__(self, step: int) -> None:
        self.step = step

    def rule(self, nq: int, nk: int) -> Rule:
        return lambda b, h, i, j: (i + (nk - nq) - j) % self.step == 0

    def __repr__(self) -> str:
        return f"Every({self.step})"


class ShiftedWindowAttention(GridAttention, name="shifted_window"):
    """Attention within windows that may be shifted (Liu et al. 2021, Swin, section 3.2), cut at the borders.

    Two such layers, the second one with `shift = window // 2`, let neighbouring windows exchange.

    Args:
        window, shift: tokens along each axis: one value, or one for each axis.
        options: of `GridAttention`.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2103.14030"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int | Sequence[int] = 7,
        shift: int | Sequence[int] = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.window, self.shift = per_axis(window, self.axes, "window"), per_axis(shift, self.axes, "shift")

    def pattern(self, shape: tuple[int, ...], device: torch.device) -> Pattern:
        return ShiftedWindows(shape, self.window, shift=self.shift, device=device)
