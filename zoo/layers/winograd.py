"""3 x 3 convolutions with fewer multiplications (Lavin & Gray 2016, F(4 x 4, 3 x 3)): 36 for each pair of
channels and 4 x 4 outputs instead of 144.

The map is cut into tiles of 6 x 6 that overlap by two; tiles and weights are transformed, multiplied as 36
matrix products, and transformed back. In float32 the result is off by some 1e-5 of the largest value, where a
direct convolution is by 1e-6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4
"""Outputs along each axis."""
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)


def _both_axes(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """The transform of a flattened square."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one).to(like)


def winograd_weight(weight: Tensor) -> Tensor:
    """`(O, C, 3, 3)` to `(36, C, O)`: four times as large, to be made once."""
    wide = weight.double().flatten(2)
    return torch.einsum("pk,ock->pco", _both_axes(_WEIGHT, wide), wide).to(weight.dtype).contiguous()


def winograd_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`F.conv2d(x, w, bias, padding=1)` with `weight = winograd_weight(w)`, channels last in memory.

    Args:
        x: `(B, C, H, W)`.
        weight: `(36, C, O)`.
        bias: `(O,)`.
    """
    batch, channels, height, width = x.shape
    down, across = -(-height // TILE), -(-width // TILE)
    margins = (0, 0, 1, across * TILE - width + 1, 1, down * TILE - height + 1)
    rows = F.pad(x.permute(0, 2, 3, 1), margins).unfold(1, TILE + 2, TILE).unfold(2, TILE + 2, TILE)
    tiles = rows.permute(4, 5, 0, 1, 2, 3).reshape((TILE + 2) ** 2, -1)
    mixed = (_both_axes(_INPUT, x) @ tiles).view(len(tiles), -1, channels) @ weight
    y = _both_axes(_OUTPUT, x) @ mixed.flatten(1)
    y = y.view(TILE, TILE, batch, down, across, -1).permute(2, 3, 0, 4, 1, 5)
    y = y.reshape(batch, down * TILE, across * TILE, -1).add_(bias)
    return y[:, :height, :width].contiguous().permute(0, 3, 1, 2)
