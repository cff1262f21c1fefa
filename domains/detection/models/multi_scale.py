"""What the detectors on several maps have in common: projections of the backbone's maps and their positions.

Shapes: B images, S cells of all L maps (fine to coarse), d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from domains.detection.models.common import sine_position
from domains.detection.models.group_pose_layers import Cells

GROUPS = 32
"""Of the norms of the maps."""


def projections(channels: Sequence[int], dim: int, num_levels: int) -> nn.ModuleList:
    """Of each level: 1 x 1 for the maps of the backbone, 3 x 3 with stride 2 for those beyond."""
    convs = [nn.Conv2d(width, dim, 1) for width in channels]
    beyond = [channels[-1], *[dim] * num_levels][: num_levels - len(channels)]
    convs += [nn.Conv2d(width, dim, 3, stride=2, padding=1) for width in beyond]
    for conv in convs:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
    return nn.ModuleList(nn.Sequential(conv, nn.GroupNorm(GROUPS, dim)) for conv in convs)


def projected(layers: nn.ModuleList, features: Sequence[Tensor]) -> list[Tensor]:
    """`(B, d, H_l, W_l)` of all L levels: the first beyond the backbone's reads its last map as it is."""
    maps: list[Tensor] = []
    for i, project in enumerate(layers):
        given = [*features, features[-1]][i] if i <= len(features) else maps[-1]
        maps.append(project(given))
    return maps


def positions(cells: Cells, level_embed: Tensor, temperature: float) -> Tensor:
    """Sine encoding of each cell and the embedding `(L, d)` of its level: `(B or 1, S, d)`."""
    dim, device = level_embed.shape[1], level_embed.device
    parts = [
        sine_position(shape, mask, dim, temperature=temperature, device=device).flatten(1, 2) + level
        for shape, mask, level in zip(cells.shapes, cells.masks, level_embed, strict=True)
    ]
    return torch.cat(parts, 1)
