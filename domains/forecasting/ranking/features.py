"""What is known of a stock on a day, from its prices up to that day, and the return to be ranked.

Shapes: D days, N stocks, F features. NaN where a stock did not trade, or not long enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from domains.forecasting.ranking.panel import Panel

SPANS = (1, 5, 10, 20, 60)
"""Days over which returns are measured."""
WINDOWS = (5, 20, 60)
"""Days over which averages are taken."""
CLIP = 3.0
"""Normalised features are cut at so many robust standard deviations."""


def features(panel: Panel) -> tuple[np.ndarray, list[str]]:
    """`(D, N, F)` in float32 and the F names, after the groups of Qlib's Alpha158 (Yang et al. 2020).

    From closes: log returns over 1 to 60 days, their standard deviation, the distance to the moving average
    and the place between the lowest and the highest close of a window. From open, high and low: the shape of
    the day's candle. From volume: its ratio to the average, its variability, the correlation of its change
    with the return. Of the market, the same for all stocks of a day: the mean return, and the spread of the
    returns around it. Further columns of the panel are features as they are. Row d uses days up to d only.
    """
    close = pd.DataFrame(panel.close)
    log_close: Any = np.log(close)
    daily = log_close.diff()
    found: dict[str, Any] = {f"return_{span}": log_close.diff(span) for span in SPANS}
    for window in WINDOWS:
        rolling: Any = close.rolling(window, min_periods=_enough(window))
        low, high = rolling.min(), rolling.max()
        found[f"volatility_{window}"] = daily.rolling(window, min_periods=_enough(window)).std()
        found[f"average_{window}"] = rolling.mean() / close - 1
        found[f"place_{window}"] = (close - low) / (high - low).where(high > low)
    found |= _candle(panel) | _volume(panel, daily) | _market(daily)
    found |= {name: pd.DataFrame(values) for name, values in panel.extra.items()}
    present = ~np.isnan(panel.close)
    values = np.stack([np.where(present, frame.to_numpy(), np.nan) for frame in found.values()], axis=-1)
    return values.astype(np.float32), list(found)


def _enough(window: int) -> int:
    """Days of a window that must be there."""
    return max(2, window // 2)


def _candle(panel: Panel) -> dict[str, Any]:
    if not {"open", "high", "low"} <= set(panel.fields):
        return {}
    start, high, low, close = (panel.fields[name] for name in ("open", "high", "low", "close"))
    top, bottom = np.maximum(start, close), np.minimum(start, close)
    span, before = high - low, np.full_like(close, np.nan)
    before[1:] = close[:-1]
    shape = {
        "body": close / start - 1,
        "range": span / start,
        "upper_shadow": (high - top) / start,
        "lower_shadow": (bottom - low) / start,
        "close_in_range": (close - low) / np.where(span > 0, span, np.nan),
        "gap": np.log(start / before),
    }
    return {name: pd.DataFrame(values) for name, values in shape.items()}


def _market(daily: Any) -> dict[str, Any]:
    mean, spread = daily.mean(axis=1), np.log(daily.std(axis=1) + 1e-6)
    days = {f"market_return_{window}": mean.rolling(window, min_periods=1).sum() for window in (5, 20)}
    days |= {f"market_spread_{window}": spread.rolling(window, min_periods=1).mean() for window in (1, 5, 20)}
    stocks = np.ones((1, daily.shape[1]))
    return {name: pd.DataFrame(values.to_numpy()[:, None] * stocks) for name, values in days.items()}


def _volume(panel: Panel, daily: Any) -> dict[str, Any]:
    if "volume" not in panel.fields:
        return {}
    volume: Any = pd.DataFrame(np.log1p(panel.fields["volume"]))
    change = volume.diff()
    found = {}
    for window in WINDOWS:
        enough = _enough(window)
        found[f"volume_ratio_{window}"] = volume - volume.rolling(window, min_periods=enough).mean()
        found[f"volume_spread_{window}"] = change.rolling(window, min_periods=enough).std()
        both: Any = (daily * change).rolling(window, min_periods=enough).mean()
        scale: Any = (daily.pow(2).rolling(window, min_periods=enough).mean()).pow(0.5) * (
            change.pow(2).rolling(window, min_periods=enough).mean()
        ).pow(0.5)
        found[f"volume_return_{window}"] = both / scale.where(scale > 0)
    return found


def future_returns(panel: Panel, horizon: int = 1) -> np.ndarray:
    """`(D, N)`: what is earned by buying at the close of the next day and selling `horizon` days later.

    Qlib's `Ref($close, -2) / Ref($close, -1) - 1` where the horizon is 1. NaN at the end, and where a stock
    trades on neither of the two days.
    """
    returns = np.full_like(panel.close, np.nan)
    if len(returns) > horizon + 1:
        returns[: -horizon - 1] = panel.close[horizon + 1 :] / panel.close[1:-horizon] - 1
    return returns


def cross_section(values: np.ndarray) -> np.ndarray:
    """The z-scores of each row `(D, N)`, NaN left out; 0 where all are equal."""
    found = ~np.isnan(values)
    counts = np.maximum(found.sum(1, keepdims=True), 1)
    centred = values - np.where(found, values, 0).sum(1, keepdims=True) / counts
    spread = np.sqrt(np.where(found, centred**2, 0).sum(1, keepdims=True) / counts)
    return centred / np.where(spread > 0, spread, 1)


class RobustScale:
    """Median and 1.4826 times the median absolute deviation of each feature, as Qlib's RobustZScoreNorm.

    Args:
        centre, spread: of the F features.
    """

    def __init__(self, centre: Any, spread: Any) -> None:
        self.centre = np.asarray(centre, dtype=np.float32)
        self.spread = np.asarray(spread, dtype=np.float32)

    @classmethod
    def fit(cls, values: np.ndarray) -> RobustScale:
        """Of the features `(..., F)` of the training days; the standard deviation where the
        former is 0. A feature that is never there becomes 0.
        """
        centre, spread = [], []
        for column in values.reshape(-1, values.shape[-1]).T:
            known = column[~np.isnan(column)]
            middle = float(np.median(known)) if len(known) else 0.0
            deviation = 1.4826 * float(np.median(np.abs(known - middle))) if len(known) else 0.0
            centre.append(middle)
            spread.append(deviation or (float(known.std()) if len(known) else 0.0) or 1.0)
        return cls(centre, spread)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """`(..., F)` scaled, cut at `CLIP`; what is missing becomes 0, the median."""
        scaled = np.clip((values - self.centre) / self.spread, -CLIP, CLIP)
        return np.nan_to_num(scaled, copy=False, nan=0.0)

    def facts(self) -> dict[str, list[float]]:
        """Json-able; `RobustScale(**facts)` makes it again."""
        return {"centre": self.centre.tolist(), "spread": self.spread.tolist()}
