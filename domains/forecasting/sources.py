"""Where series come from: tables, the M4 files, and the real series that ship with the zoo."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.tseries.offsets import BaseOffset

from domains.forecasting.backtest import Item, SeriesSet, from_frame
from domains.forecasting.layouts import (
    ID_COLUMNS,
    JSON_SUFFIXES,
    TARGET_COLUMNS,
    TIME_COLUMNS,
    Layout,
    long_table,
    read_json_lines,
    read_text,
    read_tsf,
    usual,
)
from domains.forecasting.series import (
    checked_frame,
    fill_gaps,
    infer_frequency,
    listed,
    parse_frequency,
    season_length,
)
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.paths import data_dir

SUFFIXES = (".csv", ".csv.gz", ".txt", ".txt.gz", ".parquet", *JSON_SUFFIXES, ".tsf")


# ---- tables ------------------------------------------------------------------------------------------------


def read_frame(
    path: str | Path,
    *,
    id_column: str | None = None,
    timestamp_column: str | None = None,
    target: Sequence[str] | str | None = None,
    past: Sequence[str] = (),
    known: Sequence[str] = (),
    freq: str | None = None,
    gaps: str = "error",
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table of one or many series as a checked long frame.

    Args:
        path: CSV, Parquet, JSON lines or `.tsf` in one of the layouts of `layouts.py`. A table without a
            column of ids is one series; a wide one (ETT: date and seven columns) is a series of several
            targets, where they are named, or else one series per column.
        id_column, timestamp_column: found by their usual names where they are None.
        target: columns to forecast; None: a usual name, or the only column of numbers that is left.
        past, known: covariates known up to now, and those whose future is known.
        freq: where it cannot be inferred, and of series without time stamps.
        gaps: `error`, or `fill`: rows that are left out become missing values.

    Returns:
        The frame, sorted, with the columns asked for; and `id_column`, `timestamp_column`, `target`, `freq`.

    Raises:
        ConfigError: an option that is none.
        DataError: the file cannot be used; the message names file, column and series.
    """
    if gaps not in ("error", "fill"):
        raise ConfigError(f"gaps={gaps} is not one of error, fill.")
    path = Path(path)
    chosen = bool(target or past or known)
    table, told = _read_layout(path, freq=freq, timestamp_column=timestamp_column, choose=not chosen)
    freq = told or freq
    found_time = timestamp_column or usual(table, TIME_COLUMNS)
    if found_time is None:
        raise DataError(
            f"{path} has no column of time stamps; it has {listed(list(table.columns), 8)}. Name it: "
            "timestamp_column=NAME."
        )
    found_id = id_column or usual(table, ID_COLUMNS)
    if found_id is None:
        found_id = "item_id"
        table = table.assign(item_id=path.name.split(".")[0])
    targets = _targets(table, target, [found_id, found_time, *past, *known], path)
    frame = checked_frame(
        table,
        target=targets,
        covariates=[*past, *known],
        id_column=found_id,
        timestamp_column=found_time,
        source=str(path),
    )
    if gaps == "fill":
        frame = fill_gaps(frame, freq, found_id, found_time, str(path))
    offset = infer_frequency(frame, found_id, found_time, freq, source=str(path))
    return frame, {
        "id_column": found_id,
        "timestamp_column": found_time,
        "target": targets,
        "freq": offset,
    }


def _read_layout(path: Path, *, freq: str | None, **options: Any) -> Layout:
    if path.name.lower().endswith((*JSON_SUFFIXES, ".tsf")):
        _check_file(path)
        reader = read_tsf if path.suffix.lower() == ".tsf" else read_json_lines
        return reader(path, freq)
    return long_table(read_table(path), path, freq=freq, **options)


def read_table(path: Path) -> pd.DataFrame:
    """A CSV or Parquet file as it is; a bare matrix with columns 0, 1, 2, ...

    Raises:
        DataError: there is none, or it cannot be read.
    """
    _check_file(path)
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else read_text(path)
    except (ValueError, OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _check_file(path: Path) -> None:
    if not path.is_file():
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{did_you_mean(path.name, nearby)}")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{path}: series are read from {', '.join(SUFFIXES)}.")


