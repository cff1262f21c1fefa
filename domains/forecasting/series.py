"""Frames of many series in long format: their checks, their frequency, the time stamps that come next.

A long frame has one row per series and time: a column that names the series, one of time stamps, one or more
of targets, the rest covariates.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.frequencies import to_offset
from pandas.tseries.offsets import BaseOffset

from zoo.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

Column = Any
"""A pandas series; its own hints are too wide to check against."""

SHOWN = 3
"""How many series a message names."""

SEASONS = {"s": 3600, "min": 1440, "h": 24, "B": 5, "D": 1, "W": 1, "M": 12, "Q": 4}
"""Unit of a frequency -> steps of the season that GIFT-Eval and Chronos Benchmark II take for it; else 1."""


def listed(names: Sequence[object], shown: int = SHOWN) -> str:
    """`'a', 'b', 'c' and 4 more`"""
    text = ", ".join(repr(str(name)) for name in names[:shown])
    return f"{text} and {len(names) - shown} more" if len(names) > shown else text


# ---- checks ------------------------------------------------------------------------------------------------


def checked_frame(
    df: pd.DataFrame,
    *,
    target: Sequence[str],
    covariates: Sequence[str] = (),
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    source: str = "The data frame",
) -> pd.DataFrame:
    """The columns asked for, with the rows of each series in the order of time.

    Series come in the order of their first appearance. Missing values stay NaN; a series without any value is
    allowed, with a warning; so is a constant one.

    Args:
        df: a long frame.
        target: numeric columns to forecast; none in a frame of the future.
        covariates: numeric, boolean or text columns.
        source: what messages call the frame.

    Raises:
        DataError: a column that is missing, of the wrong kind or named twice; time stamps that cannot be
            read, are missing or come twice; a value that is infinite.
    """
    _check_columns(df, [id_column, timestamp_column, *target, *covariates], source)
    if df.empty:
        raise DataError(f"{source} has no rows.")
    frame: Any = df[[id_column, timestamp_column, *target, *covariates]].copy()
    if (unnamed := frame[id_column].isna()).any():
        raise DataError(f"{source}: row {_first(unnamed)} has no {id_column!r}, so its series is unknown.")
    frame[timestamp_column] = _timestamps(frame[timestamp_column], frame[id_column], source)
    for name in target:
        frame[name] = _numbers(frame[name], frame[id_column], frame[timestamp_column], source)
    for name in covariates:
        _check_finite(frame[name], frame[id_column], frame[timestamp_column], source)
    frame = _sorted(frame, id_column, timestamp_column)
    _check_duplicates(frame, id_column, timestamp_column, source)
    _warn_of_flat(frame, target, id_column, source)
    return frame


def _check_columns(df: pd.DataFrame, wanted: Sequence[str], source: str) -> None:
    for name in wanted:
        if name not in df.columns:
            known = [str(column) for column in df.columns]
            raise DataError(
                f"{source} has no column {name!r}.{did_you_mean(str(name), known)} "
                f"It has: {', '.join(known)}."
            )
    twice = [name for i, name in enumerate(wanted) if name in wanted[:i]]
    if twice:
        raise DataError(
            f"{source}: column {twice[0]!r} is asked for twice. A column is the name of the series, the time "
            "stamp, a target or a covariate; a target cannot also be a covariate."
        )
    if not df.columns.is_unique:
        double = df.columns[df.columns.duplicated()][0]
        raise DataError(f"{source} has two columns called {double!r}.")


def _first(flags: Column) -> int:
    """Place of the first True."""
    return int(np.flatnonzero(flags.to_numpy())[0])


def _timestamps(values: Column, ids: Column, source: str) -> Column:
    if values.isna().any():
        raise DataError(f"{source}: series {_name(ids, values.isna())} has a row without a time stamp.")
    if pd.api.types.is_datetime64_any_dtype(values):
        return values
    if isinstance(values.dtype, pd.PeriodDtype):
        return values.dt.to_timestamp()
    if pd.api.types.is_numeric_dtype(values):
        raise DataError(
            f"{source}: column {values.name!r} holds numbers such as {values.iloc[0]}, not dates. Make dates "
            "of them, for example with pandas.to_datetime(..., unit='s')."
        )
    problem = ""
    for form in (None, "ISO8601"):
        try:
            read = pd.to_datetime(values, format=form)
        except ValueError as error:
            problem = str(error)
            continue
        if pd.api.types.is_datetime64_any_dtype(read):
            return read
        problem = "mixed time zones"
    if "time zone" in problem.replace("timezone", "time zone"):
        raise DataError(
            f"{source}: column {values.name!r} mixes time zones. Convert it, for example with "
            "pandas.to_datetime(..., utc=True)."
        )
    where = _unreadable(values)
    raise DataError(
        f"{source}: series {str(ids.iloc[where])!r}, row {where}: {str(values.iloc[where])!r} is no date "
        "that can be read like the others. Write dates as 2024-01-31 or 2024-01-31 12:00."
    )


def _unreadable(values: Column) -> int:
    """The first row that is no date, or else none of the first row's form."""
    read = pd.to_datetime(values, errors="coerce", format="mixed", utc=True)
    if not read.isna().any():
        read = pd.to_datetime(values, errors="coerce", utc=True)
    return _first(read.isna()) if read.isna().any() else 0


