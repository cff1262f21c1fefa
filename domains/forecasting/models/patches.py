"""Series in their own scale, cut into patches.

Shapes: B rows (series), T steps, N patches of P steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def location_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation `(B, 1)` of what is observed in `(B, T)`, in float32.

    A row without observation gets 0 and 1; a scale of 0 becomes 1e-5.
    """
    x = x.float()
    loc = x.nanmean(-1, keepdim=True).nan_to_num(nan=0.0)
    scale = (x - loc).square().nanmean(-1, keepdim=True).sqrt().nan_to_num(nan=1.0)
    return loc, torch.where(scale == 0, 1e-5, scale)


def normalise(x: Tensor, loc: Tensor, scale: Tensor, *, arcsinh: bool) -> Tensor:
    """`(x - loc) / scale`, then asinh where asked for, in float32."""
    z = (x.float() - loc) / scale
    return z.arcsinh() if arcsinh else z


def denormalise(z: Tensor, loc: Tensor, scale: Tensor, *, arcsinh: bool) -> Tensor:
    """The inverse of `normalise`, in float32."""
    z = z.float()
    return (z.sinh() if arcsinh else z) * scale + loc


def patches(x: Tensor, size: int, stride: int, *, fill: float) -> Tensor:
    """`(B, T)` in patches `(B, N, size)` that start every `stride` steps, filled up on the left."""
    x = F.pad(x, (-x.shape[-1] % size, 0), value=fill)
    return x.unfold(-1, size, stride)


def quantile_loss(z: Tensor, target: Tensor, levels: Tensor) -> Tensor:
    """`2 |(y - z_q) (1[y <= z_q] - q)|` `(B, Q, H)` of forecasts z `(B, Q, H)` for targets `(B, H)`."""
    target = target[:, None]
    return 2 * ((target - z) * ((target <= z).to(z.dtype) - levels[:, None])).abs()
