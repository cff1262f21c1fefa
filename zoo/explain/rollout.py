"""Attention rollout: what tokens contain of one another after several layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from zoo.attention.capture import AttentionMap
from zoo.explain.maps import tile_index
from zoo.explain.places import Places


def token_mixing(maps: Sequence[AttentionMap], places: Sequence[Places]) -> Tensor:
    """The mean over the heads of one layer's attention among the cells of its grid, `(B, G, G)`.

    Args:
        maps: of one layer: several where its heads attend one by one.
        places: of the tokens of each map, which are queries and keys alike.
    """
    cells = places[0].grid[0] * places[0].grid[1]
    heads = sum(found.sizes[1] for found in maps)
    batch = maps[0].sizes[0] // places[0].windows
    out = maps[0].tiles[0].weights.new_zeros(batch, cells + 1, cells + 1)
    for found, lie in zip(maps, places, strict=True):
        table = torch.nn.functional.pad(lie.cells, (0, 1), value=-1).to(out.device)
        for tile in found.tiles:
            b, i, j = tile_index(tile)
            rows, columns = (table[b % lie.windows, tokens] for tokens in (i, j))
            image = (b // lie.windows)[:, :, None]
            weights = tile.weights.detach().sum(1) / heads
            out.index_put_((image, rows[:, :, None], columns[:, None, :]), weights, accumulate=True)
    return out[:, :-1, :-1]


def rollout(layers: Sequence[Tensor], *, residual: float = 0.5) -> Tensor:
    """`R = A'_L ... A'_1`, `A' = residual I + (1 - residual) A`, rows made to sum to 1.

    Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers". Row i of the result says of which
    tokens before the first layer token i is made after the last, as far as attention tells.

    Args:
        layers: attention `(B, N, N)` of each layer, the first one first.
        residual: how much of a token goes past the attention.

    Example:
        >>> rollout([torch.eye(3)[None], torch.full((1, 3, 3), 1 / 3)])[0, 0]
        tensor([0.6667, 0.1667, 0.1667])
    """
    steps = []
    for attention in layers:
        step = residual * torch.eye(attention.shape[-1]).to(attention) + (1 - residual) * attention
        steps.append(step / step.sum(-1, keepdim=True))
    return reduce(lambda done, step: step @ done, steps)