def _name(ids: Column, flags: Column) -> str:
    return repr(str(ids.iloc[_first(flags)]))


def _numbers(values: Column, ids: Column, stamps: Column, source: str) -> Column:
    """The values of a target as float64."""
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        known = values.dropna()
        if len(known) or values.dtype != object:
            example = f" such as {known.iloc[0]!r}" if len(known) else ""
            raise DataError(
                f"{source}: the target {values.name!r} must hold numbers; it has {values.dtype} values"
                f"{example}."
            )
    numbers = values.astype("float64")
    _check_finite(numbers, ids, stamps, source)
    return numbers


def _check_finite(values: Column, ids: Column, stamps: Column, source: str) -> None:
    if not pd.api.types.is_float_dtype(values):
        return
    infinite = pd.Series(np.isinf(values.to_numpy(dtype="float64", na_value=np.nan)))
    if infinite.any():
        where = _first(infinite)
        raise DataError(
            f"{source}: series {str(ids.iloc[where])!r} has an infinite {values.name!r} at "
            f"{stamps.iloc[where]}. Leave it empty if it is unknown."
        )


def _sorted(frame: Any, id_column: str, timestamp_column: str) -> pd.DataFrame:
    """Rows by the first appearance of their series, then by time."""
    place, stamps = pd.factorize(frame[id_column])[0], pd.DatetimeIndex(frame[timestamp_column]).asi8
    steps = np.diff(place)
    if ((steps > 0) | ((steps == 0) & (np.diff(stamps) > 0))).all():
        return frame.reset_index(drop=True)
    return frame.iloc[np.lexsort((stamps, place))].reset_index(drop=True)


def _check_duplicates(frame: Any, id_column: str, timestamp_column: str, source: str) -> None:
    ids, stamps = frame[id_column], frame[timestamp_column]
    twice = (stamps == stamps.shift()) & (ids == ids.shift()).fillna(False)
    if twice.any():
        where = _first(twice)
        names = ids[twice].unique().tolist()
        raise DataError(
            f"{source}: series {str(ids.iloc[where])!r} has two rows for {stamps.iloc[where]}"
            + (f"; so have {listed(names[1:])}" if len(names) > 1 else "")
            + ". Keep one row for each time, or name the column that tells the series apart."
        )


def _warn_of_flat(frame: Any, target: Sequence[str], id_column: str, source: str) -> None:
    for name in target:
        values = frame.groupby(id_column, sort=False, observed=True)[name].agg(["count", "min", "max"])
        empty = values.index[values["count"] == 0].tolist()
        constant = values.index[(values["min"] == values["max"]) & (values["count"] > 1)].tolist()
        if empty:
            log.warning("%s: %r has no value at all in series %s.", source, name, listed(empty))
        if constant:
            log.warning("%s: %r has one and the same value in series %s.", source, name, listed(constant))


# ---- frequency ---------------------------------------------------------------------------------------------


def series_bounds(ids: Column) -> np.ndarray:
    """`[I + 1]` row at which each series of a sorted frame starts, and the number of rows."""
    codes = pd.factorize(ids)[0]
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    return np.append(starts, len(codes))


def parse_frequency(freq: str | BaseOffset) -> BaseOffset:
    """A pandas frequency such as `"h"`, `"15min"`, `"MS"`.

    Raises:
        ConfigError: there is none of this name.
    """
    try:
        return to_offset(freq)
    except ValueError:
        raise ConfigError(
            f"{freq!r} is no frequency. Write for example 'h', '15min', 'D', 'B', 'W', 'MS' (month start), "
            "'ME' (month end), 'QS', 'YS'."
        ) from None


def infer_frequency(
    df: pd.DataFrame,
    id_column: str = "item_id",
    timestamp_column: str = "timestamp",
    freq: str | BaseOffset | None = None,
    *,
    source: str = "The data frame",
) -> BaseOffset:
    """The frequency that all series of a frame share.

    Args:
        df: sorted, as `checked_frame` returns it.
        freq: the frequency, where it is known; rows are then taken to follow each other at it, with a warning
            about series where they do not.

    Raises:
        DataError: no series has three rows or more, a series is irregular, or two differ.
        ConfigError: `freq` is no frequency.
    """
    frame: Any = df
    bounds, stamps = series_bounds(frame[id_column]), frame[timestamp_column].array
    series = [pd.DatetimeIndex(stamps[a:b]) for a, b in pairwise(bounds)]
    names = frame[id_column].iloc[bounds[:-1]].to_numpy()
    if freq is not None:
        offset = parse_frequency(freq)
        _warn_of_jumps(series, names, offset, source)
        return offset
    found: dict[str, list[str]] = {}
    known: dict[bytes, Any] = {}
    for name, index in zip(names, series, strict=True):
        if len(index) < 3:
            continue
        key = index.asi8.tobytes()
        if key not in known:
            known[key] = _inferred(index)
        if (one := known[key]) is None:
            raise DataError(f"{source}: {_irregular(str(name), index)}")
        found.setdefault(one, []).append(str(name))
    if not found:
        raise DataError(
            f"{source}: no series has three rows, so the frequency is unknown. Give it, as freq='h'."
        )
    if len(found) > 1:
        (a, first), (b, second), *_ = sorted(found.items(), key=lambda entry: -len(entry[1]))
        raise DataError(
            f"{source} mixes frequencies: {listed(first)} {_is(first)} at {a!r}, "
            f"{listed(second)} {_is(second)} at {b!r}. "
            "Forecast the series of each frequency in a call of their own, or resample them."
        )
    return parse_frequency(next(iter(found)))


