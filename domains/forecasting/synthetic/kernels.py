"""KernelSynth: draws of Gaussian processes with a random kernel (Ansari et al. 2024, Chronos, 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.linalg import cholesky, toeplitz

GRID = 1024
"""Steps of the unit interval on which the kernels are defined."""

PERIODS = (24, 48, 96, 168, 336, 672, 7, 14, 30, 60, 365, 730, 4, 26, 52, 4, 6, 12, 4, 40, 10)
"""In steps: the seasons of hours, halves and quarters of hours, days, weeks, months, quarters, years."""

Kernel = np.ndarray
"""Of `length` points: `[length]` by lag where it is stationary, else `[length, length]`."""


def kernel_synth(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """`[count, length]` draws of one process: 1 to 5 kernels of the bank, joined by random sums and products.

    A piece of at most `GRID` steps is cut from the unit interval at a random place. Several draws of one
    kernel cost little more than one.
    """
    start = rng.integers(max(1, GRID - length + 1))
    x = (start + np.arange(length)) / (GRID - 1)
    kernels = [BANK[i](x) for i in rng.integers(len(BANK), size=rng.integers(1, 6))]
    joined = kernels[0]
    for kernel in kernels[1:]:
        joined = _join(joined, kernel, times=bool(rng.integers(2)))
    return draw(rng, count, joined)


def _join(a: Kernel, b: Kernel, *, times: bool) -> Kernel:
    if a.ndim != b.ndim:
        a, b = (toeplitz(k) if k.ndim == 1 else k for k in (a, b))
    return a * b if times else a + b


def draw(rng: np.random.Generator, count: int, kernel: Kernel) -> np.ndarray:
    """Normal vectors of this covariance by its Cholesky factor, with the least noise that lets it exist."""
    covariance = toeplitz(kernel) if kernel.ndim == 1 else kernel
    noise = rng.standard_normal((count, len(covariance)))
    diagonal = np.diag(covariance).copy()
    for jitter in (1e-9, 1e-7, 1e-5, 1e-3):
        np.fill_diagonal(covariance, diagonal + jitter * max(float(diagonal.max()), 1e-12))
        try:
            factor = cholesky(covariance, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        return noise @ factor.T
    raise np.linalg.LinAlgError("a sum of products of kernels is not positive definite")


# ---- the bank ----------------------------------------------------------------------------------------------


def _lags(x: np.ndarray) -> np.ndarray:
    return x - x[0]


def _periodic(x: np.ndarray, period: int) -> Kernel:
    return np.exp(-2 * np.sin(np.pi * _lags(x) * GRID / period) ** 2)


def _dot_product(x: np.ndarray, sigma: float) -> Kernel:
    return sigma**2 + np.outer(x, x)


def _squared_exponential(x: np.ndarray, length_scale: float) -> Kernel:
    return np.exp(-0.5 * (_lags(x) / length_scale) ** 2)


def _rational_quadratic(x: np.ndarray, alpha: float) -> Kernel:
    return (1 + _lags(x) ** 2 / (2 * alpha)) ** -alpha


def _white(x: np.ndarray, level: float) -> Kernel:
    return level * (_lags(x) == 0)


def _constant(x: np.ndarray) -> Kernel:
    return np.ones(len(x))


BANK: tuple[Callable[[np.ndarray], Kernel], ...] = (
    *(partial(_periodic, period=period) for period in PERIODS),
    *(partial(_dot_product, sigma=sigma) for sigma in (0.0, 1.0, 10.0)),
    *(partial(_squared_exponential, length_scale=scale) for scale in (0.1, 1.0, 10.0)),
    *(partial(_rational_quadratic, alpha=alpha) for alpha in (0.1, 1.0, 10.0)),
    *(partial(_white, level=level) for level in (0.1, 1.0)),
    _constant,
)
"""The 33 kernels that are drawn from, with replacement."""
