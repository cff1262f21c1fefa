"""Trend, season and irregularity (after Bahrpeyma et al. 2021); the distributions are our own."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

PERIODS = {4: 12, 7: 12, 12: 25, 24: 30, 30: 1, 48: 5, 52: 4, 96: 3, 168: 5, 336: 2, 365: 1}
"""Usual seasons, and how often each is drawn, in per cent: a small model learns these first."""

PAIRS = ((24, 168), (24, 168), (48, 336), (7, 365), (12, 48), (4, 52))
"""Seasons that come together: of the day and the week, the week and the year."""


def trend_season(rng: np.random.Generator, length: int) -> np.ndarray:
    """`[length]` steps of a trend, up to three seasons and noise, added or multiplied."""
    t = np.arange(length)
    trend = trend_line(rng, t)
    seasons = sum((_season(rng, t, period) for period in _periods(rng, length)), np.zeros(length))
    noise = 10 ** rng.uniform(-2, -0.1) * _noise(rng, length)
    weight = rng.uniform(0.1, 2.0)
    if rng.random() < 0.3:
        series = np.exp(0.5 * trend + 0.3 * weight * seasons) * (1 + 0.2 * noise)
    else:
        series = weight * trend + seasons + noise
    return _with_shocks(rng, series)


def trend_line(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """None, linear, exponential, logistic, piecewise linear, a walk with or without a drifting slope, or one
    that comes back to its mean."""
    x, kind = t / len(t), rng.integers(8)
    size = rng.normal(0, 1.5)
    if kind == 1:
        return size * x
    if kind == 2:
        rate = rng.uniform(0.5, 3)
        return size * np.expm1(rate * x) / np.expm1(rate)
    if kind == 3:
        return size / (1 + np.exp(-(x - rng.uniform(0.1, 0.9)) * rng.uniform(5, 30)))
    if kind == 4:
        bends = np.sort(rng.uniform(0, 1, rng.integers(1, 5)))
        slopes = rng.normal(0, 2, len(bends) + 1)
        return slopes[0] * x + sum(
            change * np.maximum(x - bend, 0) for change, bend in zip(np.diff(slopes), bends, strict=True)
        )
    if kind == 5:
        return np.cumsum(rng.standard_normal(len(t))) * size / np.sqrt(len(t))
    if kind == 6:
        slope = np.asarray(lfilter([1.0], [1.0, -rng.uniform(0.8, 0.99)], rng.standard_normal(len(t))))
        walk = np.cumsum(slope + rng.normal(0, 1) * slope.std())
        return 2 * size * walk / max(float(np.abs(walk).max()), 1e-6)
    if kind == 7:
        memory = rng.uniform(0.9, 0.995)
        draw = np.sqrt(1 - memory**2) * rng.standard_normal(len(t))
        return size * np.asarray(lfilter([1.0], [1.0, -memory], draw))
    return np.zeros(len(t))


def _periods(rng: np.random.Generator, length: int) -> list[float]:
    """One to three seasons: usual ones, a pair of usual ones, or any."""
    kind = rng.random()
    if kind < 0.2:
        return [float(period) for period in PAIRS[rng.integers(len(PAIRS))]]
    if kind < 0.9:
        shares = np.array(list(PERIODS.values())) / 100
        return rng.choice(list(PERIODS), size=rng.integers(1, 3), replace=False, p=shares).tolist()
    return np.exp(rng.uniform(np.log(3), np.log(max(4, length / 2)), rng.integers(1, 4))).tolist()


def _season(rng: np.random.Generator, t: np.ndarray, period: float) -> np.ndarray:
    """A few harmonics, or a drawn profile; its amplitude may change with time."""
    phase = (t / period + rng.random()) % 1
    if rng.random() < 0.6:
        orders = np.arange(1, rng.integers(2, max(3, min(8, int(period / 2) + 1))))
        sizes = rng.standard_normal((2, len(orders))) / orders ** rng.uniform(0.3, 1.5)
        angles = 2 * np.pi * orders[:, None] * phase
        pattern = sizes[0] @ np.sin(angles) + sizes[1] @ np.cos(angles)
    else:
        profile = rng.standard_normal(max(2, round(period)))
        width = rng.integers(1, max(2, len(profile) // 4 + 1))
        profile = np.convolve(np.tile(profile, 3), np.ones(width) / width, "same")
        profile = profile[len(profile) // 3 : -(len(profile) // 3)]
        pattern = profile[np.minimum((phase * len(profile)).astype(int), len(profile) - 1)]
    pattern = pattern / max(float(np.std(pattern)), 1e-6)
    if rng.random() < 0.25:
        pattern = pattern * np.maximum(0, 1 + rng.uniform(-1, 1.5) * t / len(t))
    return rng.uniform(0.3, 2) * pattern


def _noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """Normal, heavy-tailed, autoregressive or of changing variance."""
    kind, normal = rng.integers(4), rng.standard_normal(length)
    if kind == 1:
        return rng.standard_t(rng.uniform(2.5, 6), length)
    if kind == 2:
        memory = rng.uniform(0.3, 0.98)
        return np.asarray(lfilter([np.sqrt(1 - memory**2)], [1.0, -memory], normal))
    if kind == 3:
        turns = np.sin(2 * np.pi * (np.arange(length) * rng.uniform(0.5, 8) / length + rng.random()))
        return normal * np.exp(rng.uniform(0, 1) * turns)
    return normal


def _with_shocks(rng: np.random.Generator, series: np.ndarray) -> np.ndarray:
    """Outliers in one of eight series, shifts of the level in another."""
    spread, kind = max(float(np.std(series)), 1e-6), rng.integers(8)
    if kind == 0:
        places = rng.integers(len(series), size=rng.integers(1, 6))
        series = series.copy()
        series[places] += rng.normal(0, 4 * spread, len(places))
    elif kind == 1:
        for place in rng.integers(len(series), size=rng.integers(1, 3)):
            series = series + rng.normal(0, 1.5 * spread) * (np.arange(len(series)) >= place)
    return series
