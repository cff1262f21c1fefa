"""How widely, and how far, the heads of a captured map look."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.attention.capture import AttentionMap
from zoo.explain.maps import tile_index
from zoo.explain.places import Places


@dataclass(frozen=True)
class HeadStatistics:
    """Means over the queries of a map, `(H,)` each.

    Attributes:
        entropy: of the weights of a query, in nats.
        effective_keys: exp of it: so many keys with equal weights would have that entropy.
        largest: the largest weight of a query.
        distance: to what is seen, weighted by it (Dosovitskiy et al. 2021, figure 7); NaN where queries or
            keys have no places.
    """

    entropy: Tensor
    effective_keys: Tensor
    largest: Tensor
    distance: Tensor


def head_statistics(
    found: AttentionMap,
    places: tuple[Places, Places] | None = None,
    size: tuple[float, float] = (1.0, 1.0),
) -> HeadStatistics:
    """Statistics of one map, over all entries of its batch.

    Queries without any weight, and queries that lie in padding, are left out.

    Args:
        places: of queries and keys.
        size: height and width of the image: the unit of the distance.
    """
    heads = found.sizes[1]
    totals, distances = torch.zeros(4, heads).double(), torch.zeros(2, heads).double()
    for tile in found.tiles:
        weights = tile.weights.detach().double().cpu()
        b, i, j = (part.cpu() for part in tile_index(tile))
        counted = (i >= 0)[:, None] & (weights.sum(-1) > 0)  # (T, H, nq)
        if places is not None:
            counted &= ~_in_padding(places[0], b, i)[:, None]
            far = _distance(weights, _points(places[0], b, i), _points(places[1], b, j), size)
            known = counted & ~far.isnan()
            distances += torch.stack([(far.nan_to_num() * known).sum((0, 2)), known.sum((0, 2))])
        entropy = torch.special.entr(weights).sum(-1)
        values = (entropy, entropy.exp(), weights.amax(-1), torch.ones_like(entropy))
        totals += torch.stack([(value * counted).sum((0, 2)) for value in values])
    entropy, effective, largest = totals[:3] / totals[3]
    return HeadStatistics(entropy, effective, largest, distances[0] / distances[1])


def _points(places: Places, b: Tensor, tokens: Tensor) -> Tensor:
    """`(T, n, 2)`"""
    points = places.points[b % places.windows, tokens.clamp(min=0)]
    return points.masked_fill((tokens < 0)[..., None], torch.nan)


def _in_padding(places: Places, b: Tensor, tokens: Tensor) -> Tensor:
    """Whether tokens `(T, n)` have a cell, but outside of the image."""
    cells = places.cells[b % places.windows, tokens.clamp(min=0)]
    return (cells >= 0) & _points(places, b, tokens).isnan().any(-1)


def _distance(weights: Tensor, queries: Tensor, keys: Tensor, size: tuple[float, float]) -> Tensor:
    """Mean distance `(T, H, nq)` of keys that lie in the image, by weights `(T, H, nq, nk)`."""
    unit = torch.tensor(size)
    far = torch.cdist(queries.nan_to_num() * unit, keys.nan_to_num() * unit).double()
    seen = weights * ~keys.isnan().any(-1)[:, None, None]
    mean = (seen * far[:, None]).sum(-1) / seen.sum(-1)
    return mean.masked_fill(queries.isnan().any(-1)[:, None], torch.nan)
