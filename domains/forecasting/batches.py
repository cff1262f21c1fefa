"""Training batches: rows of synthetic groups or of windows into real series, each a function of its index.

Letters in shapes: R rows, T steps of history, F steps of the future.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domains.forecasting.backtest import Inputs, SeriesSet, Window
from domains.forecasting.metrics import LEVELS
from domains.forecasting.pipeline.inputs import prepare
from domains.forecasting.synthetic import UNIVARIATE, draw_group
from zoo.errors import DataError

SHORTEST = 24
"""Steps of the shortest history that is drawn."""


class Rows(NamedTuple):
    """A sample, or samples below each other: what `Chronos2.forward` takes."""

    context: Tensor
    """float32 `[R, T]`, NaN where missing."""
    future: Tensor
    """float32 `[R, F]`, what is known of the future; NaN elsewhere."""
    target: Tensor
    """float32 `[R, F]`, what is to be forecast; NaN for covariates."""
    groups: Tensor
    """int64 `[R]`, equal for rows that see each other; from 0."""


def collate(samples: Sequence[Rows]) -> Rows:
    """Join samples; histories are filled up on the left and futures on the right with NaN.

    Steps in front of the first value of all rows are left out, which changes no forecast.
    """
    steps = max(sample.context.shape[1] for sample in samples)
    ahead = max(sample.future.shape[1] for sample in samples)
    context = torch.cat([_filled(s.context, left=steps - s.context.shape[1]) for s in samples])
    future, target = (
        torch.cat([_filled(part, right=ahead - part.shape[1]) for part in parts])
        for parts in ([s.future for s in samples], [s.target for s in samples])
    )
    counts = [0, *(int(sample.groups.max()) + 1 for sample in samples)]
    first = np.cumsum(counts)
    groups = torch.cat([s.groups + int(start) for s, start in zip(samples, first, strict=False)])
    seen = (~context.isnan()).any(dim=0).nonzero()
    start = int(seen[0]) if len(seen) else steps - 1
    return Rows(context[:, start:], future, target, groups)


def _filled(values: Tensor, left: int = 0, right: int = 0) -> Tensor:
    return torch.nn.functional.pad(values, (left, right), value=torch.nan)


# ---- synthetic ---------------------------------------------------------------------------------------------


class SyntheticSamples(Dataset):
    """Samples of a number of synthetic rows: single series, and groups with or without covariates.

    A sample depends on (seed, epoch, index) alone. The steps of the future, the longest history and whether
    there are groups of several series are drawn for each batch of `batch_size` samples in a row, so that no
    row is mostly padding, and a batch of single series needs no attention among rows.

    Args:
        size: samples of an epoch.
        rows: of each sample.
        context_length: steps of the longest history.
        horizon: steps of the longest future; the others are a half and a quarter of it.
        multivariate: share of the batches that are of groups of several series.
        generator: one for all, see `draw_group`; None: the mixture.
        redraw: samples change with the epoch.
        seed: validation samples take another.
    """

    def __init__(
        self,
        size: int,
        *,
        rows: int,
        context_length: int,
        horizon: int,
        batch_size: int = 1,
        multivariate: float = 0.3,
        generator: str | None = None,
        redraw: bool = True,
        seed: int = 0,
    ) -> None:
        self.size, self.rows, self.context_length = size, rows, context_length
        self.horizon, self.batch_size = horizon, batch_size
        self.multivariate, self.generator, self.seed, self.epoch = multivariate, generator, seed, 0
        self.redraw = redraw
        self._single = generator if generator in UNIVARIATE else None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch if self.redraw else 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Rows:
        of_batch = np.random.default_rng([self.seed, self.epoch, index // self.batch_size, 0])
        ahead = max(1, self.horizon >> int(of_batch.integers(3)))
        longest = self.context_length if of_batch.random() < 0.6 else self._history(of_batch)
        grouped = of_batch.random() < self.multivariate
        rng = np.random.default_rng([self.seed, self.epoch, index, 1])
        parts, left = [], self.rows
        while left:
            parts += self._groups(rng, left, longest, ahead, grouped=grouped)
            left = self.rows - sum(len(part.context) for part in parts)
        return collate(parts)

    def _history(self, rng: np.random.Generator) -> int:
        """A length between the shortest and the longest history, shorter ones more often."""
        shortest = min(SHORTEST, self.context_length)
        return int(np.exp(rng.uniform(np.log(shortest), np.log(self.context_length + 1))))

    def _groups(
        self, rng: np.random.Generator, rows: int, longest: int, ahead: int, *, grouped: bool
    ) -> list[Rows]:
        """A group of several rows, or single ones, at most `rows` in all."""
        length = longest + ahead
        if rows > 1 and grouped:
            group = draw_group(rng, int(rng.integers(2, rows + 1)), length, generator=self.generator)
            singles = [(group.values, group.num_targets, group.num_known)]
        else:
            count = int(rng.integers(1, min(rows, 4) + 1))
            single = {"generator": self._single, "covariates": 0.0, "missing": 0.03}
            values = draw_group(rng, count, length, **single).values
            singles = [(row[None], 1, 0) for row in values]
        cut = rng.random() < 0.15
        history = int(rng.integers(min(SHORTEST, longest), longest + 1)) if cut else longest
        return [
            _sample(values[:, longest - history :], ahead, targets, known)
            for values, targets, known in singles
        ]


def _sample(values: np.ndarray, ahead: int, targets: int, known: int) -> Rows:
    """A group `[R, T + F]`, whose rows are targets, covariates of the past, known ones."""
    rows = torch.from_numpy(np.ascontiguousarray(values))
    later = rows[:, -ahead:]
    future = torch.full_like(later, torch.nan)
    target = future.clone()
    target[:targets] = later[:targets]
    if known:
        future[-known:] = later[-known:]
    return Rows(rows[:, :-ahead], future, target, torch.zeros(len(rows), dtype=torch.int64))


# ---- windows into real series ------------------------------------------------------------------------------


def window_samples(windows: Sequence[Window], context_length: int, *, groups: bool = True) -> list[Rows]:
    """The windows as training samples; with `groups` off, every row is alone."""
    horizon = windows[0].horizon
    items = prepare([window.inputs(context_length) for window in windows], horizon)
    samples = []
    for window, item in zip(windows, items, strict=True):
        rows = len(item.context)
        target = torch.full((rows, horizon), torch.nan)
        target[: item.num_targets] = torch.from_numpy(window.future.T.astype(np.float32))
        ids = torch.zeros(rows, dtype=torch.int64) if groups else torch.arange(rows)
        samples.append(Rows(item.context, item.future, target, ids))
    return samples


class RandomWindows(Dataset):
    """Random windows as the official `fit` draws them: an item, then a step of it, each uniform.

    Args:
        sets: the series that may be trained on.
        size: samples of an epoch.
        horizon: steps to forecast.
        min_past: steps of history that a window must have.
        context_length: steps of history at most.

    Raises:
        DataError: no series has `min_past + horizon` steps.
    """

    def __init__(
        self, sets: SeriesSet, size: int, *, horizon: int, min_past: int, context_length: int, seed: int = 0
    ) -> None:
        self.items = [item for item in sets.items if item.length >= min_past + horizon]
        if not self.items:
            longest = max((item.length for item in sets.items), default=0)
            raise DataError(
                f"{sets.name}: no series has the {min_past + horizon} training steps that "
                f"data.min_past={min_past} and data.horizon={horizon} need; the longest has {longest}."
            )
        self.size, self.horizon, self.min_past = size, horizon, min_past
        self.context_length, self.seed, self.epoch = context_length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __getitems__(self, indices: Sequence[int]) -> list[Rows]:
        return window_samples([self.window(index) for index in indices], self.context_length)

    def window(self, index: int) -> Window:
        rng = np.random.default_rng([self.seed, self.epoch, index])
        item = self.items[int(rng.integers(len(self.items)))]
        return Window(item, int(rng.integers(self.min_past, item.length - self.horizon + 1)), self.horizon)


class FixedWindows(Dataset):
    """Given windows as training samples, in order."""

    def __init__(self, windows: Sequence[Window], context_length: int) -> None:
        self.windows, self.context_length = windows, context_length

    def __len__(self) -> int:
        return len(self.windows)

    def __getitems__(self, indices: Sequence[int]) -> list[Rows]:
        return window_samples([self.windows[index] for index in indices], self.context_length)


class Forecastable(NamedTuple):
    """What one forecast of a test is made from."""

    which: int
    """Number of the set."""
    window: int
    """Number of the window in it."""
    row: int | None
    """The target that is forecast alone; None: all together."""
    horizon: int
    inputs: Inputs
    levels: Sequence[float]
    """Quantile levels to forecast."""


class ForecastWindows(Dataset):
    """The forecasts to make in a test, of sets with horizons of their own.

    Args:
        windows: of each set.
        context_length: steps of history at most; None: all.
        groups: forecast targets together and with their covariates; else each target alone.
        levels: quantile levels to forecast.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[Window]],
        context_length: int | None,
        *,
        groups: bool = True,
        levels: Sequence[float] = LEVELS,
    ) -> None:
        self.context_length, self.levels = context_length, levels
        self.entries = [
            (which, place, row, window)
            for which, part in enumerate(windows)
            for place, window in enumerate(part)
            for row in ([None] if groups else range(len(window.item.target)))
        ]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Forecastable:
        which, place, row, window = self.entries[index]
        inputs = window.inputs(self.context_length)
        if row is not None:
            inputs = {"target": inputs["target"][row]}
        return Forecastable(which, place, row, window.horizon, inputs, self.levels)


def patches_for(horizon: int, patch_size: int) -> int:
    return math.ceil(horizon / patch_size)
