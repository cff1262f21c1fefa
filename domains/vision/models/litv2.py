"""LITv2: Fast Vision Transformers with HiLo Attention (Pan, Cai, Zhuang; NeurIPS 2022).

The first stages have convolving MLPs only; later ones split the heads of attention into high frequencies,
within windows, and low ones, among their means. Shapes: B images, H x W map, C channels. Maps between modules
are `(B, C, H, W)` in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.vit import initialise
from domains.vision.weights.litv2 import LITv2Official
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelNorm, ConvNorm, scale_and_shift
from zoo.registry import register_model


class DeformableMerging(nn.Module):
    """Patches of 2 x 2 pixels, each pixel taken from where an offset points to; norm and GELU.

    Offsets start at zero. What is left of an odd side is cut off. (Officially `offset` learns at a
    hundredth of the learning rate.)
    """

    norm: nn.Module

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 2, 2)
        self.offset = nn.Conv2d(dim, 8, 2, 2)
        self.norm, self.act = nn.BatchNorm2d(out_dim), nn.GELU()
        nn.init.zeros_(self.offset.weight)
        assert self.offset.bias is not None
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, out, H // 2, W // 2)`"""
        offset = self.offset(x)
        wide = torch.promote_types(x.dtype, torch.float32)  # there is no kernel for half precision on a CPU
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.conv.weight.to(wide), self.conv.bias
            bias = None if bias is None else bias.to(wide)
            x = deform_conv2d(x.to(wide), offset.to(wide), weight, bias, stride=(2, 2)).to(x.dtype)
        return self.act(self.norm(x)).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def fuse_(self) -> None:
        """Folds the norm into the convolution."""
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = scale_and_shift(self.norm)
            assert self.conv.bias is not None
            self.conv.weight.mul_(scale[:, None, None, None])
            self.conv.bias.mul_(scale).add_(shift)
            self.norm = nn.Identity()


class ConvolvingMlp(nn.Module):
    """An MLP with a depthwise convolution over 3 x 3 pixels before its activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class Block(nn.Module):
    """Attention, where there is one, and MLP, each with a residual."""

    def __init__(self, dim: int, attn: nn.Module | None, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = None if attn is None else nn.LayerNorm(dim)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = ConvolvingMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = x.permute(0, 2, 3, 1)
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(on_map(self.attn, self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class Stem(ConvNorm):
    """Patches of 4 x 4 pixels; what is left over at the right and the bottom is not seen."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__(in_chans, dim, 4, 4, 0, bias=True, norm=ChannelNorm(dim))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class LITv2(Backbone):
    """LITv2. Any image size works; windows at the border of a map hold what there is of them.

    Args:
        embed_dim: channels of the first stage, doubled by each further one.
        depths: blocks of each stage.
        num_heads: of the attention of each stage.
        local_ws: side of the windows of HiLo attention in each stage; 0 = blocks without attention, 1 = full
            attention.
        alpha: share of the heads for low frequencies.
        mlp_ratio: hidden width of the MLP over the width of the stage.
        qkv_bias: of the projections to queries, keys and values.
        attention: a layer of the zoo in the place of HiLo attention: a name, or a mapping with its name and
            arguments (`zoo list attention`).
    """

    first_conv = "stem.conv"
    cfg: ClassVar[dict[str, Any]] = {"license": "apache-2.0", "crop_pct": 0.875}

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        local_ws: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not len(depths) == len(num_heads) == len(local_ws):
            raise ConfigError("depths, num_heads and local_ws have one number for each stage.")
        self.attention = attention
        dims = [embed_dim * 2**i for i in range(len(depths))]
        strides = [4 * 2**i for i in range(len(depths))]
        sides = self.pretrained_cfg["input_size"][1:]

        def attend(i: int) -> nn.Module | None:
            if not local_ws[i]:
                return None
            hilo = {"name": "hilo", "window": local_ws[i], "alpha": alpha, "qkv_bias": qkv_bias}
            chosen = hilo if attention is None else attention
            return map_attention(
                chosen, dims[i], num_heads[i], [max(1, side // strides[i]) for side in sides]
            )

        self.stem = Stem(self.in_chans, embed_dim)
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            blocks = [Block(dims[i], attend(i), mlp_ratio, rate) for rate in rates]
            self.stages.append(
                nn.Sequential(*([DeformableMerging(*dims[i - 1 : i + 1])] if i else []), *blocks)
            )
        self.norm = ChannelNorm(dims[-1])
        self.apply(initialise)
        self.finish(dims, strides)


_register = partial(
    register_model,
    model=LITv2,
    paper="Pan et al., Fast Vision Transformers with HiLo Attention, NeurIPS 2022, arXiv 2205.13213",
    licence="Apache-2.0",
    source="https://github.com/ziplab/LITv2",
    status="official parity",
    official=LITv2Official,
    preprocessing={"resize": "256, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)


@_register(
    summary="High and low frequencies, 28 M: 82.0 % on ImageNet-1k (paper)",
    weights=("litv2_s_in1k",),
)
def litv2_s(*, drop_path_rate: float = 0.2, **kwargs: Any) -> LITv2:
    return LITv2(drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="High and low frequencies, 49 M: 83.3 % on ImageNet-1k (paper)",
    weights=("litv2_m_in1k",),
)
def litv2_m(*, depths: Sequence[int] = (2, 2, 18, 2), drop_path_rate: float = 0.3, **kwargs: Any) -> LITv2:
    return LITv2(depths=depths, drop_path_rate=drop_path_rate, **kwargs)


@_register(
    summary="High and low frequencies, 87 M: 83.6 % on ImageNet-1k (paper)",
    weights=("litv2_b_in1k", "litv2_b_in1k_384"),
)
def litv2_b(
    *,
    embed_dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    num_heads: Sequence[int] = (4, 8, 16, 32),
    drop_path_rate: float = 0.5,
    **kwargs: Any,
) -> LITv2:
    return LITv2(
        embed_dim=embed_dim, depths=depths, num_heads=num_heads, drop_path_rate=drop_path_rate, **kwargs
    )
