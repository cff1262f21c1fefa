"""Errors of point and quantile forecasts, and how models compare over many tasks.

Definitions as those of the package fev 0.10, which fev-bench uses; GIFT-Eval's are the same for MASE and WQL.

Letters in shapes: I items, H horizon steps, D target dimensions, L quantile levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from zoo.errors import DataError

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The quantile levels of Chronos Benchmark II, GIFT-Eval and fev-bench."""

BASELINE = "seasonal naive"
RELATIVE_ERROR_RANGE = (0.01, 100.0)
"""Where errors relative to the baseline are cut off before they are averaged over tasks."""


# ---- one task ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """Forecasts of one task beside what came, in float64.

    Attributes:
        y: `[I, H, D]` what came; NaN where it is unknown.
        point: `[I, H, D]` point forecasts.
        quantiles: `[I, H, D, L]` forecasts at `levels`.
        levels: the quantile levels, rising.
        scale: `[I, D]` seasonal error of each history, see `seasonal_error`.
        square_scale: `[I, D]` its mean square.
    """

    y: np.ndarray
    point: np.ndarray
    quantiles: np.ndarray
    levels: Sequence[float]
    scale: np.ndarray
    square_scale: np.ndarray

    @property
    def error(self) -> np.ndarray:
        return self.y - self.point

    @property
    def quantile_loss(self) -> np.ndarray:
        """`[I, H, D, L]`: 2 |(y - f) (1[y <= f] - q)|."""
        y = self.y[..., None]
        return 2 * np.abs((y - self.quantiles) * ((y <= self.quantiles) - np.asarray(self.levels)))


def judge(
    y: np.ndarray,
    quantiles: np.ndarray,
    histories: Sequence[np.ndarray],
    *,
    season: int,
    levels: Sequence[float] = LEVELS,
    point: np.ndarray | None = None,
) -> Judged:
    """Put forecasts beside what came.

    Args:
        y: `[I, H, D]`.
        quantiles: `[I, H, D, L]`.
        histories: I arrays `[T_i, D]`, what was known when the forecast was made.
        season: steps of a season, for the scaled errors.
        point: `[I, H, D]`; the forecasts of level 0.5 without it.

    Raises:
        DataError: shapes that do not belong together, or no level 0.5 to take the point forecast from.
    """
    y, quantiles = np.asarray(y, np.float64), np.asarray(quantiles, np.float64)
    if quantiles.shape != (*y.shape, len(levels)) or len(histories) != len(y):
        raise DataError(
            f"Forecasts of shape {quantiles.shape} for {len(levels)} levels and {len(histories)} histories "
            f"do not fit what came, of shape {y.shape}."
        )
    if point is None:
        middle = [i for i, level in enumerate(levels) if abs(level - 0.5) < 1e-9]
        if not middle:
            raise DataError(f"There is no level 0.5 among {list(levels)}: give point forecasts.")
        point = quantiles[..., middle[0]]
    scales = np.array([seasonal_error(history, season) for history in histories])
    squares = np.array([seasonal_error(history, season, power=2) for history in histories])
    return Judged(y, np.asarray(point, np.float64), quantiles, tuple(levels), scales, squares)


def seasonal_error(history: np.ndarray, season: int, power: int = 1) -> np.ndarray:
    """Mean of |y_t - y_(t - season)|^power over a history `[T, D]`, for each dimension.

    Missing values are left out; NaN where the history is not longer than a season, or no pair is known.
    """
    history = np.asarray(history, np.float64)
    if len(history) <= season:
        return np.full(history.shape[1], np.nan)
    return _mean(np.abs(history[season:] - history[:-season]) ** power, axis=0)


def _mean(values: np.ndarray, axis: int | None = None, *, finite: bool = False) -> np.ndarray:
    """The mean without NaN (nor infinite values if `finite`); NaN of nothing."""
    known = np.isfinite(values) if finite else ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _per_dim(values: np.ndarray, *, finite: bool = False) -> np.ndarray:
    """`[I, H, D, ...]` to `[D]`: one flat mean over all other axes."""
    dims = np.moveaxis(values, 2, 0).reshape(values.shape[2], -1)
    return _mean(dims, axis=1, finite=finite)


def _scaled(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The mean per dimension of values `[I, H, D]` over `[I, D]`; items without a scale are left out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _per_dim(values / scale[:, None], finite=True)


def _over_levels(task: Judged) -> np.ndarray:
    return np.mean(task.quantile_loss, axis=-1)


def _weighted_quantile_loss(task: Judged) -> np.ndarray:
    losses = [_per_dim(task.quantile_loss[..., i]) for i in range(len(task.levels))]
    return np.mean(losses, axis=0) / _per_dim(np.abs(task.y))


def _squared_log(task: Judged) -> np.ndarray:
    return (np.log1p(task.y) - np.log1p(task.point)) ** 2


def _biased(task: Judged) -> np.ndarray:
    return _per_dim(np.abs(task.error)) + np.abs(_per_dim(task.error))


def _symmetric(task: Judged) -> np.ndarray:
    return 2 * np.abs(task.error) / (np.abs(task.y) + np.abs(task.point))


def _covered(task: Judged) -> np.ndarray:
    """1 where the value lies between the outermost quantiles, NaN where it is unknown."""
    inside = (task.y >= task.quantiles[..., 0]) & (task.y <= task.quantiles[..., -1])
    return np.where(np.isnan(task.y), np.nan, inside.astype(np.float64))


METRICS: dict[str, Callable[[Judged], np.ndarray]] = {
    "MASE": lambda task: _scaled(np.abs(task.error), task.scale),
    "WQL": _weighted_quantile_loss,
    "SQL": lambda task: _scaled(_over_levels(task), task.scale),
    "CRPS": lambda task: _per_dim(task.quantile_loss),
    "coverage": lambda task: _per_dim(_covered(task)),
    "MAE": lambda task: _per_dim(np.abs(task.error)),
    "MSE": lambda task: _per_dim(task.error**2),
    "RMSE": lambda task: np.sqrt(_per_dim(task.error**2)),
    "RMSSE": lambda task: np.sqrt(_scaled(task.error**2, task.square_scale)),
    "MAPE": lambda task: _per_dim(np.abs(task.error) / np.abs(task.y)),
    "SMAPE": lambda task: _per_dim(_symmetric(task)),
    "RMSLE": lambda task: np.sqrt(_per_dim(_squared_log(task))),
    "WAPE": lambda task: _per_dim(np.abs(task.error)) / _per_dim(np.abs(task.y)),
    "MAEB": _biased,
    "WAPEB": lambda task: _biased(task) / _per_dim(np.abs(task.y)),
    "MQL": lambda task: _per_dim(task.quantile_loss),
}
"""Name -> the metric of each dimension.

