"""Baselines on series where the right answer is known, and on the real week."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from domains.traffic.baselines import LastValue, Ridge, TimeOfDayMean, baseline_errors, batches
from domains.traffic.data import TrafficData
from domains.traffic.metrics import HorizonErrors
from domains.traffic.windows import Windows

SLOTS = 24


def windows(values: torch.Tensor, history: int = 3, horizon: int = 2) -> Windows:
    """All windows of `[T, N]` readings at `SLOTS` per day; 0 is missing."""
    steps = torch.arange(len(values))
    time = torch.stack([steps // SLOTS % 7, steps % SLOTS], dim=1)
    starts = torch.arange(len(values) - history - horizon + 1)
    return Windows(values, values, values != 0, time, starts, history, horizon)


def test_last_value_skips_missing_readings() -> None:
    values = torch.tensor([[1.0, 9.0], [2.0, 0.0], [0.0, 0.0], [4.0, 8.0], [5.0, 7.0]])
    train = windows(values)
    baseline = LastValue()
    baseline.fit(train)
    assert baseline(next(batches(train)))[0].tolist() == [[2.0, 9.0], [2.0, 9.0]]


def test_last_value_of_a_silent_sensor_is_its_training_mean() -> None:
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 8.0], [5.0, 6.0]])
    train = windows(values)
    baseline = LastValue()
    baseline.fit(train)
    assert baseline(next(batches(train)))[0, 0].tolist() == [3.0, 7.0]


def test_time_of_day_mean_is_exact_on_a_daily_pattern() -> None:
    pattern = torch.rand(SLOTS, 5) + 1
    values = pattern.repeat(4, 1)
    values[3, 2] = values[50, 1] = 0.0
    baseline = TimeOfDayMean(SLOTS)
    baseline.fit(windows(values))
    batch = next(batches(windows(pattern.repeat(2, 1))))
    torch.testing.assert_close(baseline(batch), batch.future)


def test_time_of_day_never_seen_falls_back_to_the_sensor() -> None:
    values = torch.full((SLOTS, 2), 4.0)
    values[:, 1] = 6.0
    values[10] = 0.0
    baseline = TimeOfDayMean(SLOTS)
    baseline.fit(windows(values))
    assert baseline.table[10].tolist() == [4.0, 6.0]


def test_ridge_finds_a_linear_recurrence() -> None:
    values = torch.zeros(200, 4, dtype=torch.float64)
    values[:2] = torch.tensor([[1.0], [3.0]]) + torch.rand(2, 4)
    for t in range(2, 200):
        values[t] = 1.6 * values[t - 1] - values[t - 2] + 6
    data = windows(values.float())
    ridge = Ridge(alpha=1e-9)
    ridge.fit(data)
    batch = next(batches(data))
    torch.testing.assert_close(ridge(batch), batch.future, atol=2e-4, rtol=0)


def test_ridge_ignores_missing_targets() -> None:
    values = torch.randn(300, 3).cumsum(0) + 100
    full = windows(values)
    observed = torch.rand(values.shape) > 0.3
    gaps = Windows(values, values * observed, observed, full.time, full.starts, 3, 2)
    corrupt = Windows(values, torch.where(observed, values, 1e6), observed, full.time, full.starts, 3, 2)
    one, two = Ridge(), Ridge()
    one.fit(gaps)
    two.fit(corrupt)
    torch.testing.assert_close(one.weight, two.weight)


def test_real_week_gives_the_recorded_errors(shared_data: Path) -> None:
    """The METR-LA week, 70/10/20 inside: figures of the domain's specification, section 8."""
    folder = shared_data / "traffic" / "los-loop"
    data = TrafficData(
        "week", str(folder / "metr-la-week1.h5"), split_windows="inside", spatial_embedding="laplacian"
    )
    data.setup()
    assert [data.size(split) for split in ("train", "val", "test")] == [1388, 179, 380]
    models = {"last": LastValue(), "time of day": TimeOfDayMean(data.steps_per_day), "ridge": Ridge()}
    errors = baseline_errors(models, data.train_set, data.test_set, HorizonErrors(12))
    recorded = {"last": (3.58, 4.38, 5.80), "time of day": (5.38, 5.36, 5.31), "ridge": (3.50, 4.40, 5.87)}
    for name, maes in recorded.items():
        assert errors[name]["mae"][[2, 5, 11]].tolist() == pytest.approx(maes, abs=0.01)
