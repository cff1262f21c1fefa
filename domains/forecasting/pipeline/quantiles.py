"""Quantiles between quantiles, and quantiles of weighted samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def interpolated(values: Tensor, levels: Tensor, wanted: Tensor) -> Tensor:
    """Values at other levels, linear between neighbours, flat beyond the ends.

    Args:
        values: `(..., Q)`.
        levels: ascending, `(Q,)` or `(..., Q)`.
        wanted: `(K,)`.

    Returns:
        `(..., K)`.
    """
    if levels.shape[-1] == 1:
        return values.expand(*values.shape[:-1], len(wanted))
    levels = levels.expand(values.shape).contiguous()
    wanted = wanted.to(levels).expand(*values.shape[:-1], -1).contiguous()
    above = torch.searchsorted(levels, wanted, right=True).clamp(1, levels.shape[-1] - 1)
    low, high = levels.gather(-1, above - 1), levels.gather(-1, above)
    share = ((wanted - low) / (high - low)).nan_to_num(nan=0.0).clamp(0, 1)
    below = values.gather(-1, above - 1)
    return below + share * (values.gather(-1, above) - below)


def probability_masses(levels: Sequence[float]) -> Tensor:
    """`(K,)` share of the distribution that each of ascending levels stands for; they sum to 1."""
    ends = torch.tensor([0.0, *levels, 1.0])
    masses = (ends[2:] - ends[:-2]) / 2
    return masses / masses.sum()


def weighted_quantiles(samples: Tensor, weights: Tensor, levels: Tensor) -> Tensor:
    """Quantiles of samples `(..., K)` of positive weights `(K,)`, of any sum, at levels `(Q,)`: `(..., Q)`.

    The sorted samples stand at their cumulative weights, their own included; linear between, flat beyond.
    """
    samples, order = samples.sort(-1)
    shares = (weights / weights.sum()).expand(samples.shape).gather(-1, order)
    return interpolated(samples, shares.cumsum(-1).clamp(0, 1), levels)
