"""What plain vision transformers share: patches, and softmax attention with one matrix for q, k and v."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.vision.resizing import resized_table
from zoo.attention import Pattern, attend
from zoo.attention.layers.multihead import split_heads
from zoo.errors import ConfigError


class PatchEmbed(nn.Module):
    """Patches of an image as tokens on a map, with learned positions.

    Images that are not a multiple of the patch are padded with zeros on the right and at the bottom;
    positions are resized to other grids than that of img_size (bicubic).

    Args:
        patch: side of a patch in pixels.
        grid: patches along height and width for images of img_size.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in_chans, H, W) -> (B, C, ceil(H / patch), ceil(W / patch))`"""
        rows, columns = (-side % self.patch for side in x.shape[2:])
        x = self.proj(F.pad(x, (0, columns, 0, rows)) if rows or columns else x)
        return x + resized_table(self.pos_embed.mT.unflatten(2, self.grid), x.shape[2:])


class SelfAttention(nn.Module):
    """Softmax attention among tokens `(B, N, C)` or those of a map `(B, H, W, C)`."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"Width {dim} is not divisible by num_heads={num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, pattern: Pattern | None = None) -> Tensor:
        rows = self.qkv(x.flatten(1, -2)).chunk(3, -1)
        out = attend(*(split_heads(part, self.num_heads) for part in rows), pattern=pattern)
        return self.proj(out.transpose(1, 2).flatten(2)).view(x.shape)


def initialise(module: nn.Module) -> None:
    """Linear layers as in ViT: truncated normal of 0.02, no bias; for `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
