"""From independent series to dependent ones: mixed at one time, one after another, or bound to a level."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

Base = Callable[[int, int], np.ndarray]
"""Makes independent series: their number and length -> `[number, length]`."""

SHAPES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: x,
    lambda x: x,
    np.tanh,
    lambda x: np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0.0),
    lambda x: x * np.abs(x),
)


def cotemporaneous(rng: np.random.Generator, rows: int, length: int, base: Base) -> np.ndarray:
    """`[rows, length]`: g(A x_t) of a sparse mixing matrix A, a shape g and independent series x."""
    sources = standardised(base(int(rng.integers(1, rows + 1)), length))
    mixing = rng.standard_normal((rows, len(sources))) * (rng.random((rows, len(sources))) < 0.7)
    mixed = SHAPES[rng.integers(len(SHAPES))](mixing @ sources)
    return mixed + _noise(rng, mixed)


def lead_lag(rng: np.random.Generator, rows: int, length: int, base: Base, max_lag: int = 48) -> np.ndarray:
    """`[rows, length]`: the first series lead, the others are sums of them, up to `max_lag` steps later."""
    leaders = int(rng.integers(1, rows))
    sources = standardised(base(leaders, length + max_lag))
    followers = rows - leaders
    weights = rng.standard_normal((followers, leaders)) * (rng.random((followers, leaders)) < 0.8)
    lags = np.minimum(rng.geometric(0.12, (followers, leaders)) - 1, max_lag)
    late = np.zeros((followers, length))
    for follower in range(followers):
        for leader in range(leaders):
            start = max_lag - lags[follower, leader]
            late[follower] += weights[follower, leader] * sources[leader, start : start + length]
    return np.concatenate([sources[:, max_lag:], late + _noise(rng, late)])


def cointegrated(rng: np.random.Generator, rows: int, length: int, base: Base) -> np.ndarray:
    """`[rows, length]`: shared random walks times loadings, and stationary errors; `base` is one of them."""
    trends = np.cumsum(rng.standard_normal((rng.integers(1, 3), length)), axis=1)
    memory = rng.uniform(0, 0.9)
    errors = np.asarray(lfilter([1.0], [1.0, -memory], rng.standard_normal((rows, length)), axis=1))
    series = rng.normal(0, 1, (rows, len(trends))) @ trends + rng.uniform(0.3, 3) * errors
    if rng.random() < 0.5:
        series += rng.normal(0, 2, (rows, 1)) * standardised(base(1, length))
    return series


def standardised(series: np.ndarray) -> np.ndarray:
    """Each row with mean 0 and standard deviation 1; a constant one becomes 0."""
    centred = series - series.mean(axis=1, keepdims=True)
    return centred / np.maximum(centred.std(axis=1, keepdims=True), 1e-6)


def _noise(rng: np.random.Generator, series: np.ndarray) -> np.ndarray:
    """A little of it, in proportion to each series."""
    spread = series.std(axis=1, keepdims=True) + 1e-3
    return spread * 10 ** rng.uniform(-2, -0.3) * rng.standard_normal(series.shape)
