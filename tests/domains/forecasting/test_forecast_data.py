"""Forecasting data: tables, M4, the series that ship with the zoo, and how they are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.backtest import Item, SeriesSet, rolling_windows
from domains.forecasting.batches import ForecastWindows, RandomWindows, window_samples
from domains.forecasting.data import ForecastData
from domains.forecasting.sources import embedded_sets, m4_part, read_m4, read_set
from zoo.errors import ConfigError, DataError


def long_table(path: Path, steps: int = 120, **columns: Any) -> Path:
    """Two series of hours, `a` counts up from 0, `b` from 1,000."""
    stamps = pd.date_range("2024-01-01", periods=steps, freq="h")
    frames = [
        pd.DataFrame({"unique_id": name, "ds": stamps, "y": start + np.arange(steps)} | columns)
        for name, start in (("a", 0), ("b", 1000))
    ]
    table = pd.concat(frames)
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    return path


def file_data(path: Path, **options: Any) -> ForecastData:
    data = ForecastData("file", path, **({"horizon": 24, "steps": 3, "batch_size": 4} | options))
    data.setup()
    return data


# ---- sources -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_usual_columns_are_found(tmp_path: Path, name: str) -> None:
    series = read_set(long_table(tmp_path / name), horizon=24)
    assert [item.name for item in series.items] == ["a", "b"]
    assert (series.season, list(series.targets)) == (24, ["y"])
    assert series.items[1].target[0, :2].tolist() == [1000, 1001]


def test_a_wide_table_is_one_series_of_several_columns(tmp_path: Path) -> None:
    stamps = pd.date_range("2024-01-01", periods=5, freq="D")
    pd.DataFrame({"date": stamps, "OT": range(5), "HUFL": range(5)}).to_csv(tmp_path / "ETT.csv")
    series = read_set(tmp_path / "ETT.csv", horizon=1, target=["OT"], past=["HUFL"])
    assert [item.name for item in series.items] == ["ETT"]
    assert list(series.items[0].past) == ["HUFL"]
    alone = read_set(tmp_path / "ETT.csv", horizon=1)
    assert [item.name for item in alone.items] == ["OT", "HUFL"]
    two = pd.DataFrame({"item_id": "a", "date": stamps, "OT": range(5), "HUFL": range(5)})
    two.to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(DataError, match=r"which column is to be forecast\? .*'OT', 'HUFL'"):
        read_set(tmp_path / "two.csv", horizon=1)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    long_table(tmp_path / "sales.csv")
    with pytest.raises(DataError, match=r"There is no file .*sale\.csv\. Did you mean 'sales\.csv'"):
        read_set(tmp_path / "sale.csv", horizon=1)
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(DataError, match=r"a\.xlsx: series are read from \.csv"):
        read_set(tmp_path / "a.xlsx", horizon=1)
    (tmp_path / "empty.csv").touch()
    with pytest.raises(DataError, match=r"empty\.csv cannot be read"):
        read_set(tmp_path / "empty.csv", horizon=1)
    pd.DataFrame({"a": [1.0]}).to_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"b\.csv has no column of time stamps.*timestamp_column=NAME"):
        read_set(tmp_path / "b.csv", horizon=1)


def test_gaps_are_an_error_or_filled(tmp_path: Path) -> None:
    table = pd.read_csv(long_table(tmp_path / "a.csv")).drop(index=5)
    table.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match=r"series 'a' is irregular.*gaps=fill"):
        read_set(tmp_path / "a.csv", horizon=1)
    series = read_set(tmp_path / "a.csv", horizon=1, gaps="fill")
    assert np.flatnonzero(np.isnan(series.items[0].target[0])).tolist() == [5]


def test_m4_files_are_joined(tmp_path: Path) -> None:
    columns = [f"V{i}" for i in range(1, 61)]
    pd.DataFrame([["H1", *range(59)]], columns=columns).to_csv(tmp_path / "Hourly-train.csv", index=False)
    pd.DataFrame([["H1", *range(59, 107)]], columns=columns[:49]).to_csv(
        tmp_path / "Hourly-test.csv", index=False
    )
    assert m4_part(tmp_path) == m4_part(tmp_path / "Hourly-train.csv") == "Hourly"
    series = read_m4(tmp_path)
    np.testing.assert_array_equal(series.items[0].target[0], np.arange(107))
    with pytest.raises(DataError, match=r"Daily-train\.csv"):
        read_m4(tmp_path, "Daily")


def test_series_that_ship_with_the_zoo() -> None:
    sets = {series.name: series for series in embedded_sets()}
    assert {name: (len(s.items), s.season) for name, s in sets.items()} == {
        "monthly": (3, 12),
        "quarterly": (12, 4),
        "yearly": (2, 1),
    }
    assert all(item.length > 3 * series.horizon for series in sets.values() for item in series.items)


# ---- windows -----------------------------------------------------------------------------------------------


def counting(length: int, targets: int = 1, **covariates: np.ndarray) -> Item:
    return Item("s", np.arange(length)[None] + 100.0 * np.arange(targets)[:, None], **covariates)  # pyright: ignore[reportArgumentType]


def test_rolling_windows_end_at_the_last_step() -> None:
    series = SeriesSet("s", [counting(20), counting(7)], season=1, horizon=4)
    windows = rolling_windows(series, 4, windows=3, stride=2)
    assert [window.cut for window in windows] == [
        12,
        14,
        16,
        1,
        3,
    ]  # nothing is left of the short one's first
    assert windows[0].future[:, 0].tolist() == [12, 13, 14, 15]
    with pytest.raises(DataError, match="the longest series has 20 steps; a forecast of 30 needs 31"):
        rolling_windows(series, 30)
    with pytest.raises(ConfigError, match="windows=0"):
        rolling_windows(series, 4, windows=0)


def test_the_future_of_past_covariates_is_never_shown() -> None:
    covariate = np.arange(30.0)
    item = counting(30, past={"p": covariate}, known={"k": -covariate})
    inputs = item.inputs(20, 5, context_length=8)
    assert inputs["target"].shape == (1, 8)
    assert set(inputs["past_covariates"]) == {"p", "k"}
    assert list(inputs["future_covariates"]) == ["k"]
    np.testing.assert_array_equal(inputs["future_covariates"]["k"], -covariate[20:25])
    series = SeriesSet("s", [item], season=1, horizon=5)
    [sample] = window_samples(rolling_windows(series, 5), context_length=8)
    assert not sample.future[:2].isfinite().any()
    assert sample.future[2].isfinite().all()
    assert sample.target[0].isfinite().all()
    assert not sample.target[1:].isfinite().any()


def test_random_windows_depend_on_seed_epoch_and_index_and_reach_both_ends() -> None:
    series = SeriesSet("s", [counting(40), counting(10)], season=1, horizon=6)
    windows = RandomWindows(series, 500, horizon=6, min_past=6, context_length=64, seed=1)
    cuts = [windows.window(i).cut for i in range(500)]
    assert {len(windows.window(i).item.target[0]) for i in range(50)} == {40}  # the other is too short
    assert (min(cuts), max(cuts)) == (6, 34)
    again = RandomWindows(series, 500, horizon=6, min_past=6, context_length=64, seed=1)
    assert [again.window(i).cut for i in range(500)] == cuts
    again.set_epoch(1)
    assert [again.window(i).cut for i in range(500)] != cuts
    with pytest.raises(DataError, match="no series has the 90 training steps"):
        RandomWindows(series, 1, horizon=30, min_past=60, context_length=64)


def test_targets_are_forecast_alone_where_groups_are_off() -> None:
    windows = rolling_windows(SeriesSet("s", [counting(20, targets=2)], season=1, horizon=4), 4)
    alone = ForecastWindows([windows], 512, groups=False)
    assert [entry.row for entry in (alone[0], alone[1])] == [0, 1]
    assert alone[1].inputs["target"].tolist() == list(range(100, 116))
    assert ForecastWindows([windows], 512)[0].inputs["target"].shape == (2, 16)


# ---- the data module ---------------------------------------------------------------------------------------


def test_training_ends_two_horizons_before_the_end(tmp_path: Path) -> None:
    data = file_data(long_table(tmp_path / "a.csv", steps=200))
    longest = max(data.train_set.window(i).cut + 24 for i in range(300))
    assert longest == 200 - 48
    assert {window.cut for window in data.val_set.windows} == {200 - 48}
    assert {window.cut for window in data.test_windows[0]} == {200 - 24}


def test_several_test_windows_are_kept_from_training(tmp_path: Path) -> None:
    data = file_data(long_table(tmp_path / "a.csv", steps=200), windows=3, stride=10)
    assert sorted({window.cut for window in data.test_windows[0]}) == [156, 166, 176]
    assert max(data.train_set.window(i).cut + 24 for i in range(300)) == 156 - 24


def test_batches_hold_rows_and_targets(tmp_path: Path) -> None:
    data = file_data(long_table(tmp_path / "a.csv", price=1.5), known=["price"], target="y")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.context) == len(batch.groups) == 8
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.future[1::2].isfinite().all()
    assert batch.target[::2].isfinite().all()
    alone = file_data(tmp_path / "a.csv", known=["price"], target="y", groups=False)
    assert next(iter(alone.train_dataloader())).groups.tolist() == list(range(8))


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.rows=0: at least 1"):
        ForecastData(rows=0)
    with pytest.raises(ConfigError, match=r"data\.path=FILE"):
        ForecastData("file", horizon=3).setup()
    with pytest.raises(ConfigError, match=r"data\.horizon=24"):
        ForecastData("file", long_table(tmp_path / "a.csv")).setup()


def test_a_table_is_described(tmp_path: Path) -> None:
    facts, [row] = ForecastData.describe(long_table(tmp_path / "a.csv"))
    assert facts["series"] == "2: 'a', 'b'"
    assert (facts["steps"], facts["season"]) == ("120 to 120", "24 steps")
    assert (row["target"], row["max"], row["missing"]) == ("y", "1119", "0.00 %")
    with pytest.raises(ConfigError, match=r"'gap'\. Did you mean 'gaps'"):
        ForecastData.describe(tmp_path / "a.csv", gap="fill")
