"""Random linear processes: autoregressions and exponential smoothing."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter

BURN_IN = 200
SEASONS = (4, 7, 12, 12, 24, 24, 48, 52)


MAX_ORDER = 6


def autoregression(rng: np.random.Generator, length: int) -> np.ndarray:
    """`[length]` steps of an AR(p) process, p from 1 to 6, its roots drawn inside the unit circle.

    One in four is summed up, to a process with a unit root.
    """
    roots: list[complex] = []
    for _ in range(rng.integers(1, MAX_ORDER // 2 + 1)):
        modulus = 1 - 10 ** rng.uniform(-2.5, -0.1)
        if rng.random() < 0.5:
            roots.append(modulus * rng.choice((-1.0, 1.0), p=(0.2, 0.8)))
        else:
            root = modulus * np.exp(1j * rng.uniform(0, np.pi))
            roots += [root, root.conjugate()]
    noise = rng.standard_normal(length + BURN_IN)
    series = np.asarray(lfilter([1.0], np.poly(roots).real, noise))[BURN_IN:]
    return np.cumsum(series) if rng.random() < 0.25 else series


def exponential_smoothing(rng: np.random.Generator, length: int) -> np.ndarray:
    """`[length]` steps of the state-space model ETS(A, {N, A, Ad}, {N, A}) (Hyndman et al. 2008, 2.5)."""
    alpha = rng.uniform(0.02, 0.6)
    has_trend, damping = rng.random() < 0.5, rng.choice((1.0, rng.uniform(0.8, 0.98)))
    beta = alpha * rng.uniform(0, 0.2) if has_trend else 0.0
    season = int(rng.choice(SEASONS)) if rng.random() < 0.7 else 1
    gamma = (1 - alpha) * rng.uniform(0, 0.3) if season > 1 else 0.0
    seasonal = (rng.standard_normal(season) * rng.uniform(1, 8) * (season > 1)).tolist()
    level, trend = 0.0, float(rng.normal(0, 0.05)) if has_trend else 0.0
    series = []
    for t, error in enumerate(rng.standard_normal(length).tolist()):
        phase = t % season
        series.append(level + damping * trend + seasonal[phase] + error)
        level, trend = level + damping * trend + alpha * error, damping * trend + beta * error
        seasonal[phase] += gamma * error
    return np.array(series)
