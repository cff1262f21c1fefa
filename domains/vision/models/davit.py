"""DaViT: Dual Attention Vision Transformers (Ding, Xiao, Codella, Luo, Wang, Yuan; ECCV 2022).

Windows of tokens and groups of channels attend in turn. Shapes: B images, H x W map, C channels. Maps between
modules are `(B, C, H, W)` in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.vit import initialise
from domains.vision.weights.davit import DaViTOfficial
from zoo.attention import attend
from zoo.attention.layers.channel import ChannelGroups
from zoo.attention.layers.multihead import split_heads
from zoo.attention.maps import from_windows, padded, windows
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelNorm, add_identity_
from zoo.registry import register_model, variant


class WindowAttention(nn.Module):
    """Attention within windows of a map, filled up with zeros at the bottom and on the right.

    What fills up is seen: its keys and values are the biases of the projections (both programs do so).
    """

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"Width {dim} is not divisible by {num_heads} heads.")
        self.num_heads, self.size = num_heads, (window_size, window_size)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        height, width = x.shape[1:3]
        x = padded(x, self.size)
        qkv = self.qkv(windows(x, self.size)).chunk(3, -1)
        out = attend(*(split_heads(rows, self.num_heads) for rows in qkv))
        out = from_windows(out.transpose(1, 2).flatten(2), self.size, (x.shape[1], x.shape[2]))
        return self.proj(out[:, :height, :width])


class Stem(nn.Module):
    """Overlapping patches at a stride of 4; an image is filled up with zeros to a multiple of it."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, 4, 3)
        self.norm = ChannelNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W) -> (B, C, ceil(H / 4), ceil(W / 4))`"""
        x = F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
        return self.norm(self.conv(x.contiguous(memory_format=torch.channels_last)))


class Downsample(nn.Module):
    """A norm, then a convolution at a stride of 2.

    Args:
        kernel_size: 2, with zeros beside maps of odd size, or 3, with zeros around.
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size not in (2, 3):
            raise ConfigError(f"down_kernel_size is 2 or 3, not {kernel_size}.")
        self.norm = ChannelNorm(dim)
        self.conv = nn.Conv2d(dim, out_dim, kernel_size, 2, kernel_size - 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, out, ceil(H / 2), ceil(W / 2))`"""
        x = self.norm(x)
        if self.conv.kernel_size[0] == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.conv(x)


class PositionEncoding(nn.Conv2d):
    """`x + conv(x)`, depthwise over 3 x 3 pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim)
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        return x + super().forward(x) if self.residual else super().forward(x)

    def fuse_(self) -> None:
        """Moves the residual into the kernel."""
        if self.residual:
            add_identity_(self)
            self.residual = False


class Block(nn.Module):
    """Attention and MLP, each after a position encoding, each with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = PositionEncoding(dim), PositionEncoding(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path(on_map(self.attn, self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class DaViT(Backbone):
    """DaViT: in each stage, blocks of window attention and of channel attention in turn.

    Images and maps of any size are filled up with zeros where a stride or a window needs it, as in timm.

    Args:
        depths: pairs of blocks of each stage.
        embed_dims: channels of each stage.
        num_heads: of both kinds of attention in each stage.
        window_size: pixels along each side of a window.
        mlp_ratio: hidden width of the MLP over the width of the stage.
        down_kernel_size: of the convolutions between stages, 2 or 3.
        affinity: of the channels, `kv` or `qk`, see `zoo.attention.layers.channel.ChannelGroups`.
        attention: a layer of the zoo in the place of window attention: a name, or a mapping with its name and
            arguments (`zoo list attention`).
    """

    first_conv = "stem.conv"
    cfg: ClassVar[dict[str, Any]] = {"license": "mit", "crop_pct": 0.95}

    def __init__(
        self,
        *,
        depths: Sequence[int] = (1, 1, 3, 1),
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        down_kernel_size: int = 2,
        affinity: Literal["kv", "qk"] = "kv",
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not len(depths) == len(embed_dims) == len(num_heads):
            raise ConfigError("depths, embed_dims and num_heads have one number for each stage.")
        self.affinity, self.attention = affinity, attention
        strides = [4 * 2**i for i in range(len(depths))]
        sides = self.pretrained_cfg["input_size"][1:]

        def spatial(i: int) -> nn.Module:
            if attention is None:
                return WindowAttention(embed_dims[i], num_heads[i], window_size)
            shape = [-(-side // strides[i]) for side in sides]
            return map_attention(attention, embed_dims[i], num_heads[i], shape)

        def channel(i: int) -> nn.Module:
            return ChannelGroups(embed_dims[i], num_heads[i], affinity=affinity)

        self.stem = Stem(self.in_chans, embed_dims[0])
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            down = [Downsample(embed_dims[i - 1], embed_dims[i], down_kernel_size)] if i else []
            blocks = [
                Block(embed_dims[i], make(i), mlp_ratio, rate)
                for rate in rates
                for make in (spatial, channel)
            ]
            self.stages.append(nn.Sequential(*down, *blocks))
        self.apply(initialise)
        self.finish(embed_dims, strides)

    def make_pre_head(self) -> nn.Module:
        """The norm of the pooled features."""
        return nn.LayerNorm(self.num_features)

    def fuse_(self) -> None:
        """Lays kernels out as the maps are, which convolutions would do at every call."""
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


_register = partial(
    register_model,
    model=DaViT,
    paper="Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645",
    licence="MIT",
    source="https://github.com/dingmyu/davit",
    status="official parity",
    official=DaViTOfficial,
    preprocessing={"resize": "235, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)

_BASE = {"depths": (1, 1, 9, 1), "embed_dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)}
_LARGE = {"depths": (1, 1, 9, 1), "embed_dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)}
_HUGE = {"depths": (1, 1, 9, 1), "embed_dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)}
_GIANT = {"depths": (1, 1, 12, 3), "embed_dims": (384, 768, 1536, 3072), "num_heads": (12, 24, 48, 96)}
_FLORENCE = {"window_size": 12, "down_kernel_size": 3, "affinity": "qk", "img_size": 768}

_register(
    summary="Windows and channel groups, 28 M: 82.8 % on ImageNet-1k (paper)",
    weights=("davit_tiny_msft_in1k",),
)(variant("davit_tiny", DaViT))
_register(
    summary="Windows and channel groups, 50 M: 84.2 % on ImageNet-1k (paper)",
    weights=("davit_small_msft_in1k",),
)(variant("davit_small", DaViT, depths=(1, 1, 9, 1)))
_register(
    summary="Windows and channel groups, 88 M: 84.6 % on ImageNet-1k (paper)",
    weights=("davit_base_msft_in1k",),
)(variant("davit_base", DaViT, **_BASE))
_register(summary="Windows and channel groups, 197 M")(variant("davit_large", DaViT, **_LARGE))
_register(summary="Windows and channel groups, 349 M")(variant("davit_huge", DaViT, **_HUGE))
_register(summary="Windows and channel groups, 1.4 G")(variant("davit_giant", DaViT, **_GIANT))

_register_florence = partial(_register, source="https://huggingface.co/microsoft/Florence-2-base")
_register_florence(
    summary="The image tower of Florence-2 base, 91 M; made for 768 x 768",
    weights=("davit_base_fl_msft_florence2",),
)(variant("davit_base_fl", DaViT, **_BASE, **_FLORENCE))
_register_florence(
    summary="The image tower of Florence-2 large, 363 M; made for 768 x 768",
    weights=("davit_huge_fl_msft_florence2",),
)(variant("davit_huge_fl", DaViT, **_HUGE, **_FLORENCE))
