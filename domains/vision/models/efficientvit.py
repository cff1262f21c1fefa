"""EfficientViT (Liu et al. 2023, Microsoft): few attention layers, heads in a cascade, many convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from domains.vision.backbone import Backbone
from domains.vision.models.efficientvit_blocks import (
    FFN,
    ConvBlock,
    Depthwise,
    Parts,
    PatchMerging,
    Stem,
    WindowAttention,
)
from domains.vision.weights.efficientvit import EfficientViTOfficial
from zoo.errors import ConfigError
from zoo.layers.conv import scale_and_shift
from zoo.registry import register_model, variant


class Block(Parts):
    """The sandwich: attention between two halves of depthwise convolution and feed-forward (section 3.1)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        key_dim: int,
        kernels: Sequence[int],
        window: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.depthwise_1 = Depthwise(dim, drop_path=drop_path)
        self.ffn_1 = FFN(dim, drop_path=drop_path)
        self.attention = WindowAttention(dim, num_heads, key_dim, kernels, window, drop_path=drop_path)
        self.depthwise_2 = Depthwise(dim, drop_path=drop_path)
        self.ffn_2 = FFN(dim, drop_path=drop_path)


class NormLinear(nn.Module):
    """Batch norm and a linear layer."""

    norm: nn.Module

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(in_features)
        self.linear = nn.Linear(in_features, out_features)
        trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))

    @torch.no_grad()
    def fuse_(self) -> None:
        if isinstance(self.norm, nn.BatchNorm1d):
            scale, shift = scale_and_shift(self.norm)
            self.linear.bias.add_(self.linear.weight @ shift)
            self.linear.weight.mul_(scale)
            self.norm = nn.Identity()


class DistilledHead(nn.Module):
    """Two heads: in training both logits, for the labels and for a teacher's; then their mean."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.label = NormLinear(in_features, out_features)
        self.teacher = NormLinear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        label, teacher = self.label(x), self.teacher(x)
        return (label, teacher) if self.training else (label + teacher) / 2


class EfficientViT(Backbone):
    """EfficientViT of Microsoft Research (not the one of MIT Han Lab): maps of strides 16, 32, 64.

    Any size of image is taken: where windows do not fill a map, and where a map is smaller than one window,
    zeros pad it. The backbones of the official detectors are `features_only=True, shrink_windows=False`, M0
    with `kernels=[7, 5, 3, 3]`.

    Args:
        dims: channels of each stage, divisible by its heads; the first by 8.
        depths: blocks of each stage.
        num_heads: heads of each stage.
        kernels: of the convolution of the queries, head i the i-th in every stage.
        key_dim: width of queries and keys; one, or one for each stage.
        window_size: r of each stage, or one for all.
        shrink_windows: no window is larger than its map at `img_size`, as in the official classifiers;
            `False`, as in the official detectors.
        distillation: a second head that learns from a teacher; training gives both logits.
    """

    first_conv = "stem.0.conv"
    classifier = "head.linear"
    cfg = {"license": "mit"}  # noqa: RUF012

    def __init__(
        self,
        dims: Sequence[int] = (64, 128, 192),
        depths: Sequence[int] = (1, 2, 3),
        num_heads: Sequence[int] = (4, 4, 4),
        kernels: Sequence[int] = (5, 5, 5, 5),
        *,
        key_dim: int | Sequence[int] = 16,
        window_size: int | Sequence[int] = 7,
        shrink_windows: bool = True,
        distillation: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        count = len(dims)
        key_dims, sizes = _per_stage("key_dim", key_dim, count), _per_stage("window_size", window_size, count)
        _check(dims, depths, num_heads, kernels)
        self.window_sizes, self.shrink_windows, self.distillation = sizes, shrink_windows, distillation
        if distillation:
            self.pretrained_cfg["classifier"] = ("head.label.linear", "head.teacher.linear")
        rates = self.drop_path_rates(depths)
        windows = self._windows()
        self.stem = Stem(self.in_chans, dims[0])
        self.stages = nn.Sequential()
        for s, dim in enumerate(dims):
            merging = [ConvBlock(dims[s - 1]), PatchMerging(dims[s - 1], dim), ConvBlock(dim)] if s else []
            blocks = [Block(dim, num_heads[s], key_dims[s], kernels, windows[s], rate) for rate in rates[s]]
            self.stages.append(nn.Sequential(*merging, *blocks))
        self.min_size = 16
        self.finish(dims, [16 * 2**s for s in range(count)])

    def make_head(self, in_features: int, num_classes: int) -> nn.Module:
        return (DistilledHead if self.distillation else NormLinear)(in_features, num_classes)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        if isinstance(self.head, DistilledHead):
            return self.head.label.linear, self.head.teacher.linear
        return self.head.linear if isinstance(self.head, NormLinear) else self.head

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Images will have this size from now on; tables of windows that change with it are interpolated."""
        super().set_input_size(img_size)
        for stage, window in zip(self.stages, self._windows(), strict=False):
            for block in stage.children():
                if isinstance(block, Block):
                    block.attention.set_window(window)

    def _windows(self) -> list[int]:
        """The side of the windows of each stage, from the size that the model is meant for."""
        side = min(self.pretrained_cfg["input_size"][1:]) // 16
        windows = []
        for size in self.window_sizes:
            windows.append(max(1, min(size, side)) if self.shrink_windows else size)
            side = (side - 1) // 2 + 1
        return windows

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".table")}


