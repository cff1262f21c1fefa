"""The layout of DeiT (Touvron et al., Training Data-efficient Image Transformers, ICML 2021), for other kinds
of attention: patches, a class token, learned positions, pre-norm blocks."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from torch import Tensor, nn

from domains.vision.attention import Choice
from domains.vision.class_token import ClassTokenBackbone, TokenNorm, Tokens, apart
from domains.vision.resizing import resized_table
from domains.vision.vit import initialise
from zoo.attention.layers import AttentionLayer, create_attention, on_tokens


class PatchesAndClass(nn.Module):
    """Patches of an image and a class token, with learned positions.

    Images that are not a multiple of the patch are filled up with zeros at the bottom and on the right;
    positions are resized to other grids than that of img_size (bicubic).

    Args:
        grid: patches along height and width for images of img_size.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        positions = torch.empty(1, 1 + grid[0] * grid[1], dim)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(positions, std=0.02))

    def forward(self, x: Tensor) -> Tokens:
        """Images `(B, in_chans, H, W)` to a map of sides `ceil(H / patch)` and `ceil(W / patch)`."""
        rows, columns = (-side % self.proj.stride[0] for side in x.shape[2:])
        x = self.proj(F.pad(x, (0, columns, 0, rows)) if rows or columns else x)
        table = resized_table(self.pos_embed[:, 1:].mT.unflatten(2, self.grid), x.shape[2:])
        token = self.cls_token[:, 0] + self.pos_embed[:, 0]
        return Tokens(x + table.to(x.dtype), token.to(x.dtype).expand(x.shape[0], -1))


class Block(nn.Module):
    """Attention and MLP, each with a residual.

    Args:
        attn: of class token and map, row by row.
        on_grid: whether it knows of both; otherwise they are one sequence to it.
    """

    def __init__(
        self, dim: int, attn: AttentionLayer, on_grid: bool, mlp_ratio: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.on_grid = attn, on_grid
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens) -> Tokens:
        shape, x = tokens.map.shape[2:], tokens.together()
        seen = self.norm1(x)
        x = x + self.drop_path(on_tokens(self.attn, seen, shape) if self.on_grid else self.attn(seen))
        return apart(x + self.drop_path(self.mlp(self.norm2(x))), shape)


class DeiT(ClassTokenBackbone):
    """The layout of DeiT, whose attention a subclass gives. Each block is a feature level.
    Any image size works.

    Args:
        patch_size: pixels along the side of a token.
        embed_dim: C.
        depth: blocks.
        num_heads: of every block.
        mlp_ratio: hidden width of the MLP over C.
        qkv_bias: of the projections to queries, keys and values.
        attention: a layer of the zoo in every block: a name, or a mapping with its name and arguments
            (`zoo list attention`). Class token and map are one sequence to it.
    """

    first_conv = "stem.proj"
    cfg: ClassVar[dict[str, Any]] = {"license": "unknown", "crop_pct": 0.875}

    def __init__(
        self,
        *,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention: Choice | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.attention, self.qkv_bias = attention, qkv_bias
        height, width = (-(-side // patch_size) for side in self.pretrained_cfg["input_size"][1:])

        def attn() -> AttentionLayer:
            if attention is not None:
                return create_attention(attention, embed_dim, causal=False, num_heads=num_heads)
            return self.make_attention(embed_dim, num_heads, (height, width))

        self.stem = PatchesAndClass(self.in_chans, embed_dim, patch_size, (height, width))
        (rates,) = self.drop_path_rates([depth])
        self.stages = nn.Sequential(
            *(nn.Sequential(Block(embed_dim, attn(), attention is None, mlp_ratio, rate)) for rate in rates)
        )
        self.norm = TokenNorm(embed_dim, eps=1e-6)
        self.apply(initialise)
        self.finish([embed_dim] * depth, [patch_size] * depth)

    def make_attention(self, dim: int, num_heads: int, shape: tuple[int, int]) -> AttentionLayer:
        """The attention of a block, of a class token and a map of this height and width."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        tables = ("stem.cls_token", "stem.pos_embed")
        return {n for n, _ in self.named_parameters() if n in tables or n.endswith("_bias")}
