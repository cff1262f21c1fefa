"""A traffic series: the readings of N fixed sensors at T equally spaced times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from zoo.errors import DataError

MINUTES_PER_DAY = 24 * 60
GAPS = ("error", "fill", "keep")


@dataclass
class TrafficSeries:
    """Readings of a sensor network.

    Attributes:
        values: `[T, N, C]` float32 in the units of the file; NaN is a missing reading (a zero may be one
            too).
        timestamps: `[T]` datetime64[s], wall-clock time of each row.
        sensor_ids: N names, in the order of the sensor axis.
        interval_minutes: distance of two rows; divides a day.
        channels: C names; the first is the quantity to forecast unless the user says otherwise.
        parts: row ranges of `train`, `val` and `test` where the file prescribes a split; ranges may overlap.
        source: the file or recipe the readings come from, for messages.
    """

    values: np.ndarray
    timestamps: np.ndarray
    sensor_ids: list[str]
    interval_minutes: int
    channels: list[str] = field(default_factory=lambda: ["value"])
    parts: dict[str, tuple[int, int]] | None = None
    source: str = "series"

    @property
    def steps_per_day(self) -> int:
        return MINUTES_PER_DAY // self.interval_minutes

    def check(self, *, gaps: str = "error", dead_sensors: str = "error") -> TrafficSeries:
        """Return the series itself if its shapes, clock and sensors are sound.

        Args:
            gaps: `"error"` refuses rows left out; weekends do not count in a series of weekdays only.
            dead_sensors: `"error"` refuses sensors without a single reading other than zero.

        Raises:
            DataError: names the row or the sensors at fault, and the way out.
        """
        self._check_shapes()
        check_clock(self.timestamps, self.interval_minutes, self.source)
        if gaps == "error":
            self._check_gaps()
        if dead_sensors == "error":
            self.check_dead_sensors()
        return self

    def dead_sensors(self) -> list[str]:
        """Ids of the sensors whose first channel is missing or zero at every step."""
        first = self.values[:, :, 0]
        alive = ((first != 0) & ~np.isnan(first)).any(axis=0)
        return [sensor for sensor, lives in zip(self.sensor_ids, alive, strict=True) if not lives]

    def select(self, sensor_ids: Sequence[str]) -> TrafficSeries:
        """The series of these sensors in this order; a DataError names those that it does not have."""
        position = {sensor: i for i, sensor in enumerate(self.sensor_ids)}
        absent = [sensor for sensor in sensor_ids if sensor not in position]
        if absent:
            raise DataError(
                f"{self.source} has no readings of {listed(absent, 'sensor')}; "
                f"it holds {listed(self.sensor_ids, 'sensor')}."
            )
        columns = [position[sensor] for sensor in sensor_ids]
        return replace(self, values=self.values[:, columns], sensor_ids=list(sensor_ids))

    def jumps(self) -> np.ndarray:
        """Rows that do not follow the row before them by one interval (gaps and weekends left out)."""
        return np.flatnonzero(np.diff(self.timestamps) != _step(self.interval_minutes)) + 1

    def filled(self) -> TrafficSeries:
        """The series with a row of NaN for every time stamp that a gap left out."""
        if not len(self._gaps()):
            return self
        if self.parts is not None:
            raise DataError(
                f"{self.source} prescribes its own split, so its gaps cannot be filled: use gaps=keep."
            )
        row = (self.timestamps - self.timestamps[0]) // _step(self.interval_minutes)
        values = np.full((int(row[-1]) + 1, *self.values.shape[1:]), np.nan, dtype=np.float32)
        values[row.astype(int)] = self.values
        return replace(
            self,
            values=values,
            timestamps=regular_clock(self.timestamps[0], len(values), self.interval_minutes),
        )

    def facts(self) -> dict[str, str]:
        """What a person asks first of a file, by name."""
        steps, sensors, _ = self.values.shape
        dead, gaps = self.dead_sensors(), self._gaps()
        return {
            "file": self.source,
            "sensors": str(sensors),
            "steps": str(steps),
            "channels": ", ".join(self.channels),
            "period": f"{self.timestamps[0]} to {self.timestamps[-1]}",
            "interval": f"{self.interval_minutes} minutes ({self.steps_per_day} steps a day)",
            "split of the file": ", ".join(
                f"{part} rows {a}..{b}" for part, (a, b) in (self.parts or {}).items()
            )
            or "none",
            "gaps": f"{len(gaps)}, the first before row {gaps[0]}" if len(gaps) else "none",
            "dead sensors": listed(dead, "sensor") if dead else "none",
        }

    def statistics(self) -> list[dict[str, str]]:
        """One row per channel: share of NaN and of zeros, and moments of the readings other than NaN."""
        rows = []
        for c, channel in enumerate(self.channels):
            values = self.values[:, :, c]
            known = values[~np.isnan(values)].astype(np.float64)
            row = {
                "channel": channel,
                "NaN": f"{np.isnan(values).mean():.2%}",
                "zero": f"{(values == 0).mean():.2%}",
            }
            if len(known):
                measures = {"mean": np.mean, "std": np.std, "min": np.min, "median": np.median, "max": np.max}
                row |= {name: f"{measure(known):.4g}" for name, measure in measures.items()}
            rows.append(row)
        return rows

    def time_features(self) -> np.ndarray:
        """`[T, 2]` int64: day of week (Monday = 0) and slot of the day of every row."""
        return time_features(self.timestamps, self.interval_minutes)

    def _check_shapes(self) -> None:
        expected = (len(self.timestamps), len(self.sensor_ids), len(self.channels))
        if self.values.shape != expected:
            raise DataError(
                f"{self.source}: readings have shape {self.values.shape}, but there are {expected[0]} time "
                f"stamps, {expected[1]} sensors and {expected[2]} channels."
            )
        if 0 in expected:
            raise DataError(f"{self.source} holds no readings (steps, sensors, channels = {expected}).")
        if repeated := _repeated(self.sensor_ids):
            raise DataError(
                f"{self.source}: {listed(repeated, 'sensor')} appear more than once; ids must be unique."
            )
        if np.isinf(self.values).any():
            row, sensor, _ = np.argwhere(np.isinf(self.values))[0]
            raise DataError(
                f"{self.source}: infinite reading at row {row}, sensor {self.sensor_ids[sensor]}."
            )

    def _check_gaps(self) -> None:
        gaps = self._gaps()
        if len(gaps):
            row = int(gaps[0])
            lost = int((self.timestamps[row] - self.timestamps[row - 1]) / _step(self.interval_minutes)) - 1
            raise DataError(
                f"{self.source}: {lost} steps are missing between row {row - 1} "
                f"({self.timestamps[row - 1]}) and row {row} ({self.timestamps[row]})"
                + (f", and there are {len(gaps) - 1} more gaps" if len(gaps) > 1 else "")
                + ". Set data.gaps=fill to insert the lost rows as missing readings, or data.gaps=keep to "
                "leave them out (no window then crosses a gap)."
            )

    def check_dead_sensors(self) -> None:
        if dead := self.dead_sensors():
            raise DataError(
                f"{self.source}: {listed(dead, 'sensor')} never report anything but zero or NaN. "
                "Set data.dead_sensors=drop to leave such sensors out, or data.dead_sensors=keep."
            )

    def _gaps(self) -> np.ndarray:
        jumps = self.jumps()
        if not len(jumps) or weekday(self.timestamps).max() > 4:
            return jumps
        before, after = self.timestamps[jumps - 1], self.timestamps[jumps]
        weekend = np.timedelta64(2, "D") + _step(self.interval_minutes)
        return jumps[(after - before != weekend) | (weekday(after) != 0) | (weekday(before) != 4)]


def check_clock(timestamps: np.ndarray, interval_minutes: int, source: str | Path) -> None:
    """Refuse an interval that does not divide a day, and stamps that are unsorted, repeated or off the
    grid."""
    if interval_minutes < 1 or MINUTES_PER_DAY % interval_minutes:
        raise DataError(
            f"{source}: an interval of {interval_minutes} minutes does not divide a day of 1440 minutes."
        )
    differences = np.diff(timestamps)
    for wrong, what, cure in (
        (differences == np.timedelta64(0, "s"), "repeats the time stamp of", "keep one row per time stamp"),
        (differences < np.timedelta64(0, "s"), "is earlier than", "sort the rows by time"),
        (
            differences % _step(interval_minutes) != np.timedelta64(0, "s"),
            f"is not a multiple of {interval_minutes} minutes after",
            "round the stamps to the interval",
        ),
    ):
        if wrong.any():
            row = int(np.argmax(wrong)) + 1
            raise DataError(
                f"{source}: row {row} ({timestamps[row]}) {what} row {row - 1} ({timestamps[row - 1]}): "
                f"{cure}."
            )


def infer_interval(timestamps: np.ndarray, source: str | Path) -> int:
    """The most frequent distance of neighbouring rows, in minutes.

    Raises:
        DataError: fewer than two rows, or the distance is no whole number of minutes.
    """
    if len(timestamps) < 2:
        raise DataError(f"{source}: one time stamp does not tell the interval: set data.interval_minutes.")
    distances, counts = np.unique(np.diff(timestamps), return_counts=True)
    seconds = int(distances[np.argmax(counts)] / np.timedelta64(1, "s"))
    if seconds <= 0:
        check_clock(timestamps, 1, source)
    if seconds % 60:
        raise DataError(
            f"{source}: rows are {seconds} seconds apart; the interval must be a whole number of minutes."
        )
    return seconds // 60


def regular_clock(
    start: str | np.datetime64, steps: int, interval_minutes: int, weekdays_only: bool = False
) -> np.ndarray:
    """`[steps]` datetime64[s] from `start` on; `weekdays_only` leaves out Saturdays and Sundays."""
    begin = np.array(start, dtype="datetime64[s]")
    if not weekdays_only:
        return begin + np.arange(steps) * _step(interval_minutes)
    per_day = MINUTES_PER_DAY // interval_minutes
    first = begin.astype("datetime64[D]")
    row = np.arange(steps) + int((begin - first) / _step(interval_minutes))
    days = np.busday_offset(first, row // per_day, roll="forward")
    return days.astype("datetime64[s]") + (row % per_day) * _step(interval_minutes)


def time_features(timestamps: np.ndarray, interval_minutes: int) -> np.ndarray:
    """`[T, 2]` int64: day of week (Monday = 0 .. 6) and slot = floor(time since midnight / interval)."""
    midnight = timestamps.astype("datetime64[D]")
    slot = (timestamps - midnight) // _step(interval_minutes)
    return np.stack([weekday(timestamps), slot.astype(np.int64)], axis=1)


def weekday(timestamps: np.ndarray) -> np.ndarray:
    """Day of week of every time stamp, Monday = 0 (1970-01-01 was a Thursday)."""
    return (timestamps.astype("datetime64[D]").astype(np.int64) + 3) % 7


def sensor_name(sensor: Any) -> str:
    """The name of a sensor, whether a file writes it as text, bytes, or a number."""
    name = sensor.decode() if isinstance(sensor, bytes) else str(sensor).strip()
    return name[:-2] if name.endswith(".0") and name[:-2].isdigit() else name


def listed(names: Sequence[str], noun: str, most: int = 5) -> str:
    """`3 sensors ('a', 'b', 'c')`, cut after `most` names."""
    shown = ", ".join(repr(name) for name in names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} {noun}{'s' if len(names) != 1 else ''} ({shown})"


def _step(interval_minutes: int) -> np.timedelta64:
    return np.timedelta64(interval_minutes * 60, "s")


def _repeated(names: Sequence[str]) -> list[str]:
    unique, counts = np.unique(np.asarray(names, dtype=str), return_counts=True)
    return unique[counts > 1].tolist()
