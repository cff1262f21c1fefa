"""The layout of PVT (Wang et al., Pyramid Vision Transformer, ICCV 2021), for other kinds of attention.

Patches, a position table for each stage, pre-norm blocks, no norm at the end, the mean over all tokens.
Shapes: B images, H x W map, C channels. Maps between modules are `(B, C, H, W)` in channels-last memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from domains.vision.attention import Choice, map_attention, on_map
from domains.vision.backbone import Backbone
from domains.vision.vit import initialise
from zoo.attention import attend
from zoo.attention.layers.multihead import split_heads
from zoo.errors import ConfigError
from zoo.layers.conv import ChannelNorm


class PatchEmbedding(nn.Module):
    """Patches, a norm, and the table of positions, bilinear between its entries on maps of another size.

    What is left over at the right and the bottom is not seen.

    Args:
        shape: height and width of the table.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = ChannelNorm(dim)
        self.position = nn.Parameter(torch.empty(1, dim, *shape))
        nn.init.trunc_normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W) -> (B, C, H / patch, W / patch)`"""
        x = self.norm(self.proj(x.contiguous(memory_format=torch.channels_last)))
        position = self.position
        if position.shape[2:] != x.shape[2:]:
            position = F.interpolate(position, x.shape[2:], mode="bilinear")
        return x + position.to(x.dtype)


class ReducedAttention(nn.Module):
    """The attention of PVT: keys and values come from patches of `reduction` x `reduction` pixels."""

    def __init__(self, dim: int, num_heads: int, reduction: int, qkv_bias: bool) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"Width {dim} is not divisible by {num_heads} heads.")
        self.num_heads, self.reduction = num_heads, reduction
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        if reduction > 1:
            self.sr = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, W, C) -> (B, H, W, C)`"""
        source = x
        if self.reduction > 1:
            short = [max(0, self.reduction - side) for side in x.shape[1:3]]
            map = F.pad(x.permute(0, 3, 1, 2), (0, short[1], 0, short[0]))
            source = self.norm(self.sr(map).permute(0, 2, 3, 1))
        q = split_heads(self.q(x).flatten(1, 2), self.num_heads)
        k, v = (split_heads(t, self.num_heads) for t in self.kv(source).flatten(1, 2).chunk(2, -1))
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2).view(x.shape))


class Block(nn.Module):
    """Attention and MLP, each with a residual."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C, H, W)`"""
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(on_map(self.attn, self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class PVT(Backbone):
    """The layout of PVT; a subclass gives the attention of each stage.

    Any image size works: tables are made for img_size and resized bilinearly for others.

    Args:
        embed_dims, depths, num_heads, mlp_ratios: of each stage.
        attn_types: of each stage, a letter: that of the subclass, or `B`, the reduced attention of PVT.
        sr_ratios: the reduction of each stage, where it has the attention of PVT.
        qkv_bias: of the projections to queries, keys and values.
        patch_size: pixels along each side of the first patches; later ones have 2.
        attention: a layer of the zoo in every block: a name, or a mapping with its name and arguments
            (`zoo list attention`).
    """

    first_conv = "stem.proj"
    cfg: ClassVar[dict[str, Any]] = {"license": "unknown", "crop_pct": 0.875}
    letter: ClassVar[str]
    """Of the attention that the subclass gives."""

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        attn_types: str = "",
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        qkv_bias: bool = True,
        patch_size: int = 4,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        levels = len(depths)
        attn_types = attn_types or self.letter * levels
        if not levels == len(embed_dims) == len(num_heads) == len(mlp_ratios) == len(attn_types):
            raise ConfigError(
                "depths, embed_dims, num_heads, mlp_ratios and attn_types have one entry for each stage."
            )
        if not set(attn_types) <= {self.letter, "B"}:
            raise ConfigError(f"attn_types has letters {self.letter} and B, not {attn_types!r}.")
        self.attention, self.qkv_bias = attention, qkv_bias
        strides = [patch_size * 2**i for i in range(levels)]
        sides = self.pretrained_cfg["input_size"][1:]
        shapes = [tuple(max(1, side // stride) for side in sides) for stride in strides]

        def attn(i: int) -> nn.Module:
            if attention is not None:
                return map_attention(attention, embed_dims[i], num_heads[i], shapes[i])
            if attn_types[i] == "B":
                return ReducedAttention(embed_dims[i], num_heads[i], sr_ratios[i], qkv_bias)
            return self.make_attention(i, embed_dims[i], num_heads[i], shapes[i])

        self.stem = PatchEmbedding(self.in_chans, embed_dims[0], patch_size, shapes[0])
        self.stages = nn.Sequential()
        for i, rates in enumerate(self.drop_path_rates(depths)):
            patches = [PatchEmbedding(embed_dims[i - 1], embed_dims[i], 2, shapes[i])] if i else []
            blocks = [Block(embed_dims[i], attn(i), mlp_ratios[i], rate) for rate in rates]
            self.stages.append(nn.Sequential(*patches, *blocks))
        self.apply(initialise)
        self.finish(embed_dims, strides)

    def make_attention(self, i: int, dim: int, num_heads: int, shape: tuple[int, ...]) -> nn.Module:
        """The attention of the blocks of stage i, on maps of this height and width."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".position", "_bias"))}