def _per_stage(name: str, value: int | Sequence[int], count: int) -> list[int]:
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count or min(values) < 1:
        raise ConfigError(f"{name} is a positive number, or one for each of the {count} stages, not {value}.")
    return values


def _check(
    dims: Sequence[int], depths: Sequence[int], num_heads: Sequence[int], kernels: Sequence[int]
) -> None:
    if not len(dims) == len(depths) == len(num_heads) > 0:
        raise ConfigError(
            f"dims, depths and num_heads have one entry per stage, not {len(dims)}, {len(depths)} and "
            f"{len(num_heads)}."
        )
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim % heads:
            raise ConfigError(f"{dim} channels cannot be shared out evenly to {heads} heads.")
    if dims[0] % 8:
        raise ConfigError(f"The stem needs dims[0] divisible by 8, not {dims[0]}.")
    if len(kernels) < max(num_heads) or any(kernel % 2 == 0 for kernel in kernels):
        raise ConfigError(
            f"kernels are odd, and at least as many as heads ({max(num_heads)}), not {list(kernels)}."
        )


# ---- published variants ------------------------------------------------------------------------------------

_VARIANTS = (
    # parameters, top-1 on ImageNet-1k, dims, depths, num_heads, kernels
    ("2.3 M", "63.2 %", (64, 128, 192), (1, 2, 3), (4, 4, 4), (5, 5, 5, 5)),
    ("3.0 M", "68.4 %", (128, 144, 192), (1, 2, 3), (2, 3, 3), (7, 5, 3, 3)),
    ("4.2 M", "70.8 %", (128, 192, 224), (1, 2, 3), (4, 3, 2), (7, 5, 3, 3)),
    ("6.9 M", "73.4 %", (128, 240, 320), (1, 2, 3), (4, 3, 4), (5, 5, 5, 5)),
    ("8.8 M", "74.3 %", (128, 256, 384), (1, 2, 3), (4, 4, 4), (7, 5, 3, 3)),
    ("12.4 M", "77.1 %", (192, 288, 384), (1, 3, 4), (3, 3, 4), (7, 5, 3, 3)),
)

for _i, (_size, _top1, _dims, _depths, _num_heads, _kernels) in enumerate(_VARIANTS):
    register_model(
        model=EfficientViT,
        summary=f"EfficientViT-M{_i}: {_size} parameters, {_top1} top-1 on ImageNet-1k",
        paper="Liu et al., EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention, "
        "CVPR 2023",
        licence="MIT",
        source="https://github.com/microsoft/Cream/tree/main/EfficientViT",
        status="official parity",
        weights=(f"efficientvit_m{_i}_in1k", f"efficientvit_m{_i}_timm"),
        official=EfficientViTOfficial,
        preprocessing={
            "size": 224,
            "crop_pct": 0.875,
            "resize": "bicubic",
            "scaling": "ImageNet mean and std",
        },
    )(
        variant(
            f"efficientvit_m{_i}",
            EfficientViT,
            dims=_dims,
            depths=_depths,
            num_heads=_num_heads,
            kernels=_kernels,
        )
    )
