"""Rotary position embedding (Su et al. 2021, RoFormer, section 3.2.2), in both pairings of the field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError


def rotary_tables(positions: Tensor, width: int, *, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `position * theta^(-2i / width)`, in float32.

    Args:
        positions: `(..., N)`, in tokens; any dtype.
        width: number of channels that will be rotated, even.

    Returns:
        Two tables `(..., N, width / 2)`.
    """
    if width < 2 or width % 2:
        raise AttentionError(f"rotary width must be even and positive, not {width}")
    powers = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32) / width
    angles = positions.float()[..., None] * theta**-powers
    return angles.cos(), angles.sin()


def axial_rotary_tables(
    positions: Sequence[Tensor], width: int, *, theta: float = 10_000.0
) -> tuple[Tensor, Tensor]:
    """Tables for tokens on a grid: each axis turns an equal share of the channels, the first axis the first.

    The frequencies of an axis are `theta^-t` with t evenly from 0 to 1, both included (Fan et al. 2024, RMT).

    Args:
        positions: of the tokens along each axis, `(..., N)` each.
        width: number of channels that will be rotated, a multiple of twice the number of axes.

    Returns:
        Two tables `(..., N, width / 2)`, in float32.
    """
    share = 2 * len(positions)
    if width < share or width % share:
        raise AttentionError(
            f"rotary width {width} is not a multiple of {share}: pairs of channels for each of "
            f"{len(positions)} axes"
        )
    powers = torch.linspace(0, 1, width // share, device=positions[0].device, dtype=torch.float32)
    angles = torch.cat([at.float()[..., None] * theta**-powers for at in positions], -1)
    return angles.cos(), angles.sin()


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotates the first `2 * cos.shape[-1]` channels of queries or keys; further channels pass as they are.

    Args:
        x: `(B, H, N, D)`.
        cos, sin: `(N, r)`, or anything that broadcasts to `(B, H, N, r)`, with `2 r <= D`.
        interleaved: pairs are channels `(2i, 2i + 1)` (GPT-J); else `(i, i + r)`, half-split (Llama).
    """
    width = 2 * cos.shape[-1]
    if cos.shape != sin.shape:
        raise AttentionError(f"rotary tables differ in shape: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}")
    if width > x.shape[-1]:
        raise AttentionError(f"rotary tables turn {width} channels, but a head has {x.shape[-1]}")
    if cos.ndim > 1 and cos.shape[-2] not in (1, x.shape[-2]):
        raise AttentionError(f"rotary tables hold {cos.shape[-2]} positions, the tokens are {x.shape[-2]}")
    turned, passed = x[..., :width].to(torch.promote_types(x.dtype, cos.dtype)), x[..., width:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return torch.cat([joined.to(x.dtype), passed], dim=-1)
