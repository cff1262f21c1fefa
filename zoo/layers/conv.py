"""Convolution with batch normalisation, their folding into one convolution for inference, and parts of blocks
on maps."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Module):
    """`norm(conv(x))`: `(B, in, H, W)` to `(B, out, H', W')`; without padding argument, "same" at stride 1.

    Args:
        gain: what the weight of the norm starts at; 0 makes the last layer of a residual branch start silent.
        norm: another norm than batch norm.
    """

    norm: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        *,
        groups: int = 1,
        bias: bool = False,
        gain: float = 1.0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels) if norm is None else norm
        if norm is None:
            nn.init.constant_(self.norm.weight, gain)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse_(self) -> None:
        """Folds the norm into the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = folded(self.conv, self.norm), nn.Identity()


def scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does in eval mode: `x * scale + shift`, each `(C,)`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


@torch.no_grad()
def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution equal to `norm(conv(x))` in eval mode."""
    scale, shift = scale_and_shift(norm)
    fused = copy.deepcopy(conv)
    fused.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    fused.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return fused


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map `(B, C, H, W)`."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """The same map with the channels of a pixel side by side in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def add_identity_(conv: nn.Conv2d) -> None:
    """Makes a depthwise convolution give `x + conv(x)`."""
    middle = conv.kernel_size[0] // 2
    conv.weight[:, 0, middle, middle] += 1


def scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    """A branch times its layer scale, if it has one."""
    return x if gamma is None else gamma * x
