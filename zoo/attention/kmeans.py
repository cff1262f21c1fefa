"""Offline k-means of keys by their directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.kernels import wide
from zoo.attention.select import ROWS


@torch.no_grad()
def spherical_kmeans(
    x: Tensor, clusters: int, *, mask: Tensor | None = None, iterations: int = 10, seed: int = 0
) -> Tensor:
    """The cluster of each vector, by cosine; the first centres are drawn as by k-means++.

    The draws use one sequence of random numbers for all rows and heads, so that what a row gives does not
    depend on the others, nor on padding behind it (Arthur and Vassilvitskii 2007, section 2.2).

    Args:
        x: `(B, H, M, D)`.
        clusters: number of them; some stay empty where there are fewer different vectors.
        mask: bool `(B, M)`, True = counts.
        iterations: of Lloyd's algorithm.
        seed: of the draws.

    Returns:
        `(B, H, M)`, numbers below `clusters`.
    """
    unit = F.normalize(wide(x), dim=-1)
    real = (
        unit.new_ones(unit.shape[:3]) if mask is None else mask[:, None].to(unit.dtype).expand(unit.shape[:3])
    )
    centres = _seeds(unit, real, clusters, seed)
    for _ in range(iterations):
        means, counts = cluster_means(unit, _nearest(unit, centres), clusters, mask)
        centres = torch.where((counts > 0)[..., None], F.normalize(means, dim=-1), centres)
    return _nearest(unit, centres)


def cluster_means(
    x: Tensor, labels: Tensor, clusters: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means `(B, H, C, D)` of the vectors `(B, H, M, D)` of each cluster, and how many they are `(B, H, C)`.

    Args:
        labels: `(B, H, M)`.
        clusters: C.
        mask: bool `(B, M)`, True = counts.
    """
    x = wide(x)
    real = _real(x, mask)
    counts = real.new_zeros(*x.shape[:2], clusters).scatter_add(-1, labels, real)
    at = labels[..., None].expand(x.shape)
    total = x.new_zeros(*x.shape[:2], clusters, x.shape[-1]).scatter_add(2, at, x * real[..., None])
    return total / counts.clamp(min=1)[..., None], counts


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, H, M)`: one for each vector that counts, else zero."""
    return x.new_ones(x.shape[:3]) if mask is None else mask[:, None].to(x.dtype).expand(x.shape[:3])


def _nearest(unit: Tensor, centres: Tensor) -> Tensor:
    parts = [(rows @ centres.transpose(-2, -1)).argmax(-1) for rows in unit.split(ROWS, 2)]
    return torch.cat(parts, -1)


def _seeds(unit: Tensor, real: Tensor, clusters: int, seed: int) -> Tensor:
    """`(B, H, clusters, D)`: each vector drawn with its square distance from those before as its weight."""
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distance, centres = real, []
    for draw in draws.to(unit.device):
        weight = torch.where(distance.sum(-1, keepdim=True) > 0, distance, real).double().cumsum(-1)
        at = torch.searchsorted(weight, weight[..., -1:] * draw, right=True).clamp(max=unit.shape[2] - 1)
        centre = unit.gather(2, at[..., None].expand(-1, -1, -1, unit.shape[-1]))
        away = (1 - (unit * centre).sum(-1)).clamp(min=0) * real
        distance = torch.minimum(distance, away) if centres else away
        centres.append(centre)
    return torch.cat(centres, 2)
