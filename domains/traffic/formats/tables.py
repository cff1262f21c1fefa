"""Tables as csv or parquet: wide, with one column per sensor, or long, with columns for time stamp, sensor
and one or more readings; which of the two it is, and what its columns mean, is found out from their names and
content."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import pandas as pd

from domains.traffic.formats.clock import Clock
from domains.traffic.formats.common import quoted
from domains.traffic.graph import numeric
from domains.traffic.series import TrafficSeries, listed, sensor_name
from zoo.errors import ConfigError, DataError, did_you_mean

TIMESTAMP = ("timestamp", "time", "datetime", "date_time", "date")
SENSOR = ("sensor", "sensor_id", "station", "station_id", "detector", "detector_id", "node", "node_id", "id")
MEASURES = ("value", "speed", "flow", "volume", "count", "occupancy")
WHITE_SPACE = r"\s+"
UNREADABLE = (
    csv.Error,
    pd.errors.ParserError,
    pd.errors.EmptyDataError,
    UnicodeDecodeError,
    OSError,
    EOFError,
)


def read_csv(path: Path, columns: Sequence[str] | None, header: bool | None, clock: Clock) -> TrafficSeries:
    """A table of text, plain or gzipped, with any usual separator."""
    try:
        separator = _separator(path)
        _refuse_short_rows(path, separator)
        head = pd.read_csv(path, header=None, dtype=str, nrows=500, sep=separator, keep_default_na=False)
        first = head.iloc[0].str.strip().tolist()
        has_header = _has_header(head) if header is None else header
        names = first if has_header else [str(i) for i in range(len(first))]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{path}: the header repeats {listed(repeated, 'name')}.")
        text: Any = {
            name: str for name in names if name.lower() in SENSOR or (columns and name == columns[1])
        }
        frame = pd.read_csv(
            path,
            header=None,
            names=names,
            skiprows=int(has_header),
            sep=separator,
            dtype=text,
            low_memory=False,
        )
    except UNREADABLE as error:
        raise DataError(f"{path} is not a table of text: {str(error).strip()}.") from None
    return _read_frame(frame, path, columns, clock)


def _open_text(path: Path) -> TextIO:
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8-sig", errors="replace"))


def _refuse_short_rows(path: Path, separator: str) -> None:
    """A row with cells missing at its end is a file cut off, not a row of missing readings."""
    with _open_text(path) as file:
        lines = (line for line in file if line.strip())
        if separator == WHITE_SPACE:
            lines, separator = (" ".join(line.split()) for line in lines), " "
        cells = [len(row) for row in csv.reader(lines, delimiter=separator)]
    short = next((row for row, count in enumerate(cells) if count < cells[0]), None)
    if short is not None:
        raise DataError(
            f"{path}: row {short + 1} of the file has {cells[short]} cells, but the first has {cells[0]}; "
            "the file may be cut off."
        )


def _separator(path: Path) -> str:
    """What the first line has most of, outside of quotes: comma, semicolon, tab, or white space."""
    with _open_text(path) as file:
        line = re.sub(r'"[^"]*"', "", file.readline())
    best = max(",;\t", key=line.count)
    return best if best in line else WHITE_SPACE


def _has_header(head: pd.DataFrame) -> bool:
    """Whether the first row names the columns.

    A row of numbers does if they are distinct whole numbers that count 0, 1, 2 ... or lie outside of all
    readings.
    """
    numbers = numeric(head.iloc[0])
    if numbers.isna().any():
        return pd.isna(pd.to_datetime(head.iat[0, 0], errors="coerce")) or bool(numbers.isna()[1:].any())
    if len(head) < 2 or numbers.duplicated().any() or not (numbers % 1 == 0).all():
        return False
    readings = head.iloc[1:].apply(numeric)
    outside = (numbers > np.nanmax(readings)) | (numbers < np.nanmin(readings))
    return bool(outside.any() or (len(numbers) > 1 and numbers.tolist() == list(range(len(numbers)))))


def read_parquet(path: Path, columns: Sequence[str] | None, clock: Clock) -> TrafficSeries:
    """A table as pandas or pyarrow writes it; an index that is not a row number counts as a column."""
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}.") from None
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index()
    return _read_frame(frame, path, columns, clock)


def _read_frame(
    frame: pd.DataFrame, path: Path, columns: Sequence[str] | None, clock: Clock
) -> TrafficSeries:
    """The series of a table: long if it has columns of time stamps and of sensors, else one column per
    sensor."""
    if frame.empty:
        raise DataError(f"{path} has no rows.")
    frame.columns = [str(name).strip() for name in frame.columns]
    if columns is not None:
        _check_columns(frame, path, columns)
        return _from_long(frame, path, columns[0], columns[1], list(columns[2:]), clock)
    time, sensor = _find(frame, TIMESTAMP), _find(frame, SENSOR)
    if time is not None and sensor is not None:
        return _from_long(frame, path, time, sensor, _measures(frame, path, time, sensor), clock)
    return _from_wide(frame, path, time, clock)


def _column(frame: pd.DataFrame, name: str) -> pd.Series:
    return cast(pd.Series, frame[name])


def _check_columns(frame: pd.DataFrame, path: Path, columns: Sequence[str]) -> None:
    if len(columns) < 3:
        raise ConfigError(
            f"data.columns={list(columns)}: names for time stamp, sensor and at least one value are expected."
        )
    for name in columns:
        if name not in frame:
            raise DataError(
                f"{path} has no column {name!r}; it has {quoted(frame)}.{did_you_mean(name, frame)}"
            )


def _find(frame: pd.DataFrame, aliases: Sequence[str]) -> str | None:
    names = {name.lower(): name for name in frame}
    return next((names[alias] for alias in aliases if alias in names), None)


def _measures(frame: pd.DataFrame, path: Path, time: str, sensor: str) -> list[str]:
    """The columns that hold readings: those of a usual name, else all that hold numbers."""
    others = [name for name in frame if name not in (time, sensor)]
    usual = [name for name in others if name.lower() in MEASURES]
    found = usual or [name for name in others if numeric(_column(frame, name)).notna().any()]
    if not found:
        raise DataError(
            f"{path} has columns {quoted(frame)}, but none with readings: set "
            "data.columns=[time,sensor,value]."
        )
    return found


def _from_long(
    frame: pd.DataFrame, path: Path, time: str, sensor: str, measures: list[str], clock: Clock
) -> TrafficSeries:
    """One row per time stamp and sensor, in any order; pairs without a row are missing readings."""
    stamps = _timestamps(_column(frame, time), path)
    if (absent := _column(frame, sensor).isna()).any():
        raise DataError(f"{path}: row {int(np.argmax(absent))} names no sensor in column {sensor!r}.")
    names = _column(frame, sensor).map(sensor_name)
    readings = np.stack([_numbers(_column(frame, name), path, names) for name in measures], axis=1)
    ids = sorted(
        names.unique(), key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name)
    )
    times, row = np.unique(stamps, return_inverse=True)
    column = names.map({name: i for i, name in enumerate(ids)}.__getitem__).to_numpy()
    repeated = pd.Series(row * len(ids) + column).duplicated().to_numpy()
    if repeated.any():
        again = int(np.argmax(repeated))
        raise DataError(
            f"{path}: row {again} repeats sensor {names.iat[again]} at {stamps[again]}: keep one of the two."
        )
    values = np.full((len(times), len(ids), len(measures)), np.nan, dtype=np.float32)
    values[row, column] = readings
    return TrafficSeries(values, times, ids, clock.interval_of(times), measures, source=str(path))


def _from_wide(frame: pd.DataFrame, path: Path, time: str | None, clock: Clock) -> TrafficSeries:
    """One row per time stamp, one column per sensor."""
    if time is None:
        first = frame.columns[0]
        if _looks_like_time(_column(frame, first)):
            time = first
        elif _is_row_number(_column(frame, first), first):
            frame = frame.drop(columns=first)
    timestamps = None if time is None else _timestamps(_column(frame, time), path)
    sensors = frame if time is None else frame.drop(columns=time)
    if sensors.shape[1] == 0:
        raise DataError(f"{path} has no column of readings beside {time!r}.")
    values = np.stack([_numbers(_column(sensors, name), path, name) for name in sensors], axis=1)[:, :, None]
    if timestamps is None:
        timestamps, interval = clock.invent(*values.shape[:2])
    else:
        interval = clock.interval_of(timestamps)
    return TrafficSeries(
        values, timestamps, [sensor_name(name) for name in sensors], interval, source=str(path)
    )


def _looks_like_time(column: pd.Series) -> bool:
    if pd.api.types.is_numeric_dtype(column):
        return False
    return pd.api.types.is_datetime64_any_dtype(column) or bool(
        pd.notna(pd.to_datetime(column.iat[0], errors="coerce"))
    )


def _is_row_number(column: pd.Series, name: str) -> bool:
    """Whether this is the index that `DataFrame.to_csv` writes under an empty name."""
    return name.lower() in ("", "index", "unnamed: 0") and np.array_equal(column, np.arange(len(column)))


def _timestamps(column: pd.Series, path: Path) -> np.ndarray:
    """`[T]` datetime64[s], wall-clock time, of dates, text, or seconds (or finer units) since 1970."""
    if pd.api.types.is_numeric_dtype(column):
        parsed = pd.to_datetime(column, unit=_epoch_unit(column, path), errors="coerce")
    else:
        try:
            parsed = pd.to_datetime(
                column, errors="coerce", format=None if column.dtype.kind == "M" else "ISO8601"
            )
            if parsed.isna().any():
                parsed = pd.to_datetime(column, errors="coerce", format="mixed")
        except ValueError as error:
            raise DataError(
                f"{path}, column {column.name!r}: {error}. Write local times without a zone."
            ) from None
    if parsed.isna().any():
        row = int(np.argmax(parsed.isna()))
        raise DataError(
            f"{path}: row {row} has {column.iat[row]!r} for a time stamp (column {column.name!r})."
        )
    if parsed.dt.tz is not None:
        parsed = parsed.dt.tz_localize(None)
    return parsed.to_numpy().astype("datetime64[s]")


def _epoch_unit(column: pd.Series, path: Path) -> str:
    largest = float(np.nanmax(np.abs(column.to_numpy(dtype=np.float64)), initial=0))
    for unit, limit in (("s", 1e11), ("ms", 1e14), ("us", 1e17), ("ns", np.inf)):
        if 1e8 <= largest < limit:
            return unit
    raise DataError(
        f"{path}: column {column.name!r} holds numbers up to {largest:g}, which are no time stamps."
    )


def _numbers(column: pd.Series, path: Path, sensors: str | pd.Series) -> np.ndarray:
    """`[T]` float32, NaN for empty cells; `sensors` is the name that a message gives, of all rows or each."""
    numbers = numeric(column)
    wrong = (numbers.isna() & column.notna()).to_numpy()
    if wrong.any():
        row = int(np.argmax(wrong))
        sensor = sensors if isinstance(sensors, str) else sensors.iat[row]
        raise DataError(f"{path}: row {row} has {column.iat[row]!r} for a reading of sensor {sensor}.")
    return numbers.to_numpy(dtype=np.float32, na_value=np.nan)
