"""Series with their covariates, cut into histories and futures, and forecasts judged on them.

Letters in shapes: D targets, T steps, H horizon steps, L quantile levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from pandas.tseries.offsets import BaseOffset

from domains.forecasting.baselines import Forecast, Inputs
from domains.forecasting.metrics import LEVELS, Judged, judge
from domains.forecasting.series import series_bounds
from zoo.errors import ConfigError, DataError


@dataclass(frozen=True)
class Item:
    """One series, of one or more targets, with its covariates.

    Attributes:
        name: as the data call it.
        target: `[D, T]` float64, NaN where missing.
        past: covariates that are known up to now, name -> `[T]`.
        known: covariates whose future is known, too, name -> `[T]`.
        timestamps: of the T steps, where the data have them.
    """

    name: str
    target: np.ndarray
    past: Mapping[str, np.ndarray] = field(default_factory=dict)
    known: Mapping[str, np.ndarray] = field(default_factory=dict)
    timestamps: pd.DatetimeIndex | None = None

    @property
    def length(self) -> int:
        return self.target.shape[1]

    def inputs(self, cut: int, horizon: int, context_length: int | None = None) -> Inputs:
        """What a forecaster may know at step `cut`, in the form of Chronos-2's pipeline."""
        start = 0 if context_length is None else max(0, cut - context_length)
        history, future = slice(start, cut), slice(cut, cut + horizon)
        covariates = {**self.past, **self.known}
        inputs: dict[str, object] = {"target": self.target[:, history]}
        if covariates:
            inputs["past_covariates"] = {name: values[history] for name, values in covariates.items()}
        if self.known:
            inputs["future_covariates"] = {name: values[future] for name, values in self.known.items()}
        return inputs


@dataclass(frozen=True)
class SeriesSet:
    """Items of one frequency with the same targets and covariates.

    Attributes:
        name: of the set.
        items: the series.
        season: steps of a season, for scaled errors and naive forecasts.
        horizon: steps that the set is usually forecast for.
        targets: what the D targets are called.
        freq: where the data tell it.
    """

    name: str
    items: Sequence[Item]
    season: int
    horizon: int
    targets: Sequence[str] = ("target",)
    freq: BaseOffset | None = None

    def split(self, horizon: int) -> SeriesSet:
        """The set without the last `horizon` steps of each series: what training may see."""
        items = [
            Item(
                item.name,
                item.target[:, :-horizon],
                {name: values[:-horizon] for name, values in item.past.items()},
                {name: values[:-horizon] for name, values in item.known.items()},
                None if item.timestamps is None else item.timestamps[:-horizon],
            )
            for item in self.items
            if item.length > horizon
        ]
        return SeriesSet(self.name, items, self.season, self.horizon, self.targets, self.freq)


def from_frame(
    frame: pd.DataFrame,
    *,
    name: str,
    target: Sequence[str],
    season: int,
    horizon: int,
    past: Sequence[str] = (),
    known: Sequence[str] = (),
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    freq: BaseOffset | None = None,
) -> SeriesSet:
    """The items of a frame that `checked_frame` has sorted."""
    columns = {column: frame[column].to_numpy() for column in [*past, *known]}
    targets = frame[list(target)].to_numpy(dtype=np.float64).T
    bounds, stamps = series_bounds(frame[id_column]), pd.DatetimeIndex(frame[timestamp_column])
    names = frame[id_column].to_numpy()
    items = [
        Item(
            str(names[a]),
            targets[:, a:b],
            {column: columns[column][a:b] for column in past},
            {column: columns[column][a:b] for column in known},
            stamps[a:b],
        )
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)  # noqa: RUF007
    ]
    return SeriesSet(name, items, season, horizon, tuple(target), freq)


# ---- windows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """One forecast to make: the item, and the step that it is made at."""

    item: Item
    cut: int
    horizon: int

    @property
    def history(self) -> np.ndarray:
        """`[T, D]`"""
        return self.item.target[:, : self.cut].T

    @property
    def future(self) -> np.ndarray:
        """`[H, D]`"""
        return self.item.target[:, self.cut : self.cut + self.horizon].T

    def inputs(self, context_length: int | None = None) -> Inputs:
        return self.item.inputs(self.cut, self.horizon, context_length)


def rolling_windows(
    series: SeriesSet, horizon: int, windows: int = 1, stride: int | None = None, min_history: int = 1
) -> list[Window]:
    """The last `windows` forecasts of each item, `stride` steps apart, the latest up to its end.

    Args:
        stride: `horizon` without it.
        min_history: steps of history that a forecast must have.

    Raises:
        ConfigError: a number below 1.
        DataError: no item is long enough.
    """
    stride = horizon if stride is None else stride
    for name, value in (("horizon", horizon), ("windows", windows), ("stride", stride)):
        if value < 1:
            raise ConfigError(f"{name}={value}: at least 1 is needed.")
    found = [
        Window(item, cut, horizon)
        for item in series.items
        for cut in (item.length - horizon - k * stride for k in reversed(range(windows)))
        if cut >= min_history
    ]
    if not found:
        longest = max((item.length for item in series.items), default=0)
        raise DataError(
            f"{series.name}: the longest series has {longest} steps; a forecast of {horizon} needs "
            f"{horizon + min_history}. Lower the horizon."
        )
    return found


def judged(
    windows: Sequence[Window],
    forecasts: Sequence[np.ndarray],
    *,
    season: int,
    levels: Sequence[float] = LEVELS,
) -> Judged:
    """Forecasts `[D, H, L]` of windows beside what came; the windows count as items of one task."""
    quantiles = np.stack([np.moveaxis(np.asarray(one, np.float64), 0, 1) for one in forecasts])
    y = np.stack([window.future for window in windows])
    return judge(y, quantiles, [window.history for window in windows], season=season, levels=levels)


def backtest(
    forecast: Forecast,
    windows: Sequence[Window],
    *,
    season: int,
    levels: Sequence[float] = LEVELS,
    context_length: int | None = None,
) -> Judged:
    """Forecast all windows, of one horizon, and judge them together as items of one task, as in GIFT-Eval."""
    made = forecast([window.inputs(context_length) for window in windows], windows[0].horizon, levels)
    return judged(windows, made, season=season, levels=levels)
