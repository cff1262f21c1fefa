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


def plane_rotary(x: Tensor, positions: Tensor, a: Tensor, b: Tensor, *, frequency: float = 1.0) -> Tensor:
    """`exp(position * frequency * (a b^T - b a^T)) x`: rotation in the plane of a and b (GRAPE).

    Scores of queries and keys turned so depend on distances alone. Rotary positions turn in planes of two
    coordinates each, one after the other: with `b` and `a` the first and second of a pair, by its frequency.

    Args:
        x: `(B, H, N, D)`.
        positions: `(N,)`, or `(B, 1, N)`.
        a, b: `(D,)`, or one per head `(H, 1, D)`; the angle per position is `frequency` times the area
            between them. Where they are parallel, nothing is turned.
    """
    if a.shape != b.shape or a.shape[-1] != x.shape[-1]:
        raise AttentionError(
            f"a plane is two vectors of the head width {x.shape[-1]}, not {tuple(a.shape)}, {tuple(b.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, a, b = x.to(wide), a.to(wide), b.to(wide)

    def generator(y: Tensor) -> Tensor:
        return a * (y * b).sum(-1, keepdim=True) - b * (y * a).sum(-1, keepdim=True)

    squared = (a.square().sum(-1) * b.square().sum(-1) - (a * b).sum(-1).square())[..., None]
    flat = squared <= 0
    area = squared.masked_fill(flat, 1.0).sqrt()
    angle = positions.to(wide)[..., None] * frequency * area
    once = generator(rows)
    turned = angle.sin() / area * once + 2 * ((angle / 2).sin() / area).square() * generator(once)
    return (rows + turned.masked_fill(flat, 0.0)).to(x.dtype)
