"""The mixture that a model is trained on: which generator, which roles, what is missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from domains.forecasting.synthetic.causal import causal_model
from domains.forecasting.synthetic.kernels import kernel_synth
from domains.forecasting.synthetic.multivariate import cointegrated, cotemporaneous, lead_lag, standardised
from domains.forecasting.synthetic.processes import autoregression, exponential_smoothing
from domains.forecasting.synthetic.seasonal import seasonal
from domains.forecasting.synthetic.trend_season import trend_season
from zoo.errors import ConfigError, did_you_mean

Univariate = Callable[[np.random.Generator, int, int], np.ndarray]
"""Generator, number of series, steps -> `[number, steps]`."""


def _one_by_one(make: Callable[[np.random.Generator, int], np.ndarray]) -> Univariate:
    return lambda rng, count, length: np.stack([make(rng, length) for _ in range(count)])


UNIVARIATE: dict[str, tuple[Univariate, float]] = {
    "seasonal": (_one_by_one(seasonal), 0.75),
    "trend_season": (_one_by_one(trend_season), 0.2),
    "exponential_smoothing": (_one_by_one(exponential_smoothing), 0.025),
    "kernels": (kernel_synth, 0.0175),
    "autoregression": (_one_by_one(autoregression), 0.0075),
}
"""Generators of single series, and how often each is drawn."""

MULTIVARIATE = {
    "causal": (causal_model, 0.25),
    "cotemporaneous": (cotemporaneous, 0.3),
    "lead_lag": (lead_lag, 0.3),
    "cointegrated": (cointegrated, 0.15),
}
"""Generators of groups of series, which make them from single ones."""

GENERATORS = (*UNIVARIATE, *MULTIVARIATE)
LARGEST = 1e6
"""Values are cut off here, after scaling: an unstable draw must not become infinite in float32."""


@dataclass(frozen=True)
class Group:
    """Series that see each other.

    Attributes:
        values: `[R, T]` float32, NaN where missing; rows are targets, then covariates known up to now, then
            covariates whose future is known.
        num_targets: how many rows are targets.
        num_known: how many of the last rows have a known future.
    """

    values: np.ndarray
    num_targets: int
    num_known: int


def draw_group(
    rng: np.random.Generator,
    rows: int,
    length: int,
    *,
    generator: str | None = None,
    covariates: float = 0.5,
    missing: float = 0.1,
) -> Group:
    """A group of `rows` series of `length` steps.

    Args:
        generator: its name; drawn by the shares above without one.
        covariates: share of the groups of several series in which some are covariates.
        missing: share of the groups that have gaps.

    Raises:
        ConfigError: there is no generator of this name, or it makes only groups.
    """
    values = _scaled(_values(rng, rows, length, generator))
    targets, known = rows, 0
    if rows > 1 and rng.random() < covariates:
        targets = int(rng.integers(1, rows))
        known = int(rng.integers(0, rows - targets + 1))
        values = values[rng.permutation(rows)] if rng.random() < 0.5 else values[::-1].copy()
    if rng.random() < missing:
        _lose(rng, values[: rows - known])
    return Group(values.astype(np.float32), targets, known)


def _values(rng: np.random.Generator, rows: int, length: int, generator: str | None) -> np.ndarray:
    if generator is not None and generator not in GENERATORS:
        raise ConfigError(
            f"There is no generator {generator!r}.{did_you_mean(generator, GENERATORS)} "
            f"Generators: {', '.join(GENERATORS)}."
        )
    if rows == 1 and generator in MULTIVARIATE:
        raise ConfigError(f"The generator {generator!r} makes groups: give at least two rows.")
    if rows == 1 or generator in UNIVARIATE:
        return _univariate(rng, rows, length, name=generator)
    name = generator or _choose(rng, {name: share for name, (_, share) in MULTIVARIATE.items()})
    base = partial(_univariate, rng, name=None)
    return MULTIVARIATE[name][0](rng, rows, length, base)


def _univariate(rng: np.random.Generator, count: int, length: int, *, name: str | None) -> np.ndarray:
    chosen = name or _choose(rng, {name: share for name, (_, share) in UNIVARIATE.items()})
    return UNIVARIATE[chosen][0](rng, count, length)


def _choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return list(shares)[rng.choice(len(shares), p=weights / weights.sum())]


def _scaled(values: np.ndarray) -> np.ndarray:
    """Each row centred and scaled: the models do so anyway, and float32 then holds any draw."""
    return np.clip(standardised(values), -LARGEST, LARGEST)


def _lose(rng: np.random.Generator, values: np.ndarray) -> None:
    """Leave out blocks of some rows, or single steps, in place."""
    length = values.shape[1]
    for row in values:
        if rng.random() < 0.5:
            row[rng.random(length) < rng.uniform(0, 0.3)] = np.nan
        else:
            start, size = rng.integers(length), rng.integers(1, max(2, length // 5))
            row[start : start + size] = np.nan