def _targets(
    table: pd.DataFrame, given: Sequence[str] | str | None, taken: Sequence[str], path: Path
) -> list[str]:
    if given:
        return [given] if isinstance(given, str) else [str(name) for name in given]
    rest = [str(column) for column in table.columns if column not in taken]
    numbers = [name for name in rest if pd.api.types.is_numeric_dtype(table[name])]
    named = usual(table[numbers], TARGET_COLUMNS)
    if named is None and len(numbers) != 1:
        raise DataError(
            f"{path}: which column is to be forecast? Name it: target=COLUMN, or several as target=[A,B]. "
            f"It has {listed(rest, 10) or 'none left'}."
        )
    return [named or numbers[0]]


def read_set(
    path: str | Path,
    *,
    horizon: int,
    season: int | None = None,
    past: Sequence[str] = (),
    known: Sequence[str] = (),
    **options: Any,
) -> SeriesSet:
    """A table as the items of a `SeriesSet`; arguments as those of `read_frame`."""
    frame, found = read_frame(path, past=past, known=known, **options)
    return from_frame(
        frame,
        name=Path(path).name.split(".")[0],
        season=season or season_length(found["freq"]),
        horizon=horizon,
        past=past,
        known=known,
        **found,
    )


# ---- M4 ----------------------------------------------------------------------------------------------------

M4: dict[str, tuple[int, int, str]] = {
    "Hourly": (48, 24, "h"),
    "Daily": (14, 1, "D"),
    "Weekly": (13, 1, "W"),
    "Monthly": (18, 12, "MS"),
    "Quarterly": (8, 4, "QS"),
    "Yearly": (6, 1, "YS"),
}
"""Horizon, season and frequency of the parts of the M4 competition."""


def read_m4(folder: str | Path, part: str = "Hourly") -> SeriesSet:
    """A part of the M4 competition: `PART-train.csv` and `PART-test.csv`, one series per row.

    The test values follow the training values of each series; the files have no time stamps.

    Raises:
        DataError: the files are not there, or do not belong together.
    """
    folder, (horizon, season, freq) = Path(folder), M4[part]
    paths = [folder / f"{part}-{half}.csv" for half in ("train", "test")]
    for path in paths:
        if not path.is_file():
            raise DataError(f"There is no {path}. M4 needs the folder with {part}-train.csv and -test.csv.")
    train, test = (pd.read_csv(path, index_col=0) for path in paths)
    if list(train.index) != list(test.index) or test.shape[1] != horizon:
        raise DataError(
            f"{paths[0]} and {paths[1]} do not belong together: {len(train)} and {len(test)} series, and "
            f"{test.shape[1]} test values where {part} has {horizon}."
        )
    items = [
        Item(str(name), np.concatenate([past[~np.isnan(past)], future])[None])
        for name, past, future in zip(
            train.index, train.to_numpy(np.float64), test.to_numpy(np.float64), strict=True
        )
    ]
    return SeriesSet(f"m4_{part.lower()}", items, season, horizon, freq=parse_frequency(freq))


def m4_part(path: str | Path) -> str | None:
    """The part of M4 that a folder holds, or a file is of; None if none."""
    path = Path(path)
    names = [p.name for p in path.iterdir()] if path.is_dir() else [path.name]
    found = [re.fullmatch(r"(\w+)-(train|test)\.csv", name) for name in names]
    parts = [match[1] for match in found if match and match[1] in M4]
    return parts[0] if parts else None


# ---- what ships with the zoo -------------------------------------------------------------------------------

EMBEDDED: dict[str, int] = {"monthly": 12, "quarterly": 8, "yearly": 6}
"""Public-domain series at `data/forecasting/NAME.csv`, and the horizon of each set."""


def embedded_sets() -> list[SeriesSet]:
    """The real series that ship with the zoo, see `data/README.md`: fifteen, in three sets."""
    return [read_set(data_dir() / "forecasting" / f"{name}.csv", horizon=h) for name, h in EMBEDDED.items()]


def freq_name(freq: BaseOffset | None) -> str | None:
    return None if freq is None else freq.freqstr
