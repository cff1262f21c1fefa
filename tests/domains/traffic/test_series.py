"""The clock, the sensors and the gaps of a series."""

from __future__ import annotations

import numpy as np
import pytest

from domains.traffic.series import TrafficSeries, infer_interval, regular_clock, time_features
from zoo.errors import DataError


def series(
    steps: int = 12, sensors: int = 3, start: str = "2024-01-01", interval: int = 5, **changes
) -> TrafficSeries:
    values = np.arange(1, steps * sensors + 1, dtype=np.float32).reshape(steps, sensors, 1)
    fields = {
        "values": values,
        "timestamps": regular_clock(start, steps, interval),
        "sensor_ids": [f"s{i}" for i in range(sensors)],
        "interval_minutes": interval,
    }
    return TrafficSeries(**(fields | changes))


def without_rows(whole: TrafficSeries, rows: list[int]) -> TrafficSeries:
    kept = np.delete(np.arange(len(whole.values)), rows)
    return TrafficSeries(whole.values[kept], whole.timestamps[kept], whole.sensor_ids, whole.interval_minutes)


def test_time_features_count_monday_as_zero_and_slots_from_midnight() -> None:
    stamps = np.array(["2012-03-01T00:00", "2012-03-04T23:55", "2012-03-05T00:07"], dtype="datetime64[s]")
    assert time_features(stamps, 5).tolist() == [[3, 0], [6, 287], [0, 1]]


def test_weekday_clock_leaves_out_saturday_and_sunday() -> None:
    clock = regular_clock("2012-05-01", 44 * 288, 5, weekdays_only=True)
    assert clock[-1] == np.datetime64("2012-06-29T23:55")
    assert set(time_features(clock, 5)[:, 0].tolist()) == {0, 1, 2, 3, 4}


def test_weekend_left_out_of_weekday_series_is_no_gap_but_a_jump() -> None:
    clock = regular_clock("2012-05-03", 3 * 288, 5, weekdays_only=True)
    weekdays = series(3 * 288, timestamps=clock)
    weekdays.check()
    assert weekdays.jumps().tolist() == [2 * 288]


def test_check_returns_a_sound_series() -> None:
    sound = series()
    assert sound.check() is sound


def test_filled_series_has_nan_rows_where_the_gap_was_and_keeps_the_rest() -> None:
    whole = series()
    filled = without_rows(whole, [4, 5]).filled()
    assert np.isnan(filled.values[[4, 5]]).all()
    np.testing.assert_array_equal(np.delete(filled.values, [4, 5], 0), np.delete(whole.values, [4, 5], 0))
    np.testing.assert_array_equal(filled.timestamps, whole.timestamps)


def test_select_reorders_sensors() -> None:
    chosen = series().select(["s2", "s0"])
    np.testing.assert_array_equal(chosen.values, series().values[:, [2, 0]])
    assert chosen.sensor_ids == ["s2", "s0"]


def test_interval_is_the_most_frequent_distance() -> None:
    assert infer_interval(without_rows(series(), [3, 7]).timestamps, "x") == 5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            series(timestamps=regular_clock("2024-01-01", 12, 5)[[0, 1, 2, 2, *range(4, 12)]]),
            r"row 3 .* repeats .* row 2",
        ),
        (
            series(timestamps=regular_clock("2024-01-01", 12, 5)[[0, 2, 1, *range(3, 12)]]),
            r"row 2 .* is earlier than row 1",
        ),
        (
            series(
                timestamps=regular_clock("2024-01-01", 12, 5) + (np.arange(12) > 5) * np.timedelta64(60, "s")
            ),
            r"row 6 .* not a multiple of 5 minutes",
        ),
        (without_rows(series(), [4, 5]), r"2 steps are missing between row 3 .* and row 4 .*data\.gaps=fill"),
        (series(interval=7), "7 minutes does not divide a day"),
        (series(sensor_ids=["s0", "s1", "s0"]), r"1 sensor \('s0'\) appear more than once"),
        (series(sensor_ids=["s0", "s1"]), r"shape \(12, 3, 1\).*2 sensors"),
        (
            series(values=np.zeros((12, 3, 1), dtype=np.float32)),
            r"3 sensors \('s0', 's1', 's2'\) never report.*dead_sensors=drop",
        ),
        (
            series(values=np.where(np.arange(36).reshape(12, 3, 1) == 4, np.inf, 1).astype(np.float32)),
            "infinite reading at row 1, sensor s1",
        ),
        (series(steps=0), "holds no readings"),
    ],
)
def test_check_names_the_fault(wrong: TrafficSeries, message: str) -> None:
    with pytest.raises(DataError, match=message):
        wrong.check()


def test_select_names_absent_sensors() -> None:
    with pytest.raises(DataError, match=r"no readings of 1 sensor \('s9'\)"):
        series().select(["s1", "s9"])


def test_filling_a_series_with_its_own_split_is_refused() -> None:
    gappy = without_rows(series(), [4])
    gappy.parts = {"train": (0, 11), "val": (0, 11), "test": (0, 11)}
    with pytest.raises(DataError, match="its own split"):
        gappy.filled()
