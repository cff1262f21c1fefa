"""MALA: Rectifying Magnitude Neglect in Linear Attention (Fan, Huang, Ai, He; ICCV 2025).

Shapes: B images, H x W map, C channels. Maps between modules are `(B, C, H, W)` in channels-last memory, so
that attention and MLP read them as `(B, H, W, C)` without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.vit import initialise
from domains.vision.weights.mala import MALAOfficial
from zoo.attention import Dense, attend
from zoo.attention.layers import AttentionLayer
from zoo.attention.layers.base import masked
from zoo.attention.layers.magnitude import MagnitudeAware
from zoo.attention.rotary import rotary
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelsLast, ConvNorm, add_identity_, scaled
from zoo.registry import register_model


class RotarySoftmax(MagnitudeAware):
    """Softmax attention with the positions, convolution and gate of the magnitude-aware one (type `v`)."""

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        q, k = rotary(q, *tables, interleaved=True), rotary(k, *tables, interleaved=True)
        return attend(q, k, v, pattern=masked(Dense(), mask))


BLOCK_TYPES: dict[str, type[MagnitudeAware]] = {"l": MagnitudeAware, "v": RotarySoftmax}
"""Published attentions by their letters: linear and softmax."""


class FeedForward(nn.Module):
    """MLP with a depthwise 3 x 3 convolution, added to what it sees, after the activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.residual = True

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        x = F.gelu(self.fc1(x))
        near = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(x + near if self.residual else near)

    def fuse_(self) -> None:
        """Moves what is added into the kernel."""
        add_identity_(self.dwconv)
        self.residual = False


