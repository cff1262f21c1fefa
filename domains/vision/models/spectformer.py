"""SpectFormer: Frequency and Attention is what you need in a Vision Transformer (Patro, Namboodiri,
Agneeswaran; 2023): spectral blocks first, attention after.

Shapes: B images, H x W patches, C channels. Maps between modules are `(B, C, H, W)` in channels-last memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.spectrum import filtered, resized_filter
from domains.vision.vit import PatchEmbed, SelfAttention, initialise
from domains.vision.weights.spectformer import SpectFormerOfficial
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelNorm
from zoo.registry import register_model


class SpectralGate(nn.Module):
    """A learned filter on the two-dimensional spectrum: a circular convolution as large as the map.

    Args:
        grid: height and width that the filter is learned for; see `resized_filter` for others.
    """

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`; computed in float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.complex_weight.to(wide).movedim(-1, 0)
        with torch.autocast(x.device.type, enabled=False):
            return filtered(x.to(wide), resized_filter(weight, x.shape[1:3], self.grid[1])).to(x.dtype)


class SpectralBlock(nn.Module):
    """Filter and MLP, each behind a norm, with one residual over both."""

    def __init__(self, dim: int, hidden: int, grid: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.filter = SpectralGate(dim, grid)
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        y = x.permute(0, 2, 3, 1)
        y = y + self.drop_path(self.mlp(self.norm2(self.filter(self.norm1(y)))))
        return y.permute(0, 3, 1, 2)


class AttentionBlock(nn.Module):
    """Attention over the whole map and MLP, each behind a norm and with a residual."""

    def __init__(self, dim: int, hidden: int, attn: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = Mlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(on_map(self.attn, self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class SpectFormer(Backbone):
    """SpectFormer without pyramid; each block is a feature level.

    Any image size works (the official program takes one): images are padded to patches, position embeddings
    are resized bicubically, and filters keep the extent of their kernels in tokens.

    Args:
        patch_size: side of a patch in pixels.
        embed_dim: C.
        depth: blocks.
        num_spectral: how many of them, the first ones, are spectral.
        num_heads: of the attention blocks; 6 in the official program, whatever C is.
        mlp_ratio: hidden width of the MLP over C.
        attention: another layer in place of softmax attention in the attention blocks, by its name in `zoo
            list attention`, or a mapping with the name and arguments.
    """

    first_conv = "stem.proj"
    cfg = {"crop_pct": 0.9, "paper_ids": "arXiv:2304.06446"}  # noqa: RUF012

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_spectral: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not 0 <= num_spectral <= depth:
            raise ConfigError(f"num_spectral={num_spectral} of depth={depth} blocks.")
        self.attention = attention
        height, width = self.pretrained_cfg["input_size"][1:]
        grid = (-(-height // patch_size), -(-width // patch_size))
        hidden = int(embed_dim * mlp_ratio)

        def block(i: int, rate: float) -> nn.Module:
            if i < num_spectral:
                return SpectralBlock(embed_dim, hidden, grid, rate)
            if attention is None:
                attn = SelfAttention(embed_dim, num_heads)
            else:
                attn = map_attention(attention, embed_dim, num_heads, grid)
            return AttentionBlock(embed_dim, hidden, attn, rate)

        self.stem = PatchEmbed(self.in_chans, embed_dim, patch_size, grid)
        (rates,) = self.drop_path_rates([depth])
        self.stages = nn.Sequential(*(nn.Sequential(block(i, rate)) for i, rate in enumerate(rates)))
        self.norm = ChannelNorm(embed_dim, eps=1e-6)
        self.apply(initialise)
        self.finish([embed_dim] * depth, [patch_size] * depth)


# ---- variants ----------------------------------------------------------------------------------------------

_register = partial(
    register_model,
    model=SpectFormer,
    paper="Patro et al., SpectFormer: Frequency and Attention is what you need in a Vision Transformer, 2023",
    licence="none stated",
    source="https://github.com/badripatro/SpectFormers",
    official=SpectFormerOfficial,
    preprocessing={"resize": "248, bicubic", "crop": "224, centre", "normalise": "ImageNet mean and std"},
)
_HEADS = "The official program has 6 heads, which do not divide this width; heads of 64 channels here."


@_register(summary="Spectral and attention blocks, 9 M", status="re-implementation", notes=_HEADS)
def spectformer_tiny(*, embed_dim: int = 256, num_heads: int = 4, **kwargs: Any) -> nn.Module:
    return SpectFormer(embed_dim=embed_dim, num_heads=num_heads, **kwargs)


@_register(summary="Spectral and attention blocks, 20 M", status="official parity")
def spectformer_xs(**kwargs: Any) -> nn.Module:
    return SpectFormer(**kwargs)


@_register(summary="Spectral and attention blocks, 32 M", status="official parity")
def spectformer_small(*, depth: int = 19, **kwargs: Any) -> nn.Module:
    return SpectFormer(depth=depth, **kwargs)


@_register(summary="Spectral and attention blocks, 57 M", status="re-implementation", notes=_HEADS)
def spectformer_base(
    *, embed_dim: int = 512, depth: int = 19, num_heads: int = 8, **kwargs: Any
) -> nn.Module:
    return SpectFormer(embed_dim=embed_dim, depth=depth, num_heads=num_heads, **kwargs)
