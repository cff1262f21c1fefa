"""Profiles that repeat, season after season, on a level that moves: what a forecaster learns to copy from.

Sales, loads and counts repeat any shape, not a sum of a few waves, and what is left is often small beside
it; a model that sees such series learns to look up the last seasons exactly. The distributions are our own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from domains.forecasting.synthetic.trend_season import trend_line

PERIODS = {4: 12, 7: 12, 12: 26, 24: 26, 30: 1, 48: 5, 52: 4, 96: 4, 168: 3, 336: 1}
"""Usual seasons, and how often each is drawn: quarters, months, weeks, hours and parts of them."""

LONGER = {4: 13, 12: 4, 24: 7, 48: 7, 96: 7}
"""How many of these seasons make a longer one: days make weeks."""


def seasonal(rng: np.random.Generator, length: int) -> np.ndarray:
    """`[length]` steps of a repeated profile, trend and noise, added or multiplied; one in eight without."""
    season = _season(rng, length)
    noise = 10 ** rng.uniform(-2.5, -0.3)
    if rng.random() < 0.12:
        season, noise = np.zeros(length), 10 ** rng.uniform(-2, 0)
    trend = _unit(trend_line(rng, np.arange(length)))
    irregular = noise * _noise(rng, length)
    if rng.random() < 0.65:
        return 10 ** rng.uniform(-1.3, 1.0) * trend + season + irregular
    largest = max(float(np.abs(season).max()), 1e-6)
    factor = 1 + rng.uniform(0.05, 0.45) * season / largest + 0.3 * irregular
    series = np.exp(rng.uniform(0.05, 0.8) * trend) * factor
    return np.maximum(series, 0) if rng.random() < 0.3 else series


# ---- a season and how it changes ---------------------------------------------------------------------------


def _season(rng: np.random.Generator, length: int) -> np.ndarray:
    """A profile repeated over `length` steps; profile and amplitude may change slowly."""
    period = _period(rng, length)
    count = length // period + 2
    profile = _profile(rng, period)
    cycles = np.tile(profile, (count, 1))
    if rng.random() < 0.5:
        cycles += np.cumsum(10 ** rng.uniform(-2, -0.6) * rng.standard_normal((count, period)), axis=0)
    if rng.random() < 0.5:
        growth = np.cumsum(10 ** rng.uniform(-2.3, -0.8) * rng.standard_normal(count))
        cycles *= np.exp(growth)[:, None]
    if period in LONGER and rng.random() < (0.5 if period in (24, 48) else 0.25):
        cycles = _longer_season(rng, cycles, profile)
    start = int(rng.integers(period))
    return cycles.ravel()[start : start + length]


def _period(rng: np.random.Generator, length: int) -> int:
    if rng.random() < 0.93:
        shares = np.array(list(PERIODS.values()))
        return int(rng.choice(list(PERIODS), p=shares / shares.sum()))
    return int(np.exp(rng.uniform(np.log(3), np.log(max(8, length / 2.5)))))


def _longer_season(rng: np.random.Generator, cycles: np.ndarray, profile: np.ndarray) -> np.ndarray:
    """Cycles `[n, period]` of which some differ in size, level and shape, in turn: weekends among days."""
    period = len(profile)
    turns = LONGER[period] if rng.random() < 0.8 else int(rng.integers(2, 9))
    last = np.arange(turns) >= turns - max(1, round(2 * turns / 7))
    if rng.random() < 0.5:
        size, level = 1 + last * rng.uniform(-0.9, 0.5), last * rng.normal()
    else:
        size = 1 + rng.uniform(0, 0.5) * rng.standard_normal(turns)
        level = rng.uniform(0, 0.8) * rng.standard_normal(turns)
    turn = np.arange(len(cycles)) % turns
    if rng.random() < 0.3:
        other = rng.random() * last[turn][:, None]
        cycles = (1 - other) * cycles + other * _profile(rng, period)
    return cycles * size[turn][:, None] + level[turn][:, None]


# ---- profiles ----------------------------------------------------------------------------------------------


def _profile(rng: np.random.Generator, period: int) -> np.ndarray:
    """`[period]` of mean 0 and standard deviation 1: waves, any smooth shape, bumps, or steps and peaks."""
    profile = _unit(PROFILES[rng.integers(len(PROFILES))](rng, period))
    return profile if profile.any() else rng.standard_normal(period)


def _waves(rng: np.random.Generator, period: int) -> np.ndarray:
    orders = np.arange(1, rng.integers(2, max(3, min(8, period // 2 + 1))))
    sizes = rng.standard_normal((2, len(orders))) / orders ** rng.uniform(0, 1.5)
    angles = 2 * np.pi * np.outer(orders, np.arange(period) / period)
    return sizes[0] @ np.sin(angles) + sizes[1] @ np.cos(angles)


def _smooth(rng: np.random.Generator, period: int) -> np.ndarray:
    window = np.hanning(rng.integers(3, max(4, period // 3 + 3)))
    return np.convolve(np.tile(rng.standard_normal(period), 3), window, "same")[period : 2 * period]


def _bumps(rng: np.random.Generator, period: int) -> np.ndarray:
    """One to three bumps on a flat floor, as of daylight or rush hours; now and then dips."""
    profile = np.zeros(period)
    for _ in range(rng.integers(1, 4)):
        away = np.abs(np.arange(period) - rng.uniform(0, period))
        away = np.minimum(away, period - away) / (period * rng.uniform(0.02, 0.2) + 0.3)
        profile += rng.uniform(0.3, 1) * np.exp(-0.5 * away**2)
    if rng.random() < 0.3:
        profile = np.maximum(profile - rng.uniform(0.05, 0.3), 0)
    return -profile if rng.random() < 0.25 else profile


def _peaks(rng: np.random.Generator, period: int) -> np.ndarray:
    profile = rng.standard_normal(period)
    return profile * (rng.random(period) < rng.uniform(0.1, 0.6)) if rng.random() < 0.5 else profile


PROFILES: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (_waves, _smooth, _bumps, _peaks)


def _noise(rng: np.random.Generator, length: int) -> np.ndarray:
    """Normal or heavy-tailed, and autoregressive or not."""
    draw = rng.standard_normal(length) if rng.random() < 0.6 else rng.standard_t(4, length) / 1.4
    if rng.random() < 0.6:
        return draw
    memory = rng.uniform(0.3, 0.97)
    return np.asarray(lfilter([np.sqrt(1 - memory**2)], [1.0, -memory], draw))


def _unit(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1; zeros if constant."""
    centred = values - values.mean()
    spread = float(centred.std())
    return centred / spread if spread > 1e-9 else np.zeros_like(values)