def _inferred(index: pd.DatetimeIndex) -> str | None:
    """The frequency of a series by name; None where it is irregular."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pandas 3.1: the result will be an offset
        found: Any = pd.infer_freq(index)
    return getattr(found, "freqstr", found)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _irregular(name: str, index: pd.DatetimeIndex) -> str:
    """Where the steps of a series change."""
    steps = pd.Series(index[1:] - index[:-1])
    usual = steps.mode().iloc[0]
    where = int(np.flatnonzero((steps != usual).to_numpy())[0])
    return (
        f"series {name!r} is irregular: most steps are {usual}, but {index[where]} is followed by "
        f"{index[where + 1]}. Fill the gap with rows of missing values (gaps=fill does it where a file is "
        "read), or resample; or say that rows follow each other, with freq=..."
    )


def _warn_of_jumps(
    series: Sequence[pd.DatetimeIndex], names: np.ndarray, offset: BaseOffset, source: str
) -> None:
    jumping = []
    for name, index in zip(names, series, strict=True):
        grid = pd.date_range(index[0], periods=len(index), freq=offset)
        if not grid.equals(index):
            jumping.append(str(name))
    if jumping:
        log.warning(
            "%s: the rows of series %s do not follow each other at freq=%s; they are taken as if they did.",
            source,
            listed(jumping),
            offset.freqstr,
        )


def future_timestamps(last: pd.Timestamp, freq: BaseOffset, horizon: int) -> pd.DatetimeIndex:
    """The `horizon` time stamps that follow `last`."""
    return pd.DatetimeIndex([last + step * freq for step in range(1, horizon + 1)])


def season_length(freq: str | BaseOffset) -> int:
    """Steps of a season at a frequency, by `SEASONS`; 1 where a multiple of a unit does not divide it."""
    offset = parse_frequency(freq)
    unit = offset.rule_code.split("-")[0]
    steps = SEASONS.get(unit, SEASONS.get(unit.removesuffix("S").removesuffix("E"), 1))
    return steps // offset.n if steps % offset.n == 0 else 1


def fill_gaps(
    df: pd.DataFrame, freq: str | BaseOffset | None, id_column: str, timestamp_column: str, source: str
) -> pd.DataFrame:
    """A sorted frame with the rows that its series lack, their values missing.

    Args:
        freq: the frequency; None: the most frequent step of each series.

    Raises:
        DataError: a time stamp lies between those of the frequency.
    """
    parts = []
    for name, rows in df.groupby(id_column, sort=False):
        stamps = pd.DatetimeIndex(rows[timestamp_column])
        step = parse_frequency(freq) if freq is not None else _usual_step(stamps, str(name), source)
        grid = pd.date_range(stamps[0], stamps[-1], freq=step)
        if len(stray := stamps.difference(grid)):
            raise DataError(
                f"{source}: series {str(name)!r} has a row at {stray[0]}, between the steps of "
                f"{step.freqstr} from {stamps[0]}: the gaps cannot be filled. Resample the series."
            )
        filled = rows.set_index(timestamp_column).reindex(grid).rename_axis(timestamp_column).reset_index()
        filled[id_column] = name
        parts.append(filled[df.columns])
    return pd.concat(parts, ignore_index=True)


def _usual_step(stamps: pd.DatetimeIndex, name: str, source: str) -> BaseOffset:
    """The frequency of a series with gaps: that of its longest regular stretch's first rows."""
    if len(stamps) < 3:
        raise DataError(f"{source}: series {name!r} has {len(stamps)} rows: give freq=... to fill its gaps.")
    if (whole := _inferred(stamps)) is not None:
        return parse_frequency(whole)
    months = (stamps.year * 12 + stamps.month).to_numpy()
    if (stamps.day == 1).all() and (stamps == stamps.normalize()).all() and (np.diff(months) > 0).all():
        counts = np.bincount(np.diff(months))
        return parse_frequency(f"{int(counts.argmax())}MS")
    return to_offset(pd.Series(stamps[1:] - stamps[:-1]).mode().iloc[0])
