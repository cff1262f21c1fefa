"""Parts of Group Pose (Liu et al. 2023, arXiv 2308.07313): encoder, factored decoder, geometry of maps.

Shapes: B images, S cells of all L maps (fine to coarse, row-major), d width, N instances, K keypoints,
T = K + 1 tokens of an instance, of which the first stands for the instance itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.detection.models.common import resized_mask
from domains.detection.models.conditional import FFN
from zoo.attention import attend
from zoo.attention.deformable import Shapes
from zoo.attention.layers.deformable import DeformableAttention


class EncoderLayer(nn.Module):
    """Deformable attention and FFN, each followed by the norm of the sum."""

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, dropout: float, *, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.self_attn = deformable(dim, num_heads, num_levels, num_points)
        self.ffn = FFN(dim, ffn_dim, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, pos: Tensor, references: Tensor, shapes: Shapes, real: Tensor | None
    ) -> Tensor:
        """`(B, S, d) -> (B, S, d)`; pos `(B or 1, S, d)`, references `(B, S, L, 2)`, real cells `(B, S)`."""
        values = self.self_attn.values(x, real)
        x = self.norm1(x + self.dropout(self.self_attn(x + pos, references, values, shapes)))
        return self.norm2(x + self.dropout(self.ffn(x)))


def deformable(dim: int, num_heads: int, num_levels: int, num_points: int) -> DeformableAttention:
    """With the offsets of the official program: in rings only where points come in fours."""
    options = {"num_levels": num_levels, "num_points": num_points, "rings": num_points % 4 == 0}
    return DeformableAttention(dim, num_heads, **options)


class TokenAttention(nn.Module):
    """Softmax attention of tokens to those that share all axes but the last but one."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, *, across: bool) -> Tensor:
        """`(B, N, T, d)`: T tokens of one instance see each other; `across`, N tokens of one kind do."""
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        order = (3, 0, 2, 4, 1, 5) if across else (3, 0, 1, 4, 2, 5)
        q, k, v = parts.permute(order).flatten(1, 2)
        out = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        out = out.unflatten(0, (len(x), -1))
        return self.out(out.permute((0, 3, 1, 2, 4) if across else (0, 1, 3, 2, 4)).flatten(3))


class DecoderLayer(nn.Module):
    """Attention within instances, across them, to the maps, and FFN, each followed by the norm of the sum.

    Positions are added to the tokens themselves, before the first and before the third part: they stand in
    values and residuals too, other than in the paper, as in the official program.
    """

    def __init__(
        self, dim: int, num_heads: int, ffn_dim: int, dropout: float, *, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.within_attn = TokenAttention(dim, num_heads, dropout)
        self.across_attn = TokenAttention(dim, num_heads, dropout)
        self.cross_attn = deformable(dim, num_heads, num_levels, num_points)
        self.ffn = FFN(dim, ffn_dim, dropout)
        self.within_norm, self.across_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, references: Tensor, values: Tensor, shapes: Shapes) -> Tensor:
        """`(B, N, T, d) -> (B, N, T, d)`

        Args:
            x: with positions.
            pos: `(B, N, T, d)`, zero for the instance token.
            references: `(B, N T, L, 2)`.
            values: of `cross_attn`, `(B, S, H, d / H)`.
        """
        x = self.within_norm(x + self.dropout(self.within_attn(x, across=False)))
        x = self.across_norm(x + self.dropout(self.across_attn(x, across=True)))
        x = x + pos
        read = self.cross_attn(x.flatten(1, 2), references, values, shapes)
        x = self.norm1(x + self.dropout(read.view_as(x)))
        return self.norm2(x + self.dropout(self.ffn(x)))


# ---- geometry of padded maps -------------------------------------------------------------------------------


class Cells(NamedTuple):
    """The cells of all maps of a batch; B = 1 where no image is padded."""

    shapes: tuple[tuple[int, int], ...]
    masks: list[Tensor | None]
    """Of each map, bool `(B, H, W)`, True = padding."""
    real: Tensor | None
    """Bool `(B, S)`; None: all."""
    valid: Tensor
    """Columns and rows of each map that are not padding, in parts of the map, `(B, L, 2)`."""
    centres: Tensor
    """(x, y) in parts of what is not padding, `(B, S, 2)`; beyond 1 in padding."""

    @property
    def references(self) -> Tensor:
        """The centres in parts of each map, `(B, S, L, 2)`."""
        return self.centres[:, :, None] * self.valid[:, None]

    def proposable(self) -> Tensor:
        """Which cells may propose an instance, bool `(B, S)`: real ones, the centre within (0.01, 0.99)."""
        inside = ((self.centres > 0.01) & (self.centres < 0.99)).all(-1)
        parts = inside.split([rows * columns for rows, columns in self.shapes], 1)
        # Sides of 0.05 in the finest map, doubled from map to map, have to lie within the same limits.
        fitting = [part & (0.05 * 2**i < 0.99) for i, part in enumerate(parts)]
        inside = torch.cat(fitting, 1)
        return inside if self.real is None else inside & self.real


def cells_of(shapes: Sequence[tuple[int, int]], mask: Tensor | None, device: torch.device) -> Cells:
    """Of maps of these sizes, given the mask of the images, bool `(B, H, W)`, True = padding."""
    masks = [None if mask is None else resized_mask(mask, shape) for shape in shapes]
    valid, centres = [], []
    for shape, padding in zip(shapes, masks, strict=True):
        rows, columns = (torch.arange(n, device=device) + 0.5 for n in shape)
        sizes = rows.new_tensor([[shape[1], shape[0]]])
        kept = sizes
        if padding is not None:
            kept = torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], -1).float()
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centres.append(torch.stack([x, y], -1).view(1, -1, 2) / kept[:, None])
        valid.append(kept / sizes)
    real = None if mask is None else ~torch.cat([m.flatten(1) for m in masks if m is not None], 1)
    return Cells(tuple(shapes), masks, real, torch.stack(valid, 1), torch.cat(centres, 1))


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """Maps `(B, d, H, W)` to their cells `(B, S, d)`."""
    return torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)


def padded_front(x: Tensor) -> Tensor:
    """`(B, N, K, d)` to `(B, N, K + 1, d)`, zeros for the instance token."""
    return F.pad(x, (0, 0, 1, 0))


def with_centre(keypoints: Tensor) -> Tensor:
    """Keypoints `(B, N, K, 2)` and, before them, their mean: `(B, N, K + 1, 2)`."""
    return torch.cat([keypoints.mean(2, keepdim=True), keypoints], 2)
