"""DLGSANet: dynamic local and sparse global self-attention for super-resolution.

Li et al., ICCV Workshops 2023, arXiv 2301.02031.

Shapes: B images, H x W low-resolution pixels, C channels, scale s. Between the first and the last convolution
maps are `(B, H, W, C)`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.superres.models.dlgsanet_layers import (
    ChannelAttention,
    Layer,
    LocalAttention,
    convolved,
    create_mlp,
    softmax_or,
)
from domains.superres.models.place import Place
from domains.superres.weights.dlgsanet import DLGSANetOfficial
from zoo.errors import ConfigError, DataError
from zoo.registry import register_model

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Of DIV2K."""
TLC_KERNELS = {2: 96, 3: 72}
"""Windows of evaluation by scale, twice the LR crop of training at x2; 48 at any other scale."""
BLOCKS = {
    "sparse": ("local", "sparse"),
    "softmax": ("local", "softmax"),
    "local": ("local",),
    "global": ("softmax",),
}
"""The layers of a block by its type; the published models are `sparse`."""
UPSAMPLERS = ("direct", "stepwise", "none")
STEPWISE_WIDTH = 64


class Group(nn.Module):
    """Layers and a 3 x 3 convolution, with one residual around all."""

    def __init__(self, dim: int, layers: list[Layer]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        deep = x
        for layer in self.layers:
            deep = layer(deep, place)
        return x + convolved(self.conv, deep)


class Upsampler(nn.Module):
    """Features `(B, C, H, W)` to pictures `(B, c, s H, s W)`.

    `direct`: one convolution and one pixel shuffle. `stepwise`: shuffles by 2 (or one by 3) at 64 channels
    between two convolutions. `none`: one convolution.
    """

    def __init__(self, kind: str, dim: int, out_chans: int, scale: int) -> None:
        super().__init__()
        factors = _factors(kind, scale)
        width = STEPWISE_WIDTH if kind == "stepwise" else dim
        self.before = nn.Conv2d(dim, width, 3, padding=1) if kind == "stepwise" else None
        self.last = None if kind == "direct" else nn.Conv2d(width, out_chans, 3, padding=1)
        made = out_chans if kind == "direct" else width
        self.convs = nn.ModuleList(nn.Conv2d(width, made * r * r, 3, padding=1) for r in factors)
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        if self.before is not None:
            x = F.leaky_relu(self.before(x), 0.01)
        for conv, factor in zip(self.convs, self.factors, strict=True):
            x = F.pixel_shuffle(conv(x), factor)
        return x if self.last is None else self.last(x)


def _factors(kind: str, scale: int) -> list[int]:
    if kind not in UPSAMPLERS:
        raise ConfigError(f"There is no upsampler {kind!r}. Upsamplers: {', '.join(UPSAMPLERS)}.")
    if scale < 1 or (kind == "none" and scale != 1):
        raise ConfigError(f"The upsampler {kind!r} does not enlarge {scale} times.")
    if kind == "direct":
        return [scale]
    if scale == 3:
        return [3]
    steps = scale.bit_length() - 1
    if 2**steps != scale:
        raise ConfigError(f"The upsampler 'stepwise' enlarges 3 or 2^n times, not {scale} times.")
    return [2] * steps


class DLGSANet(nn.Module):
    """Groups of blocks; a block is local attention by predicted filters, and attention between channels.

    Any size of image and batch, without padding.

    Args:
        scale: s.
        dim: C.
        groups: number of groups.
        blocks: blocks in a group.
        block_type: `sparse` (as published), `softmax`, `local` or `global`; the last three are ablations.
        kernel_size: side of the windows of local attention.
        group_channels: channels that share a filter there.
        dynamic: without it, a depth-wise convolution takes its place.
        num_heads: heads of the attention between channels.
        activation: of the scores of `sparse` blocks: `relu`, `gelu`, `sigmoid` or `identity`.
        local_mlp, global_mlp: `gated` or `plain`, of either kind of layer.
        local_ratio, global_ratio: their hidden width as a multiple of C.
        tlc: attention between channels over overlapping windows in evaluation, over the whole map in
            training.
        tlc_kernel: side of these windows in pixels; None = 96, 72, 48 at x2, x3, x4. As in the official
            program, other blocks than `sparse` ones always have 48.
        upsampler: `direct` (as published), `stepwise`, or `none` at scale 1.
        img_range: what pictures in [0, 1] are multiplied with inside.
        body_norm: a norm before and after the groups.
        in_chans: channels of pictures; the mean of DIV2K is subtracted from three, nothing from others.

    Raises:
        ConfigError: options that do not exist or do not fit together.
    """

    min_size = 1
    placed = True
    mean: Tensor

    def __init__(
        self,
        scale: int = 4,
        *,
        dim: int = 48,
        groups: int = 3,
        blocks: int = 3,
        block_type: str = "sparse",
        kernel_size: int = 7,
        group_channels: int = 6,
        dynamic: bool = True,
        num_heads: int = 6,
        activation: str = "relu",
        local_mlp: str = "gated",
        global_mlp: str = "gated",
        local_ratio: float = 2.0,
        global_ratio: float = 2.0,
        tlc: bool = True,
        tlc_kernel: int | None = None,
        upsampler: str = "direct",
        img_range: float = 1.0,
        body_norm: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        _check(block_type, img_range, dim=dim, groups=groups, blocks=blocks, in_chans=in_chans)
        _check_positive(group_channels=group_channels)
        self.scale, self.in_chans, self.img_range = scale, in_chans, img_range
        mean = torch.tensor(RGB_MEAN) if in_chans == 3 else torch.zeros(1)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        window = (tlc_kernel or TLC_KERNELS.get(scale, 48)) if block_type == "sparse" else 48

        def layer(kind: str) -> Layer:
            if kind == "local":
                mixer = LocalAttention(dim, kernel_size, group_channels, dynamic)
                return Layer(dim, mixer, create_mlp(local_mlp, dim, local_ratio))
            kernel = softmax_or(activation if kind == "sparse" else None)
            mixer = ChannelAttention(dim, num_heads, kernel, window if tlc else None)
            return Layer(dim, mixer, create_mlp(global_mlp, dim, global_ratio))

        self.embed = nn.Conv2d(in_chans, dim, 3, padding=1, bias=False)
        self.norm_in = nn.LayerNorm(dim) if body_norm else nn.Identity()
        kinds = BLOCKS[block_type] * blocks
        self.groups = nn.Sequential(*(Group(dim, [layer(kind) for kind in kinds]) for _ in range(groups)))
        self.norm_out = nn.LayerNorm(dim) if body_norm else nn.Identity()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.upsampler = Upsampler(upsampler, dim, in_chans, scale)

    def forward(self, x: Tensor, place: Place | None = None) -> Tensor:
        """`(B, C, H, W)` in [0, 1] -> `(B, C, s H, s W)`, not clamped.

        Args:
            place: of a tile in its picture, so that windows lie where they do in the whole.
        """
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise DataError(f"Pictures are (B, {self.in_chans}, H, W) here, not {tuple(x.shape)}.")
        mean = self.mean.to(x.dtype)
        normalised = ((x - mean) * self.img_range).contiguous(memory_format=torch.channels_last)
        first = self.embed(normalised).permute(0, 2, 3, 1)
        deep = self.norm_in(first)
        for group in self.groups:
            deep = group(deep, place)
        deep = convolved(self.conv, self.norm_out(deep))
        return self.upsampler((deep + first).permute(0, 3, 1, 2)) / self.img_range + mean


def _check(block_type: str, img_range: float, **sizes: int) -> None:
    if block_type not in BLOCKS:
        raise ConfigError(f"There are no blocks {block_type!r}. Types of blocks: {', '.join(BLOCKS)}.")
    if img_range <= 0:
        raise ConfigError(f"img_range is positive, not {img_range}.")
    _check_positive(**sizes)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is at least 1, not {size}.")


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=DLGSANet,
    paper="DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution "
    "(Li, Dong, Tang, Pan; ICCV Workshops 2023, arXiv 2301.02031)",
    licence="Apache-2.0; its README adds academic research use only",
    source="https://github.com/NeonLeexiang/DLGSANet",
    status="official parity",
    official=DLGSANetOfficial,
    preprocessing={"range": [0.0, 1.0], "channels": "RGB"},
)


def _published(name: str, published: int, scale: int, options: dict[str, Any]) -> DLGSANet:
    if scale != published:
        family = name.rpartition("_")[0]
        raise ConfigError(f"{name} enlarges {published} times. For {scale} times, use {family}_x{scale}.")
    return DLGSANet(scale, **options)


@_register(summary="DLGSANet-tiny for twice the size: 3 groups of 3 blocks, 48 channels")
def dlgsanet_tiny_x2(*, scale: int = 2, **options: Any) -> DLGSANet:
    return _published("dlgsanet_tiny_x2", 2, scale, options)


@_register(summary="DLGSANet-tiny for three times the size: 3 groups of 3 blocks, 48 channels")
def dlgsanet_tiny_x3(*, scale: int = 3, **options: Any) -> DLGSANet:
    return _published("dlgsanet_tiny_x3", 3, scale, options)


@_register(summary="DLGSANet-tiny for four times the size: 3 groups of 3 blocks, 48 channels")
def dlgsanet_tiny_x4(*, scale: int = 4, **options: Any) -> DLGSANet:
    return _published("dlgsanet_tiny_x4", 4, scale, options)


@_register(summary="DLGSANet-light for twice the size: 4 groups of 3 blocks, 48 channels")
def dlgsanet_light_x2(*, scale: int = 2, groups: int = 4, **options: Any) -> DLGSANet:
    return _published("dlgsanet_light_x2", 2, scale, {"groups": groups, **options})


@_register(summary="DLGSANet-light for three times the size: 4 groups of 3 blocks, 48 channels")
def dlgsanet_light_x3(*, scale: int = 3, groups: int = 4, **options: Any) -> DLGSANet:
    return _published("dlgsanet_light_x3", 3, scale, {"groups": groups, **options})


@_register(summary="DLGSANet-light for four times the size: 4 groups of 3 blocks, 48 channels")
def dlgsanet_light_x4(*, scale: int = 4, groups: int = 4, **options: Any) -> DLGSANet:
    return _published("dlgsanet_light_x4", 4, scale, {"groups": groups, **options})


@_register(summary="DLGSANet for twice the size: 6 groups of 4 blocks, 90 channels")
def dlgsanet_large_x2(
    *, scale: int = 2, dim: int = 90, groups: int = 6, blocks: int = 4, **options: Any
) -> DLGSANet:
    sizes = {"dim": dim, "groups": groups, "blocks": blocks}
    return _published("dlgsanet_large_x2", 2, scale, sizes | options)


@_register(summary="DLGSANet for three times the size: 6 groups of 4 blocks, 90 channels")
def dlgsanet_large_x3(
    *, scale: int = 3, dim: int = 90, groups: int = 6, blocks: int = 4, **options: Any
) -> DLGSANet:
    sizes = {"dim": dim, "groups": groups, "blocks": blocks}
    return _published("dlgsanet_large_x3", 3, scale, sizes | options)


@_register(summary="DLGSANet for four times the size: 6 groups of 4 blocks, 90 channels")
def dlgsanet_large_x4(
    *, scale: int = 4, dim: int = 90, groups: int = 6, blocks: int = 4, **options: Any
) -> DLGSANet:
    sizes = {"dim": dim, "groups": groups, "blocks": blocks}
    return _published("dlgsanet_large_x4", 4, scale, sizes | options)


@_register(summary="A small DLGSANet to train from scratch on a CPU")
def dlgsanet_mini(
    *,
    scale: int = 2,
    dim: int = 24,
    groups: int = 2,
    blocks: int = 1,
    num_heads: int = 3,
    **options: Any,
) -> DLGSANet:
    return DLGSANet(scale, dim=dim, groups=groups, blocks=blocks, num_heads=num_heads, **options)
