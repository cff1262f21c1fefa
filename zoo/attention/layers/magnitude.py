"""Linear attention that keeps the size of the query, on sequences and grids."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.linear import elu_features, magnitude_aware
from zoo.attention.rotary import axial_rotary_tables, rotary

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class MagnitudeAware(AttentionLayer, name="magnitude"):
    """Magnitude-aware linear attention as in MALA: rotary positions along each axis, a depthwise convolution
    of the values beside attention, and a gate (no activation) behind both.

    Time and memory are linear in N. Where a row of one axis is padded, nothing is read from the padding.

    Args:
        dim: C.
        num_heads: H; a head has a multiple of `2 axes` channels.
        shape: tokens along each of the 1 to 3 axes; by default one axis of any length.
        kernel_size: of the depthwise convolution, odd; 0 = none.
        theta: base of the rotary frequencies.
        bias: of the projections.
    """

    supports = Supports(bidirectional=True, padding=True, maps=False)
    paper = "https://arxiv.org/abs/2507.00698"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        kernel_size: int = 5,
        theta: float = 10_000.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        axes = 1 if shape is None else len(shape)
        if not 1 <= axes <= len(CONVOLUTIONS):
            raise AttentionError(f"tokens lie on 1 to {len(CONVOLUTIONS)} axes, not on {axes}")
        if head_width(dim, num_heads) % (2 * axes):
            raise AttentionError(
                f"{axes} rotary axes need heads of a multiple of {2 * axes} channels, not {dim // num_heads}"
            )
        if kernel_size and kernel_size % 2 == 0:
            raise AttentionError(f"kernel_size is odd, or 0 for no convolution, not {kernel_size}")
        self.dim, self.num_heads, self.theta = dim, num_heads, theta
        self.shape = None if shape is None else tuple(shape)
        self.qkvo = nn.Linear(dim, 4 * dim, bias=bias)
        self.lepe = None
        if kernel_size:
            self.lepe = CONVOLUTIONS[axes - 1](dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.proj = nn.Linear(dim, dim, bias=bias)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions = given.x, given.mask, given.positions
        shape = (x.shape[1],) if self.shape is None else self.shape
        if prod(shape) != x.shape[1]:
            raise AttentionError(f"{x.shape[1]} tokens do not fill a grid of {shape}")
        q, k, v, gate = self.qkvo(x).chunk(4, -1)
        v = v if mask is None else torch.where(mask[..., None], v, 0.0)
        tables = self._tables(x, shape, positions)
        q, k, v_heads = (split_heads(rows, self.num_heads) for rows in (q, k, v))
        out = self.heads(q, k, v_heads, tables, mask).transpose(1, 2).flatten(2)
        if self.lepe is not None:
            out = out + self.lepe(v.mT.unflatten(2, shape)).flatten(2).mT
        return self.proj(out * gate)

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """Queries, keys, values `(B, H, N, D)` and rotary tables to what the heads see, `(B, H, N, D)`."""
        q, k = elu_features(q), elu_features(k)
        turned = (rotary(q, *tables, interleaved=True), rotary(k, *tables, interleaved=True))
        return magnitude_aware(q, k, v, turned=turned, keep=mask)

    def _tables(self, x: Tensor, shape: tuple[int, ...], positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotary tables `(N, D / 2)`, or `(B, 1, N, D / 2)` where each row has its own positions."""
        at = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        places = [at // prod(shape[1:])]
        places += [at // prod(shape[axis + 1 :]) % shape[axis] for axis in range(1, len(shape))]
        cos, sin = axial_rotary_tables(places, self.dim // self.num_heads, theta=self.theta)
        return (cos, sin) if at.ndim == 1 else (cos[:, None], sin[:, None])
