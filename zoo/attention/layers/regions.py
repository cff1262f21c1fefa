"""Attention among routed regions, over a sequence or a map."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Inputs, Supports
from zoo.attention.layers.multihead import split_heads
from zoo.attention.layers.neighbourhood import GridAttention
from zoo.attention.patterns import Padding
from zoo.attention.routed import Routed, route


class BiLevelRouting(GridAttention, name="bilevel"):
    """The tokens of a region attend to those of the k regions that match it best (Zhu et al. 2023, BiFormer).

    Regions match by the products of their mean queries and keys, from which no gradient flows. Tokens that do
    not fill the last regions are filled up, and what fills up is not seen.

    Args:
        regions: along each axis; one or two axes.
        topk: k; no more than there are.
        options: of `GridAttention`.
    """

    supports = Supports(bidirectional=True)
    paper = "https://arxiv.org/abs/2303.08810"

    def __init__(self, dim: int, num_heads: int, *, regions: int = 7, topk: int = 4, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if self.axes > 2:
            raise AttentionError(f"regions lie on one or two axes, not on {self.axes}")
        if regions < 1 or topk < 1:
            raise AttentionError(f"regions and topk are at least 1, not {regions} and {topk}")
        self.regions, self.topk = regions, topk

    def mix(self, given: Inputs) -> Tensor:
        x = given.x
        rows, columns = (1, x.shape[1]) if self.shape is None or self.axes == 1 else self.shape
        if rows * columns != x.shape[1] or (self.shape is not None and prod(self.shape) != x.shape[1]):
            raise AttentionError(f"{x.shape[1]} tokens do not fill a grid of {self.shape}")
        size = -(-rows // self.regions), -(-columns // self.regions)
        full = rows + -rows % size[0], columns + -columns % size[1]
        qkv = F.pad(
            self.qkv(x).unflatten(1, (rows, columns)), (0, 0, 0, full[1] - columns, 0, full[0] - rows)
        )
        real = torch.zeros(full, dtype=torch.bool, device=x.device)
        real[:rows, :columns] = True
        q, k, v = (split_heads(part.flatten(1, 2), self.num_heads) for part in qkv.chunk(3, dim=-1))
        pattern = Routed(self._chosen(qkv, real, size), full, size) & Padding(real.flatten()[None])
        out = attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)
        out = out.transpose(1, 2).flatten(2).unflatten(1, full)[:, :rows, :columns]
        return self.proj(out.flatten(1, 2))

    @torch.no_grad()
    def _chosen(self, qkv: Tensor, real: Tensor, size: tuple[int, int]) -> Tensor:
        """Regions `(B, R, k)`."""
        with torch.autocast(qkv.device.type, enabled=False):
            wide = torch.promote_types(qkv.dtype, torch.float32)
            means = F.avg_pool2d(qkv[..., : 2 * self.dim].to(wide).permute(0, 3, 1, 2), size)
            share = F.avg_pool2d(real[None, None].to(wide), size)
            q, k = (means / share).flatten(2).transpose(1, 2).chunk(2, -1)
            return route(q, k, min(self.topk, k.shape[1]))[1]
