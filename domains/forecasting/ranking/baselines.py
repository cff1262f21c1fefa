"""Rankings that need no neural network.

Shapes: D days, N stocks, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from domains.forecasting.ranking.metrics import daily_ic

if TYPE_CHECKING:
    from domains.forecasting.ranking.data import CrossSections, RankingData

PENALTIES = (1e1, 1e3, 1e5)
"""Of ridge regression; the one with the best IC on the validation days is taken."""
ORACLE = "attainable"
"""What the simulator itself knows."""


def baseline_scores(data: RankingData) -> dict[str, np.ndarray]:
    """Scores `(D, N)` by name: ridge regression, reversal of the last 5 days, momentum from 60 to 5 days ago,
    and of a simulated market what could be known at best.
    """
    close = data.panel.close
    found = {"ridge": ridge(data), "reversal": -_past_return(close, 5, 0)}
    if len(close) > 60:
        found["momentum"] = _past_return(close, 60, 5)
    if data.panel.expected is not None and data.horizon == 1:
        found[ORACLE] = data.panel.expected
    return found


def _past_return(close: np.ndarray, start: int, end: int) -> np.ndarray:
    """`(D, N)` log return from `start` to `end` days ago, 0 where unknown."""
    scores = np.zeros_like(close)
    stop = len(close) - end
    scores[start:] = np.nan_to_num(np.log(close[start - end : stop] / close[: len(close) - start]))
    return scores


def ridge(data: RankingData) -> np.ndarray:
    """Scores `(D, N)` of a linear model of the day's features, fitted to the labels of the training days."""
    train, val = data.train_set, data.val_set
    x, y = _rows(train)  # pyright: ignore[reportArgumentType]
    gram, moment = x.T @ x, x.T @ y
    best: tuple[float, np.ndarray] | None = None
    for penalty in PENALTIES:
        weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
        scores = train.values @ weight  # pyright: ignore[reportAttributeAccessIssue]
        days = val.days  # pyright: ignore[reportAttributeAccessIssue]
        ic = float(np.nan_to_num(daily_ic(scores[days], data.returns[days])).mean())
        if best is None or ic > best[0]:
            best = ic, scores
    assert best is not None
    return best[1]


def _rows(part: CrossSections) -> tuple[np.ndarray, np.ndarray]:
    """Features `(rows, F)`, each less its mean over the stocks of the day, and labels `(rows,)`."""
    days: Sequence[int] = part.days
    x, y = [], []
    for day in days:
        stocks = part.stocks[day]
        values = part.values[day, stocks].astype(np.float64)
        x.append(values - values.mean(0))
        y.append(part.labels[day, stocks])
    return np.concatenate(x), np.concatenate(y)
