"""Numpy arrays `[T, N]` or `[T, N, C]` in `npz` and `npy` files, some of whose channels may tell the time of
day and the day of week; those become time stamps."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from domains.traffic.formats.clock import PUBLISHED, Clock
from domains.traffic.formats.common import quoted, refuse_impostors
from domains.traffic.series import MINUTES_PER_DAY, TrafficSeries
from zoo.errors import DataError, did_you_mean

PEMS_CHANNELS = ["flow", "occupancy", "speed"]
WRITTEN = ("data", "timestamps", "sensor_ids", "channels")  # the arrays of an npz made by `write_series`


def read_npz(path: Path, key: str | None, clock: Clock) -> TrafficSeries:
    """The array called `key`, `data`, or the only one; with names and times if `write_series` made the
    file."""
    arrays = load_npz(path)
    if key is None and set(WRITTEN) <= arrays.keys():
        times = arrays["timestamps"].astype("datetime64[s]")
        ids, channels = arrays["sensor_ids"].tolist(), arrays["channels"].tolist()
        return TrafficSeries(arrays["data"], times, ids, clock.interval_of(times), channels, source=str(path))
    return read_array(path, choose(arrays, path, key), clock)


def choose(arrays: dict[str, np.ndarray], path: Path, key: str | None) -> np.ndarray:
    """The readings among the arrays of a file: those called `key`, `data`, or the only ones."""
    if key is None and {"x", "y"} <= arrays.keys():
        raise DataError(
            f"{path} holds windows x, y of one part: give the folder with train, val and test.npz instead."
        )
    readings = {name: array for name, array in arrays.items() if array.ndim in (2, 3)}
    if key is None:
        key = "data" if "data" in readings or len(readings) != 1 else next(iter(readings))
    if key not in readings:
        raise DataError(
            f"{path} has no array {key!r} of shape [steps, sensors(, channels)]; it has {quoted(arrays)}. "
            f"Set data.key.{did_you_mean(key, arrays)}"
        )
    return readings[key]


def load_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz; a DataError if one of them is pickled."""
    refuse_impostors(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"{path} cannot be read as npz without running pickles: {error}.") from None


def load_npy(path: Path) -> np.ndarray:
    """The array of an npy; a DataError if it is pickled."""
    refuse_impostors(path)
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a numpy array without running pickles: {error}.") from None


def read_array(path: Path, values: np.ndarray, clock: Clock) -> TrafficSeries:
    """The series of an array `[T, N]` or `[T, N, C]`, some of whose channels may tell the time."""
    if values.ndim not in (2, 3) or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: {values.dtype} of shape {values.shape}, but numbers [steps, sensors(, channels)] are "
            "expected."
        )
    values = values.astype(np.float32).reshape(*values.shape[:2], -1)
    return split_time(path, values, clock)


def split_time(path: Path, values: np.ndarray, clock: Clock) -> TrafficSeries:
    """Turn the channels that hold time of day (fraction) and day of week into time stamps."""
    steps, sensors, count = values.shape
    time_of_day = next((c for c in range(1, count) if _is_time_of_day(values[:, :, c])), None)
    day_of_week = None
    if time_of_day is None:
        timestamps, interval = clock.invent(steps, sensors)
    else:
        others = (c for c in range(1, count) if c != time_of_day)
        day_of_week = next(
            (c for c in others if _is_day_of_week(values[:, :, c], values[:, 0, time_of_day])), None
        )
        days = None if day_of_week is None else values[:, 0, day_of_week]
        timestamps, interval = _timestamps_of(values[:, 0, time_of_day], days, sensors, clock)
    kept = [c for c in range(count) if c not in (time_of_day, day_of_week)]
    names = PEMS_CHANNELS if len(kept) == 3 else ["value", *(f"channel{c}" for c in kept[1:])]
    ids = [str(i) for i in range(sensors)]
    return TrafficSeries(values[:, :, kept], timestamps, ids, interval, list(names), source=str(path))


def _is_time_of_day(channel: np.ndarray) -> bool:
    """Whether `[T, N]` is the same for all sensors, in [0, 1), and mostly grows by a fixed fraction of a
    day."""
    known = channel[~np.isnan(channel[:, 0])]
    if len(known) < 3 or not (known == known[:, :1]).all() or known.min() < 0 or known.max() >= 1:
        return False
    growth = np.diff(known[:, 0]) % 1
    usual = np.median(growth)
    return bool(usual > 0 and (np.abs(growth - usual) < 1e-4).mean() > 0.9)


def _is_day_of_week(channel: np.ndarray, time_of_day: np.ndarray) -> bool:
    """Whether `[T, N]` counts days 0 .. 6 (or sevenths), the same for all sensors, changing at midnight
    only."""
    known = ~np.isnan(channel[:, 0])
    if not (channel[known] == channel[known][:, :1]).all():
        return False
    days, time_of_day = channel[known, 0], time_of_day[known]
    if days.max() < 1:
        days = days * 7
    changes = np.flatnonzero(np.diff(days) != 0) + 1
    at_midnight = time_of_day[changes] < time_of_day[changes - 1]
    return bool(
        np.allclose(days, days.round(), atol=1e-4)
        and days.min() >= 0
        and days.max() <= 6.001
        and at_midnight.all()
    )


def _timestamps_of(
    time_of_day: np.ndarray, day_of_week: np.ndarray | None, sensors: int, clock: Clock
) -> tuple[np.ndarray, int]:
    """Time stamps and interval from a day's fraction and, if known, the day of week; NaN continues the
    clock."""
    known = ~np.isnan(time_of_day)
    per_day = round(1 / float(np.median(np.diff(time_of_day[known]) % 1)))
    slot = np.nan_to_num(time_of_day * per_day).round().astype(np.int64) % per_day
    cycle, position = per_day, slot
    if day_of_week is not None:
        days = np.nan_to_num(day_of_week * (7 if np.nanmax(day_of_week) < 1 else 1)).round().astype(np.int64)
        cycle, position = 7 * per_day, days * per_day + slot
    ahead = np.where(known[1:], np.diff(position) % cycle, 1)
    if (ahead == 0).any():
        row = int(np.argmax(ahead == 0)) + 1
        raise DataError(f"{clock.path}: the time of day stands still at row {row}.")
    if MINUTES_PER_DAY % per_day:
        raise DataError(f"{clock.path}: {per_day} steps a day are no whole number of minutes each.")
    interval = MINUTES_PER_DAY // per_day
    date = clock.start or PUBLISHED.get((len(slot), sensors), (None,))[0]
    if date is None:
        if day_of_week is None:
            raise DataError(f"{clock.path} tells the time of day but no date: set data.start=YYYY-MM-DD.")
        date = np.datetime64("2018-01-01") + int(position[0] // per_day)  # a Monday; only weekdays matter
    first = clock.first_row(str(date)).astype("datetime64[D]")
    rows = slot[0] + np.concatenate([[0], np.cumsum(ahead)])
    return first.astype("datetime64[s]") + rows * np.timedelta64(interval * 60, "s"), interval
