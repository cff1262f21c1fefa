"""Forecasts that need no training: what every model must be better than.

Each takes what the pipeline of Chronos-2 takes, a dict with `target` `[T]` or `[D, T]` for each item, and
looks at the targets alone.

Letters in shapes: D targets, T history steps, H horizon steps, L quantile levels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.stats import norm

from zoo.errors import ConfigError, did_you_mean, require

log = logging.getLogger(__name__)

Inputs = Mapping[str, Any]
"""One item: `target`, and optionally `past_covariates` and `future_covariates`, each name -> `[steps]`."""


class Forecast(Protocol):
    """Forecasts `[D, H, L]` of each item at the quantile levels."""

    def __call__(
        self, items: Sequence[Inputs], horizon: int, levels: Sequence[float]
    ) -> list[np.ndarray]: ...


class SeasonalNaive:
    """The last season goes on: every quantile is the last known value of the same place in the season.

    Where a place has never been seen, as in a history shorter than a season, it is the last known value; 0
    where there is none.

    Args:
        season: steps of a season.
    """

    def __init__(self, season: int) -> None:
        self.season = season

    def __call__(self, items: Sequence[Inputs], horizon: int, levels: Sequence[float]) -> list[np.ndarray]:
        points = [self.point(_targets(item), horizon) for item in items]
        return [np.repeat(point[..., None], len(levels), axis=-1) for point in points]

    def point(self, target: np.ndarray, horizon: int) -> np.ndarray:
        """`[D, T]` to `[D, H]`."""
        padding = -target.shape[1] % self.season
        padded = np.pad(target, ((0, 0), (padding, 0)), constant_values=np.nan)
        seasons = padded.reshape(len(target), -1, self.season)
        last = _last_known(seasons)
        fallback = np.nan_to_num(_last_known(target[..., None]))
        season = np.where(np.isnan(last), fallback, last)
        return season[:, np.arange(horizon) % self.season]


class GaussianSeasonalNaive(SeasonalNaive):
    """The seasonal naive forecast with normal quantiles.

    Their standard deviation k seasons ahead is sqrt(k) times the root mean square of seasonal differences.
    """

    def __call__(self, items: Sequence[Inputs], horizon: int, levels: Sequence[float]) -> list[np.ndarray]:
        return [self._quantiles(_targets(item), horizon, levels) for item in items]

    def _quantiles(self, target: np.ndarray, horizon: int, levels: Sequence[float]) -> np.ndarray:
        differences = target[:, self.season :] - target[:, : -self.season]
        known = ~np.isnan(differences)
        squares = np.where(known, differences, 0.0) ** 2
        sigma = np.sqrt(squares.sum(axis=1) / np.maximum(known.sum(axis=1), 1))
        seasons_ahead = np.arange(horizon) // self.season + 1
        spread = sigma[:, None] * np.sqrt(seasons_ahead)
        return self.point(target, horizon)[..., None] + spread[..., None] * norm.ppf(levels)


class StatsForecast:
    """A model of the package statsforecast, fitted to each series, with its prediction intervals.

    Missing values are interpolated. A series that the package cannot fit gets the seasonal naive forecast
    with normal quantiles, and is counted in a warning.

    Args:
        model: `AutoETS` (exponential smoothing chosen by AICc) or `AutoTheta`.
        season: steps of a season.

    Raises:
        MissingExtra: the package is not installed.
    """

    def __init__(self, model: str, season: int) -> None:
        require("statsforecast", "forecasting")
        self.model = getattr(require("statsforecast.models", "forecasting"), model)(season_length=season)
        self.name, self.fallback = model, GaussianSeasonalNaive(season)

    def __call__(self, items: Sequence[Inputs], horizon: int, levels: Sequence[float]) -> list[np.ndarray]:
        forecasts, failed = [], 0
        for item in items:
            target = _targets(item)
            try:
                forecasts.append(np.stack([self._one(series, horizon, levels) for series in target]))
            except Exception as error:  # of any kind, from inside the package
                log.info("%s failed: %s", self.name, error)
                forecasts.extend(self.fallback([item], horizon, levels))
                failed += 1
        if failed:
            log.warning("%s failed on %d of %d items: seasonal naive there.", self.name, failed, len(items))
        return forecasts

    def _one(self, series: np.ndarray, horizon: int, levels: Sequence[float]) -> np.ndarray:
        """`[T]` to `[H, L]`."""
        widths = sorted({_width(level) for level in levels} - {0.0})
        out = self.model.forecast(y=_interpolated(series), h=horizon, level=widths or None)
        columns = []
        for level in levels:
            side = f"{'lo' if level < 0.5 else 'hi'}-{_width(level):g}"
            columns.append(out["mean"] if _width(level) == 0 else _bound(out, side))
        return np.stack(columns, axis=-1)


BASELINES = ("seasonal_naive", "gaussian_seasonal_naive", "auto_ets", "auto_theta")


def build_baseline(name: str, season: int) -> Forecast:
    """A baseline by name.

    Raises:
        ConfigError: there is none of this name.
        MissingExtra: it needs statsforecast, which is not installed.
    """
    builders = {
        "seasonal_naive": lambda: SeasonalNaive(season),
        "gaussian_seasonal_naive": lambda: GaussianSeasonalNaive(season),
        "auto_ets": lambda: StatsForecast("AutoETS", season),
        "auto_theta": lambda: StatsForecast("AutoTheta", season),
    }
    if name not in builders:
        raise ConfigError(
            f"There is no baseline {name!r}.{did_you_mean(name, BASELINES)} "
            f"Baselines: {', '.join(BASELINES)}."
        )
    return builders[name]()


def _targets(item: Inputs) -> np.ndarray:
    """`[D, T]` in float64."""
    return np.atleast_2d(np.asarray(item["target"], np.float64))


def _last_known(values: np.ndarray) -> np.ndarray:
    """The last value `[D, M]` of `[D, n, M]` along the middle axis that is not NaN; NaN where all are."""
    known = ~np.isnan(values)
    last = values.shape[1] - 1 - np.argmax(known[:, ::-1], axis=1)
    return np.take_along_axis(values, last[:, None], axis=1)[:, 0]


def _width(level: float) -> float:
    """Per cent of the central interval that a quantile bounds."""
    return round(abs(2 * level - 1) * 100, 6)


def _bound(out: Mapping[str, np.ndarray], side: str) -> np.ndarray:
    """A bound of an interval; the package writes 20 as `lo-20` or `lo-20.0`."""
    return out[side] if side in out else out[f"{side}.0"]


def _interpolated(series: np.ndarray) -> np.ndarray:
    known = np.flatnonzero(~np.isnan(series))
    if not len(known):
        return np.zeros(len(series))
    return np.interp(np.arange(len(series)), known, series[known])