class Block(nn.Module):
    """Depthwise position encoding, attention and feed-forward, each with a residual."""

    def __init__(
        self,
        dim: int,
        attn: AttentionLayer,
        mlp_ratio: float,
        *,
        layer_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pos_residual = True
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.ffn = FeedForward(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1, self.gamma2 = (
                nn.Parameter(torch.full((dim,), float(layer_scale))) for _ in range(2)
            )

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = x + self.pos(x) if self.pos_residual else self.pos(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(scaled(on_map(self.attn, self.norm1(x)), self.gamma1))
        x = x + self.drop_path(scaled(self.ffn(self.norm2(x)), self.gamma2))
        return x.permute(0, 3, 1, 2)

    def fuse_(self) -> None:
        """Moves the residual of the position encoding into its kernel."""
        add_identity_(self.pos)
        self.pos_residual = False


class PreHead(nn.Sequential):
    """The map of the last stage to the wider one that is pooled."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__(ConvNorm(dim, out_features, bias=True), nn.SiLU())
        self.out_features = out_features


class MALA(Backbone):
    """MALA. Any image size works: positions are rotary, and nothing depends on the number of tokens.

    Args:
        embed_dims: channels of each stage.
        depths: blocks of each stage.
        num_heads: of each stage.
        mlp_ratios: hidden width of the feed-forward over the width of the stage.
        projection: channels of the map that is pooled for the classifier.
        block_types: for each stage `l`, magnitude-aware linear attention, or `v`, softmax attention.
        layer_scales: where the factors of the branches of each stage start; None = no factors.
        attention: another layer in place of the published attention of all blocks, by its name in `zoo list
            attention`, or a mapping with the name and arguments.
    """

    first_conv = "stem.1.conv"
    cfg = {"paper_ids": "arXiv:2507.00698"}  # noqa: RUF012

    def __init__(
        self,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        *,
        mlp_ratios: Sequence[float] = (3.5, 3.5, 3.5, 3.5),
        projection: int = 2048,
        block_types: Sequence[str] = ("l", "l", "v", "v"),
        layer_scales: Sequence[float | None] = (1.0, 1.0, 1.0, 1.0),
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        given = (embed_dims, depths, num_heads, mlp_ratios, block_types, layer_scales)
        if len({len(values) for values in given}) > 1:
            raise ConfigError(
                "embed_dims, depths, num_heads, mlp_ratios, block_types and layer_scales have one entry for "
                "each stage."
            )
        if unknown := set(block_types) - set(BLOCK_TYPES):
            raise ConfigError(f"block_types are 'l' (linear) and 'v' (softmax), not {unknown.pop()!r}.")
        self.attention, self.projection = attention, projection
        self.head_dims = [dim // heads for dim, heads in zip(embed_dims, num_heads, strict=True)]
        height, width = self.pretrained_cfg["input_size"][1:]

        def attn(i: int) -> AttentionLayer:
            shape = (-(-height // (4 * 2**i)), -(-width // (4 * 2**i)))
            if attention is not None:
                return map_attention(attention, embed_dims[i], num_heads[i], shape)
            return BLOCK_TYPES[block_types[i]](embed_dims[i], num_heads[i], shape=shape)

        self.stem = _stem(self.in_chans, embed_dims[0])
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            dim = embed_dims[i]
            down = [ConvNorm(embed_dims[i - 1], dim, 3, 2, bias=True)] if i else []
            blocks = [
                Block(dim, attn(i), mlp_ratios[i], layer_scale=layer_scales[i], drop_path=rate)
                for rate in rates
            ]
            self.stages.append(nn.Sequential(*down, *blocks))
        self.apply(initialise)
        self.finish(embed_dims, [4 * 2**i for i in range(len(depths))])

    def make_pre_head(self) -> nn.Module:
        return PreHead(self.num_features, self.projection)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map of `forward_features` to logits, widened before it is pooled."""
        if not self.global_pool:
            return x
        x = self.head_norm(self.pooled(self.pre_head(x)))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.head(x)

    def fuse_(self) -> None:
        """Lays kernels out as the maps are, which convolutions would do at every call."""
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    """Four 3 x 3 convolutions to a quarter of the sides."""
    half = dim // 2
    return nn.Sequential(
        ChannelsLast(),
        ConvNorm(in_chans, half, 3, 2, bias=True),
        nn.GELU(),
        ConvNorm(half, half, 3, bias=True),
        nn.GELU(),
        ConvNorm(half, half, 3, bias=True),
        nn.GELU(),
        ConvNorm(half, dim, 3, 2, bias=True),
    )


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=MALA,
    paper="Fan et al., Rectifying Magnitude Neglect in Linear Attention, ICCV 2025, arXiv 2507.00698",
    licence="none stated",
    source="https://github.com/qhfan/MALA",
    status="official parity",
    official=MALAOfficial,
    preprocessing={"resize": "256, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)


@_register(summary="Magnitude-aware linear attention, 16 M: 82.9 % on ImageNet-1k (paper)")
def mala_tiny(**kwargs: Any) -> nn.Module:
    return MALA(**kwargs)


@_register(summary="Magnitude-aware linear attention, 27 M")
def mala_small(
    *,
    embed_dims: Sequence[int] = (64, 128, 320, 512),
    depths: Sequence[int] = (3, 5, 9, 3),
    num_heads: Sequence[int] = (1, 2, 5, 8),
    **kwargs: Any,
) -> nn.Module:
    return MALA(embed_dims, depths, num_heads, **kwargs)


@_register(summary="Magnitude-aware linear attention, 50 M: 85.7 % on ImageNet-1k (paper)")
def mala_base(
    *,
    embed_dims: Sequence[int] = (96, 192, 384, 512),
    depths: Sequence[int] = (4, 6, 12, 6),
    num_heads: Sequence[int] = (1, 2, 6, 8),
    **kwargs: Any,
) -> nn.Module:
    return MALA(embed_dims, depths, num_heads, **kwargs)


@_register(summary="Magnitude-aware linear attention, 98 M")
def mala_large(
    *,
    embed_dims: Sequence[int] = (96, 192, 448, 640),
    depths: Sequence[int] = (4, 7, 19, 8),
    num_heads: Sequence[int] = (1, 2, 7, 10),
    projection: int = 2560,
    **kwargs: Any,
) -> nn.Module:
    return MALA(embed_dims, depths, num_heads, projection=projection, **kwargs)
