"""Checks of long frames: every mistake costs one message that names the series."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.series import (
    checked_frame,
    fill_gaps,
    future_timestamps,
    infer_frequency,
    parse_frequency,
    season_length,
)
from zoo.errors import ConfigError, DataError


def frame(**changes: Any) -> pd.DataFrame:
    days = ["2024-01-01", "2024-01-02", "2024-01-03"]
    columns = {"item_id": list("bbbaaa"), "timestamp": days * 2, "target": [1.0, 2, 3, 4, 5, 6]}
    return pd.DataFrame(columns | changes)


def of_both(first: list[str], second: list[str]) -> pd.DataFrame:
    """The frame with these days of January 2024 for `b` and `a`."""
    return frame(timestamp=[f"2024-01-{day}" for day in [*first, *second]])


def check(df: pd.DataFrame, **options: Any) -> pd.DataFrame:
    return checked_frame(df, **({"target": ["target"]} | options))


def test_rows_are_sorted_by_time_and_series_keep_their_order() -> None:
    shuffled = frame().iloc[[4, 1, 2, 5, 0, 3]]
    found = check(shuffled)
    assert found["item_id"].tolist() == list("aaabbb")
    assert found["target"].tolist() == [4, 5, 6, 1, 2, 3]
    assert infer_frequency(found) == parse_frequency("D")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestamp": ["2024-01-01", "2024-01-01", "2024-01-03"] * 2}, "'b' has two rows for 2024-01-01"),
        (
            {"timestamp": ["2024-01-01", "2024-13-02", "2024-01-03"] * 2},
            "'b', row 1: '2024-13-02' is no date",
        ),
        ({"timestamp": ["2024-01-01", None, "2024-01-03"] * 2}, "series 'b' has a row without a time stamp"),
        ({"timestamp": range(6)}, "holds numbers such as 0, not dates"),
        ({"timestamp": ["2024-01-01 00:00+00:00", "2024-01-02 00:00+02:00"] * 3}, "mixes time zones"),
        ({"target": [1.0, 2, 3, 4, np.inf, 6]}, "series 'a' has an infinite 'target' at 2024-01-02"),
        ({"target": list("xyzxyz")}, "target 'target' must hold numbers; it has .* such as 'x'"),
        ({"target": [True, False] * 3}, "must hold numbers; it has bool"),
        ({"item_id": ["b", None, "b", "a", "a", "a"]}, "row 1 has no 'item_id'"),
    ],
)
def test_bad_rows_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(frame(**changes))


def test_columns_are_checked() -> None:
    with pytest.raises(DataError, match=r"no column 'tagret'\. Did you mean 'target'"):
        check(frame(), target=["tagret"])
    with pytest.raises(DataError, match=r"'target' is asked for twice.* a target cannot also be a covariate"):
        check(frame(), covariates=["target"])
    with pytest.raises(DataError, match="has no rows"):
        check(frame().iloc[:0])


def test_a_series_without_values_is_kept_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = check(frame(target=[1.0, 2, 3, np.nan, np.nan, np.nan]))
    assert len(found) == 6
    assert "no value at all in series 'a'" in caplog.text


def test_irregular_and_mixed_frequencies_are_named() -> None:
    gap = of_both(["01", "02", "09"], ["01", "02", "03"])
    with pytest.raises(DataError, match=r"series 'b' is irregular.*2024-01-02.*followed by 2024-01-09"):
        infer_frequency(check(gap))
    mixed = of_both(["01", "02", "03"], ["01", "08", "15"])
    with pytest.raises(DataError, match=r"mixes frequencies: 'b' is at 'D', 'a' is at 'W-MON'"):
        infer_frequency(check(mixed))
    with pytest.raises(DataError, match="no series has three rows"):
        infer_frequency(check(frame().iloc[[0, 1, 3]]))
    with pytest.raises(ConfigError, match="'hourly' is no frequency"):
        parse_frequency("hourly")


def test_a_given_frequency_is_taken_with_a_warning_where_rows_jump(caplog: pytest.LogCaptureFixture) -> None:
    gap = of_both(["01", "02", "09"], ["01", "02", "03"])
    with caplog.at_level(logging.WARNING):
        assert infer_frequency(check(gap), freq="D") == parse_frequency("D")
    assert "series 'b' do not follow each other at freq=D" in caplog.text


def test_gaps_are_filled_with_missing_values() -> None:
    months = ["2024-01-01", "2024-02-01", "2024-04-01", "2024-05-01"]
    df = checked_frame(
        pd.DataFrame({"item_id": "a", "timestamp": months, "target": [1.0, 2, 4, 5]}), target=["target"]
    )
    filled = fill_gaps(df, None, "item_id", "timestamp", "file")
    np.testing.assert_array_equal(filled["target"], [1, 2, np.nan, 4, 5])
    with pytest.raises(DataError, match="'a' has a row at 2024-02-01 00:00:00, between the steps"):
        fill_gaps(df, "2MS", "item_id", "timestamp", "file")


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        *(("h", 24), ("15min", 96), ("7min", 1), ("2h", 12), ("D", 1), ("B", 5), ("W-SUN", 1)),
        *(("MS", 12), ("ME", 12), ("QS-OCT", 4), ("YE", 1), ("30s", 120)),
    ],
)
def test_seasons_are_those_of_the_benchmarks(freq: str, season: int) -> None:
    assert season_length(freq) == season


def test_time_stamps_go_on_at_the_frequency() -> None:
    stamps = future_timestamps(pd.Timestamp("2024-01-31"), parse_frequency("ME"), 3)
    assert stamps.strftime("%m-%d").tolist() == ["02-29", "03-31", "04-30"]