MASE, SQL and RMSSE are scaled by the seasonal errors of the histories; WQL is the mean over levels of the
mean quantile loss over the mean of |y|; CRPS (in the units of the data) is approximated, as in the
benchmarks, by the mean quantile loss, which is also called MQL; coverage is the share of values between the
lowest and the highest level; MAEB and WAPEB add the bias to MAE and WAPE.
"""


def scores(task: Judged, metrics: Sequence[str] = tuple(METRICS)) -> dict[str, float]:
    """The metrics by name, each the plain mean over dimensions; NaN where nothing counts."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(np.mean(METRICS[name](task))) for name in metrics}


# ---- many tasks --------------------------------------------------------------------------------------------


def relative_errors(errors: pd.DataFrame, baseline: str = BASELINE) -> pd.DataFrame:
    """Errors by task (rows) and model (columns) over those of the baseline, cut off at 0.01 and 100.

    A model that failed at a task (NaN) gets the error of the baseline.
    """
    relative = errors.div(errors[baseline], axis=0)
    return relative.clip(*RELATIVE_ERROR_RANGE).where(errors.notna(), 1.0)


def skill_scores(relative: pd.DataFrame) -> pd.Series:
    """1 - the geometric mean over tasks of the relative errors, of each model."""
    return 1 - np.exp(np.log(relative).mean())


def win_rates(relative: pd.DataFrame) -> pd.Series:
    """The share of tasks and other models at which a model's error is the smaller, ties counted half."""
    values = relative.to_numpy()
    own, other = values[:, :, None], values[:, None, :]
    wins = ((own < other) + 0.5 * (own == other)).mean(axis=0)
    others = max(1, values.shape[1] - 1)
    return pd.Series((wins.sum(axis=1) - np.diag(wins)) / others, index=relative.columns)


def leaderboard(
    errors: pd.DataFrame, baseline: str = BASELINE, *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Compare models over tasks, the best first.

    Args:
        errors: one row per task, one column per model; NaN where a model failed.
        baseline: the column that errors are divided by.
        resamples: bootstrap samples of the tasks for the 95 % intervals.

    Returns:
        By model: `win_rate`, `skill_score` (as GIFT-Eval and fev-bench define them), the bounds of both,
        `average_rank`, and `failures`.

    Raises:
        DataError: the baseline is missing, or has no error at some task.
    """
    if baseline not in errors or np.isnan(errors[baseline].to_numpy()).any():
        raise DataError(f"The baseline {baseline!r} must have an error at every task.")
    relative = relative_errors(errors, baseline)
    draws = np.random.default_rng(seed).integers(len(relative), size=(resamples, len(relative)))
    sampled = [relative.iloc[rows] for rows in draws]
    table = {"win_rate": win_rates(relative), "skill_score": skill_scores(relative)}
    for name, function in (("win_rate", win_rates), ("skill_score", skill_scores)):
        bounds = np.quantile([function(part) for part in sampled], [0.025, 0.975], axis=0)
        table[f"{name}_low"], table[f"{name}_high"] = (pd.Series(b, index=relative.columns) for b in bounds)
    table["average_rank"] = relative.rank(axis=1).mean()
    table["failures"] = errors.isna().sum()
    return pd.DataFrame(table).sort_values(["win_rate", "skill_score"], ascending=False)
