"""Blocked local attention with a halo, over a sequence or a map."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.halo import Halo, with_offsets
from zoo.attention.layers.base import Inputs, Supports, masked
from zoo.attention.layers.multihead import split_heads
from zoo.attention.layers.neighbourhood import GridAttention
from zoo.attention.neighbourhood import per_axis


class HaloAttention(GridAttention, name="halo"):
    """A block of queries sees the keys of its block and a halo around it (Vaswani et al. 2021, HaloNet).

    `softmax(q . k / sqrt(D) + q . r)`: r is a learned vector for the distance along each axis. Neighbouring
    blocks overlap in what they see, so that nothing is shifted between layers. What lies outside of the grid
    is not seen.

    Args:
        block: tokens along a side of a block: one value, or one for each axis.
        halo: tokens seen beyond each side; likewise.
        relative: the logits `q . r`.
        options: of `GridAttention`.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2103.12731"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int | Sequence[int] = 8,
        halo: int | Sequence[int] = 3,
        relative: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.block, self.halo = per_axis(block, self.axes, "block"), per_axis(halo, self.axes, "halo")
        width = dim // num_heads
        windows = [axis.window for axis in self.pattern((1,) * self.axes).axes]
        self.offsets = nn.ParameterList(
            nn.Parameter(torch.empty(2 * window - 1, width)) for window in windows if relative
        )
        for table in self.offsets:
            nn.init.trunc_normal_(table, std=width**-0.5)

    def pattern(self, shape: tuple[int, ...], device: torch.device | None = None) -> Halo:
        return Halo(shape, self.block, self.halo)

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        shape = (x.shape[1],) if self.shape is None else self.shape
        if prod(shape) != x.shape[1]:
            raise AttentionError(f"{x.shape[1]} tokens do not fill a grid of {shape}")
        pattern = self.pattern(shape)
        q, k, v = (split_heads(rows, self.num_heads) for rows in self.qkv(x).chunk(3, dim=-1))
        scale = q.shape[-1] ** -0.5
        if len(self.offsets):
            q, k = with_offsets(q * scale, k, list(self.offsets), pattern, like=q)
            scale = 1.0
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, pattern=masked(pattern, mask), scale=scale, dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))
