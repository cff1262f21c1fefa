"""Temporal causal models: random graphs over several series with lagged links (after Runge et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from domains.forecasting.synthetic.multivariate import Base, standardised

BURN_IN = 64
LINKS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: x,
    np.tanh,
    lambda x: np.maximum(x, 0.0),
    np.sin,
)
"""Each changes by no more than its argument does, so that weights of a sum below 1 keep a model stable."""


def causal_model(
    rng: np.random.Generator, nodes: int, length: int, base: Base, max_lag: int = 12
) -> np.ndarray:
    """`[nodes, length]`: each series follows its own past and that of its parents, with noise.

    Args:
        base: makes series; about half of the nodes without parents follow one.
        max_lag: steps that a link may take.
    """
    order, memory = rng.permutation(nodes), rng.uniform(0, 0.8, nodes)
    parents = np.triu(rng.random((nodes, nodes)) < rng.uniform(0.2, 0.8), 1)
    source, target = order[np.stack(np.nonzero(parents))]
    lags = rng.integers(1, max_lag + 1, len(source))
    weights = _stable_weights(rng, target, memory)
    noise = _noise(rng, nodes, length + BURN_IN)
    roots = np.setdiff1d(np.arange(nodes), target)
    driven = roots[rng.random(len(roots)) < 0.5]
    if len(driven):
        noise[driven] = 0.2 * noise[driven] + standardised(base(len(driven), length + BURN_IN))
    link = LINKS[rng.integers(len(LINKS))]
    series = _roll_out(noise, source, target, lags, weights, memory, link)
    return series[:, BURN_IN:]


def _stable_weights(rng: np.random.Generator, target: np.ndarray, memory: np.ndarray) -> np.ndarray:
    """One for each edge; with its memory, the sizes at a node sum up to less than 1."""
    weights = rng.uniform(0.3, 1, len(target)) * rng.choice((-1, 1), len(target))
    total = np.bincount(target, np.abs(weights), minlength=len(memory))
    return weights * (0.98 - memory[target]) / np.maximum(total[target], 1e-9)


def _noise(rng: np.random.Generator, nodes: int, length: int) -> np.ndarray:
    scale = 10 ** rng.uniform(-1.3, 0, (nodes, 1))
    draw = rng.normal if rng.random() < 0.7 else rng.laplace
    return scale * draw(size=(nodes, length))


def _roll_out(
    noise: np.ndarray,
    source: np.ndarray,
    target: np.ndarray,
    lags: np.ndarray,
    weights: np.ndarray,
    memory: np.ndarray,
    link: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """x_t = memory x_(t-1) + sum over edges of weight link(x_(t-lag)) + noise_t, `[nodes, length]`."""
    nodes, length = noise.shape
    start = max(int(lags.max(initial=1)), 1)
    series = np.zeros((start + length, nodes))
    inflow = np.zeros((nodes, len(source)))
    inflow[target, np.arange(len(source))] = weights
    for t, shock in enumerate(noise.T, start):
        series[t] = memory * series[t - 1] + inflow @ link(series[t - lags, source]) + shock
    return series[start:].T
