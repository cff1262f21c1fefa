"""How well scores rank the returns of a day.

Shapes: D days, N stocks, NaN where a stock is not in the cross-section of a day.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from torch import Tensor


def correlation(score: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    """Pearson correlation of each day `(B,)` over the stocks of the mask, all `(B, N)`.

    0 without a gradient that explodes where the scores or labels of a day are all equal.
    """
    weight = mask.to(score.dtype)
    count = weight.sum(-1, keepdim=True).clamp(min=1)
    score = weight * (score - (weight * score).sum(-1, keepdim=True) / count)
    label = weight * (label - (weight * label).sum(-1, keepdim=True) / count)
    scale = (score.square().sum(-1) * label.square().sum(-1) + 1e-12).sqrt()
    return (score * label).sum(-1) / scale


def daily_ic(scores: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Pearson correlation of scores and returns `(D, N)` on each day `(D,)`: the information coefficient.

    Over stocks that have both; NaN on a day with fewer than two of them, or with all scores or returns equal.
    """
    known = ~(np.isnan(scores) | np.isnan(returns))
    x, y = (np.where(known, values, np.nan) for values in (scores, returns))
    return _pearson(x, y, known)


def daily_rank_ic(scores: np.ndarray, returns: np.ndarray) -> np.ndarray:
    """Spearman correlation of each day `(D,)`: the Pearson correlation of ranks, ties getting their mean."""
    known = ~(np.isnan(scores) | np.isnan(returns))
    x, y = (pd.DataFrame(np.where(known, v, np.nan)).rank(axis=1).to_numpy() for v in (scores, returns))
    return _pearson(x, y, known)


def _pearson(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> np.ndarray:
    count = np.maximum(known.sum(1, keepdims=True), 1)
    x, y = (
        np.where(known, values - np.where(known, values, 0).sum(1, keepdims=True) / count, 0)
        for values in (x, y)
    )
    size = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    varied = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    return np.where(varied, (x * y).sum(1) / np.where(varied, size, 1), np.nan)


def ranking_scores(scores: np.ndarray, returns: np.ndarray) -> dict[str, float | int]:
    """IC and RankIC, their means over the days, and ICIR and RankICIR: mean over standard deviation.

    `days` are those on which they are defined.
    """
    found: dict[str, float | int] = {}
    for name, values in (("IC", daily_ic(scores, returns)), ("RankIC", daily_rank_ic(scores, returns))):
        known = values[~np.isnan(values)]
        spread = known.std(ddof=1) if len(known) > 1 else np.nan
        found[name] = float(known.mean()) if len(known) else np.nan
        found[f"{name}IR"] = float(known.mean() / spread) if spread > 0 else np.nan
        found["days"] = len(known)
    return found


def quantile_returns(scores: np.ndarray, returns: np.ndarray, parts: int = 10) -> np.ndarray:
    """`(parts,)` mean return, less that of all stocks of the day, from the lowest scores to the highest."""
    known = ~(np.isnan(scores) | np.isnan(returns))
    ranks = pd.DataFrame(np.where(known, scores, np.nan)).rank(axis=1, method="first").to_numpy()
    part = np.ceil(ranks / np.maximum(known.sum(1, keepdims=True), 1) * parts) - 1
    count = np.maximum(known.sum(1, keepdims=True), 1)
    excess = returns - np.where(known, returns, 0).sum(1, keepdims=True) / count
    found = [excess[known & (part == i)] for i in range(parts)]
    return np.array([values.mean() if len(values) else np.nan for values in found])
