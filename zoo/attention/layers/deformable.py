"""Multi-scale deformable attention of Deformable DETR."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.deformable import Shapes, deformable_attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import head_width


class DeformableAttention(nn.Module):
    """Each query reads `num_points` places of each map, near its reference (Zhu et al. 2021, equation 3).

    `W_o concat_h sum_lp a_hlp v_lh(r_l + o_hlp)`: the offsets o, in cells of a map, are linear in the query,
    and so are the scores of the weights a, a softmax over all points of all maps. For a box as reference, the
    unit of an offset is half a side over P. Tensor names are the official ones.

    B images, Q queries, C channels, H heads, L maps, P points, S cells of all maps, fine to coarse.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        num_levels: L.
        num_points: P.
        rings: offsets start in as many directions as there are heads, point p at a distance of p + 1 cells;
            otherwise at zero.
    """

    paper = "https://arxiv.org/abs/2010.04159"

    def __init__(
        self, dim: int, num_heads: int, *, num_levels: int = 4, num_points: int = 4, rings: bool = True
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        if min(num_levels, num_points) < 1:
            raise AttentionError(f"there is at least one map and one point, not {num_levels}, {num_points}")
        self.dim, self.num_heads = dim, num_heads
        self.num_levels, self.num_points = num_levels, num_points
        places = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(dim, 2 * places)
        self.attention_weights = nn.Linear(dim, places)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters(rings)

    def reset_parameters(self, rings: bool = True) -> None:
        """As in the official program."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if rings:
            angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
            directions = torch.stack([angles.cos(), angles.sin()], -1)
            directions = directions / directions.abs().amax(-1, keepdim=True)
            steps = torch.arange(1, self.num_points + 1)[:, None]
            offsets = (directions[:, None, None] * steps).expand(-1, self.num_levels, -1, -1)
            with torch.no_grad():
                self.sampling_offsets.bias.copy_(offsets.flatten())

    def values(self, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """What `forward` reads: of `memory` `(B, S, C)`, `(B, S, H, C / H)`.

        Args:
            mask: bool `(B, S)`, True = a real cell; the values of the others are zero.
        """
        (values,) = values_of([self], memory, mask)
        return values

    def forward(self, query: Tensor, references: Tensor, values: Tensor, shapes: Shapes) -> Tensor:
        """Queries `(B, Q, C)`, position included, to `(B, Q, C)`.

        Args:
            references: `(B, Q, L, 2)` as (x, y), or `(B, Q, L, 4)` as (x, y, w, h), in parts of each map.
            values: `(B, S, H, C / H)`, of `self.values`, or of `values_of` where layers share a memory.
            shapes: rows and columns of each map.

        Raises:
            AttentionError: shapes that do not fit together.
        """
        self._check(query, references)
        parts = (self.sampling_offsets, self.attention_weights)
        weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
        offsets, logits = F.linear(query, weight, bias).tensor_split([len(parts[0].bias)], -1)
        weights = logits.unflatten(-1, (self.num_heads, -1)).softmax(-1)
        locations = self._locations(offsets.unflatten(-1, (self.num_heads, -1)), references, shapes)
        points = (self.num_levels, self.num_points)
        out = deformable_attend(
            values, shapes, locations.unflatten(-1, (*points, 2)), weights.unflatten(-1, points)
        )
        return self.output_proj(out.flatten(2))

    def _locations(self, offsets: Tensor, references: Tensor, shapes: Shapes) -> Tensor:
        """`(B, Q, H, L P 2)`, in float32 or wider."""
        wide = torch.promote_types(references.dtype, torch.float32)
        references, offsets = references.to(wide)[:, :, :, None], offsets.to(wide)
        if references.shape[-1] == 4:
            unit = references[..., 2:] * (0.5 / self.num_points)
        else:
            sizes = [[columns, rows] for rows, columns in shapes]
            unit = 1 / references.new_tensor(sizes)[None, None, :, None]
        centre, unit = (
            part.expand(-1, -1, -1, self.num_points, -1).flatten(2)[:, :, None]
            for part in (references[..., :2], unit)
        )
        return torch.addcmul(centre, offsets, unit)

    def _check(self, query: Tensor, references: Tensor) -> None:
        if query.ndim != 3 or query.shape[-1] != self.dim:
            raise AttentionError(f"queries are (B, Q, {self.dim}), not {tuple(query.shape)}")
        wanted = (*query.shape[:2], self.num_levels)
        if references.ndim != 4 or references.shape[:3] != wanted or references.shape[3] not in (2, 4):
            raise AttentionError(f"references are {wanted} x 2 or 4, not {tuple(references.shape)}")


def values_of(
    layers: Sequence[DeformableAttention], memory: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """The values of several layers that read one memory `(B, S, C)`, by one matrix product.

    Args:
        mask: bool `(B, S)`, True = a real cell.

    Returns:
        `(B, S, H, C / H)` for each layer.
    """
    if memory.ndim != 3 or memory.shape[-1] != layers[0].dim:
        raise AttentionError(f"memory is (B, S, {layers[0].dim}), not {tuple(memory.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != memory.shape[:2]):
        raise AttentionError(
            f"a mask is bool {tuple(memory.shape[:2])}, True = a real cell, not {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    projections = [layer.value_proj for layer in layers]
    weight, bias = (torch.cat([getattr(p, name) for p in projections]) for name in ("weight", "bias"))
    values = F.linear(memory, weight, bias)
    if mask is not None:
        values = values.masked_fill(~mask[..., None], 0.0)
    parts = values.chunk(len(layers), -1)
    return [x.unflatten(-1, (layer.num_heads, -1)) for x, layer in zip(parts, layers, strict=True)]
