"""Forecasts that cost nothing: what every model must be better than.

Letters in shapes: B windows, P history steps, Q horizon steps, N sensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from domains.traffic.metrics import HorizonErrors
from domains.traffic.windows import Windows


@dataclass(frozen=True)
class Batch:
    """Windows in the units of the file, in float64, missing readings 0."""

    past: Tensor
    """`[B, P, N]`"""
    seen: Tensor
    """`[B, P, N]` True where a past reading is real."""
    future: Tensor
    """`[B, Q, N]`"""
    known: Tensor
    """`[B, Q, N]` True where a target is real."""
    slots: Tensor
    """`[B, Q]` slot of day of the targets."""


def batches(windows: Windows, size: int = 256) -> Iterator[Batch]:
    """All windows in order."""
    past, future = torch.arange(windows.history), windows.history + torch.arange(windows.horizon)
    for starts in windows.starts.split(size):
        before, after = starts[:, None] + past, starts[:, None] + future
        yield Batch(
            past=windows.targets[before].double(),
            seen=windows.observed[before],
            future=windows.targets[after].double(),
            known=windows.observed[after],
            slots=windows.time[after][..., 1],
        )


class Baseline(Protocol):
    """Learns from the training windows, then forecasts `[B, Q, N]` in the units of the file."""

    def fit(self, train: Windows) -> None: ...
    def __call__(self, batch: Batch) -> Tensor: ...


class LastValue:
    """The last real reading of the history goes on; the sensor's training mean where there is none."""

    mean: Tensor

    def fit(self, train: Windows) -> None:
        total, count = _sums_by_slot(train, 1)
        self.mean = _means(total, count)[0]

    def __call__(self, batch: Batch) -> Tensor:
        return carried(batch, self.mean)[:, -1:].expand(batch.future.shape)


class TimeOfDayMean:
    """The mean of a sensor's training readings at this time of day; its overall mean where it has none."""

    table: Tensor

    def __init__(self, steps_per_day: int) -> None:
        self.steps_per_day = steps_per_day

    def fit(self, train: Windows) -> None:
        self.table = _means(*_sums_by_slot(train, self.steps_per_day))

    def __call__(self, batch: Batch) -> Tensor:
        return self.table[batch.slots]


class Ridge:
    """Ridge regression on the P past readings, one set of weights per horizon step for all sensors together.

    Args:
        alpha: weight of the squared norm of the coefficients (of standardised readings), per sample.
    """

    mean: Tensor
    centre: Tensor
    spread: Tensor
    weight: Tensor

    def __init__(self, alpha: float = 1e-4) -> None:
        self.alpha = alpha

    def fit(self, train: Windows) -> None:
        total, count = _sums_by_slot(train, 1)
        self.mean = _means(total, count)[0]
        self.centre = total.sum() / count.sum()
        self.spread = _spread(train, self.centre)
        gram: Any = 0.0
        moment: Any = 0.0
        for batch in batches(train):
            lags, known = self._lags(batch), batch.known.double()
            target = self._scaled(batch.future) * known
            gram = gram + torch.einsum("bnf,bqn,bng->qfg", lags, known, lags)
            moment = moment + torch.einsum("bnf,bqn->qf", lags, target)
        samples = gram[:, -1:, -1:].clamp(min=1)
        penalty = self.alpha * samples * torch.eye(gram.shape[-1], dtype=gram.dtype)
        self.weight = torch.linalg.solve(gram + penalty, moment)

    def __call__(self, batch: Batch) -> Tensor:
        return torch.einsum("bnf,qf->bqn", self._lags(batch), self.weight) * self.spread + self.centre

    def _scaled(self, values: Tensor) -> Tensor:
        return (values - self.centre) / self.spread

    def _lags(self, batch: Batch) -> Tensor:
        """Standardised past readings and a constant, `[B, N, P + 1]`; missing readings repeat the last."""
        lags = self._scaled(carried(batch, self.mean)).transpose(1, 2)
        return torch.cat([lags, torch.ones_like(lags[..., :1])], dim=-1)


def carried(batch: Batch, default: Tensor) -> Tensor:
    """The past `[B, P, N]`, a missing reading replaced by the last one before it, or by `default` `[N]`."""
    steps = torch.arange(batch.past.shape[1])[:, None]
    last = torch.where(batch.seen, steps, -1).cummax(dim=1).values
    return torch.where(last >= 0, batch.past.gather(1, last.clamp(min=0)), default)


def _training_rows(train: Windows) -> Tensor:
    """The rows of the series that training windows cover."""
    steps = torch.arange(train.history + train.horizon)
    return (train.starts[:, None] + steps).unique()


def _sums_by_slot(train: Windows, slots: int) -> tuple[Tensor, Tensor]:
    """Sum and number `[slots, N]` of the real training readings by part of the day and sensor."""
    rows = _training_rows(train)
    part = train.time[rows, 1] if slots > 1 else torch.zeros_like(rows)
    known = train.observed[rows].double()
    empty = torch.zeros(slots, known.shape[1], dtype=torch.float64)
    return empty.index_add(0, part, train.targets[rows].double() * known), empty.index_add(0, part, known)


def _means(total: Tensor, count: Tensor) -> Tensor:
    """Means `[slots, N]`; where a slot is empty that of the sensor, where the sensor is that of all."""
    overall = total.sum() / count.sum().clamp(min=1)
    sensor = torch.where(count.sum(0) > 0, total.sum(0) / count.sum(0).clamp(min=1), overall)
    return torch.where(count > 0, total / count.clamp(min=1), sensor)


def _spread(train: Windows, centre: Tensor) -> Tensor:
    rows = _training_rows(train)
    return (train.targets[rows].double() - centre)[train.observed[rows]].std(correction=0)


def baseline_errors(
    baselines: Mapping[str, Baseline], train: Windows, test: Windows, metric: HorizonErrors
) -> dict[str, dict[str, Tensor]]:
    """Fit each baseline on `train` and measure it on `test`."""
    errors = {}
    for name, baseline in baselines.items():
        baseline.fit(train)
        metric.reset()
        for batch in batches(test):
            metric.update(baseline(batch), batch.future, batch.known)
        errors[name] = metric.compute()
    return errors
