"""What both halves of a CATANet block are made of: heads of a width that kernels like, and the ConvFFN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.linear import matrix

ALIGNMENT = 16
"""Heads are filled up with zero channels to a multiple of this. The published 9 and 10 channels per head run
on no fused kernel; with 16 the same numbers come 6 times faster from a CPU (patches of 28 x 28)."""


def head_width(qk_dim: int, dim: int, num_heads: int) -> int:
    """Channels of a head once it is filled up."""
    width = max(qk_dim, dim) // num_heads
    return width + -width % ALIGNMENT


def to_heads(linear: nn.Linear, parts: Sequence[int], num_heads: int, width: int) -> Tensor:
    """The weight of a projection to queries, keys or values side by side, every head filled up with zeros.

    Args:
        linear: without bias, `C` to the sum of `parts`, each head-major.

    Returns:
        `(len(parts) * num_heads * width, C)`.
    """
    weight = matrix(linear)
    heads = [part.unflatten(0, (num_heads, -1)) for part in weight.split(list(parts))]
    return torch.cat([F.pad(h, (0, 0, 0, width - h.shape[1])) for h in heads]).flatten(0, 1)


def from_heads(weight: Tensor, num_heads: int, width: int) -> Tensor:
    """A weight `(C, dim)` that reads merged heads, as one `(C, num_heads * width)` that reads the filled."""
    heads = weight.unflatten(1, (num_heads, -1))
    return F.pad(heads, (0, width - heads.shape[2])).flatten(1)


class ConvFFN(nn.Module):
    """LayerNorm, linear, GELU, plus the GELU of a depthwise 5 x 5 convolution of that, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        h = F.gelu(self.fc1(self.norm(x)))
        h = h + F.gelu(self.dwconv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return self.fc2(h)
