"""Layouts of files of series, told apart by their content, as long tables: a row per series and time.

Long tables with the column names of AutoGluon, Nixtla and others, wide tables (ETT), one series per row (M4),
a bare matrix of numbers, nested rows (Hugging Face data sets, fev), JSON lines of gluonts, `.tsf` of Monash.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from domains.forecasting.series import listed, parse_frequency
from zoo.errors import DataError

log = logging.getLogger(__name__)

ID_COLUMNS = ("item_id", "unique_id", "series_id", "id", "series")
TIME_COLUMNS = ("timestamp", "ds", "datetime", "date", "time", "ts", "day", "month")
TARGET_COLUMNS = ("target", "y", "value", "sales", "demand")
"""Names that AutoGluon, Nixtla and others give, the first found is taken; upper or lower case."""

START = "2000-01-01"
"""Where the time of series without time stamps begins."""

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")

M4 = {"Hourly": "h", "Daily": "D", "Weekly": "W", "Monthly": "MS", "Quarterly": "QS", "Yearly": "YS"}
"""Frequency of the parts of the M4 competition."""

TSF_FREQUENCIES = {
    "yearly": "YS",
    "quarterly": "QS",
    "monthly": "MS",
    "weekly": "W",
    "daily": "D",
    "hourly": "h",
    "half_hourly": "30min",
    "10_minutes": "10min",
    "minutely": "min",
    "4_seconds": "4s",
}

FREQUENCIES = {"H": "h", "T": "min", "S": "s", "M": "MS", "Q": "QS", "A": "YS", "Y": "YS", "W": "7D"}
"""Frequencies as gluonts and older pandas write them; weeks begin on any day."""


class Layout(NamedTuple):
    """A long table, and what its file tells of it."""

    table: pd.DataFrame
    freq: str | None = None
    """Where the file has a frequency, or its time stamps were made with one."""


def usual(table: Any, names: Sequence[str]) -> str | None:
    """The column that has one of these names, the first of them that there is."""
    by_name = {str(column).lower(): str(column) for column in table.columns}
    return next((by_name[name] for name in names if name in by_name), None)


def stamps(start: Any, count: int, freq: str) -> pd.DatetimeIndex:
    """`count` time stamps from `start`; of months, quarters and years from the beginning of its own."""
    offset: Any = parse_frequency(freq)
    first = pd.Timestamp(start)
    calendar = offset.rule_code[0] in "MQYB" and offset.rule_code != "min"
    return pd.date_range(offset.rollback(first) if calendar else first, periods=count, freq=offset)


# ---- tables ------------------------------------------------------------------------------------------------


def long_table(
    table: pd.DataFrame, path: Path, *, freq: str | None, timestamp_column: str | None, choose: bool
) -> Layout:
    """A table in any layout as a long one.

    Args:
        freq: for series without time stamps, whose time begins at `START`.
        timestamp_column: where it is known.
        choose: whether columns are still to be chosen: a wide table is then one series per column.

    Raises:
        DataError: a layout that is none of these, or series without time stamps and a frequency.
    """
    nested = [name for name in table.columns if _is_nested(table[name])]
    if nested:
        return Layout(_exploded(table, nested, path))
    if _is_matrix(table):
        values: Any = table.to_numpy(np.float64).T
        return _without_time(values, [f"series_{i}" for i in range(len(values))], path, freq)
    time = timestamp_column or usual(table, TIME_COLUMNS) or _first_of_dates(table)
    if time is None:
        return _one_per_row(table, path, freq)
    table = _without_row_numbers(_counted(table, time, freq), time)
    numbers = [name for name in table.columns if name != time and _is_number(table[name])]
    lone = usual(table, ID_COLUMNS) is None and usual(table[numbers], TARGET_COLUMNS) is None
    if not (choose and lone and len(numbers) > 1 and len(numbers) == table.shape[1] - 1):
        return Layout(table.rename(columns={time: "timestamp"}) if time.startswith("Unnamed") else table)
    log.warning(
        "%s: every column is read as a series of its own: %s. To forecast some together: target=[A,B].",
        path,
        listed(numbers),
    )
    melted = table.melt(id_vars=time, value_vars=numbers, var_name="item_id", value_name="target")
    return Layout(melted.rename(columns={time: "timestamp"}))


def _without_row_numbers(table: Any, time: str) -> pd.DataFrame:
    """Without the index of a frame that was written beside its columns."""
    first = table.columns[0]
    if not str(first).startswith("Unnamed") or first == time or not _is_number(table[first]):
        return table
    return table.drop(columns=first)


def _is_number(column: Any) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _is_nested(column: Any) -> bool:
    known = column.dropna()
    return len(known) > 0 and isinstance(known.iloc[0], list | tuple | np.ndarray)


def _is_matrix(table: pd.DataFrame) -> bool:
    """Whether there is no header: `read_text` names columns by numbers then."""
    return all(isinstance(name, int) for name in table.columns)


def _first_of_dates(table: Any) -> str | None:
    """The first column, where it holds text that reads as dates and has no name of its own."""
    name = table.columns[0]
    known = table[name].dropna()
    if not str(name).startswith("Unnamed") or _is_number(known) or not len(known):
        return None
    read = pd.to_datetime(known.iloc[:3], errors="coerce", format="mixed")
    return None if read.isna().any() else str(name)


def _exploded(table: pd.DataFrame, nested: Sequence[str], path: Path) -> pd.DataFrame:
    lengths = pd.DataFrame({name: table[name].map(np.size) for name in nested})
    uneven = np.flatnonzero(lengths.nunique(axis=1).to_numpy() > 1)
    if len(uneven):
        raise DataError(
            f"{path}: row {uneven[0]} has lists of different lengths: "
            + ", ".join(f"{name} {lengths[name].iloc[uneven[0]]}" for name in nested)
            + "."
        )
    flat = table.explode(list(nested), ignore_index=True)
    return flat.infer_objects()


def _counted(table: Any, time: str, freq: str | None) -> pd.DataFrame:
    """Times that are counted 0, 1, 2, ... as time stamps, where their frequency is given."""
    if freq is None or not pd.api.types.is_integer_dtype(table[time]):
        return table
    first = int(table[time].min())
    grid = stamps(START, int(table[time].max()) - first + 1, FREQUENCIES.get(freq, freq))
    return table.assign(**{time: grid[(table[time] - first).to_numpy()]})


def _one_per_row(table: Any, path: Path, freq: str | None) -> Layout:
    """The rows of M4: a name, then the values, empty after the last."""
    name = table.columns[0]
    values = table[table.columns[1:]]
    if values.shape[1] < 2 or not all(map(_is_number, (values[column] for column in values.columns))):
        raise DataError(
            f"{path} has no column of time stamps; it has {listed(list(table.columns), 8)}. Name it: "
            "timestamp_column=NAME."
        )
    part = path.name.split("-")[0]
    return _without_time(values.to_numpy(np.float64), table[name].astype(str), path, freq or M4.get(part))


def _without_time(values: np.ndarray, names: Sequence[str], path: Path, freq: str | None) -> Layout:
    """Series `[I, T]`, NaN after the last value, as a long table."""
    if freq is None:
        raise DataError(
            f"{path} holds {len(values)} series without time stamps: give their frequency, such as freq=h. "
            f"Time is then counted from {START}."
        )
    freq, parts = FREQUENCIES.get(freq, freq), []
    for name, row in zip(names, values, strict=True):
        known = np.flatnonzero(~np.isnan(row))
        count = int(known[-1]) + 1 if len(known) else len(row)
        grid = stamps(START, count, freq)
        parts.append(pd.DataFrame({"item_id": str(name), "timestamp": grid, "target": row[:count]}))
    return Layout(pd.concat(parts, ignore_index=True), freq)


def read_text(path: Path) -> pd.DataFrame:
    """A CSV file, with commas or what else separates its columns; a bare matrix with columns 0, 1, 2, ..."""
    table = pd.read_csv(path)
    if table.shape[1] == 1 and not _reads_as_number(str(table.columns[0])):
        table = pd.read_csv(path, sep=None, engine="python")
    if all(_reads_as_number(str(name)) for name in table.columns):
        return pd.read_csv(path, header=None)
    return table


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# ---- JSON lines of gluonts ---------------------------------------------------------------------------------


def read_json_lines(path: Path, freq: str | None) -> Layout:
    """`{"start": ..., "target": [...], "item_id": ..., "feat_dynamic_real": [[...]]}` per line.

    Covariates are called `feat_dynamic_real_0`, ... or by their own keys; where they are longer than the
    target, the future of it is missing. The frequency stands in `metadata.json` beside or above the file.

    Raises:
        DataError: a line that is none of these; the message numbers it.
    """
    freq = freq or _metadata_freq(path)
    freq = FREQUENCIES.get(freq, freq) if freq else None
    opened = gzip.open if path.suffix == ".gz" else open
    parts = []
    with opened(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                parts.append(_json_series(line, f"{path}, line {number}", len(parts), freq))
    if not parts:
        raise DataError(f"{path} holds no series.")
    return Layout(pd.concat(parts, ignore_index=True), freq)


def _json_series(line: str, where: str, place: int, freq: str | None) -> pd.DataFrame:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}.") from None
    if not isinstance(record, Mapping) or not isinstance(record.get("target"), list):
        raise DataError(f"{where} has no 'target' with a list of values.")
    if freq is None:
        raise DataError(f"{where}: the frequency is not known; give it, such as freq=h.")
    values = _columns("target", record["target"]) | {
        key: column
        for name, given in record.items()
        if name != "target" and isinstance(given, list) and name.startswith("feat_dynamic")
        for key, column in _columns(name, given).items()
    }
    steps = max(map(len, values.values()))
    name = record.get("item_id", place)
    try:
        grid = stamps(record.get("start", START), steps, freq)
        columns = {
            key: np.concatenate([column, np.full(steps - len(column), np.nan)])
            for key, column in values.items()
        }
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}") from None
    return pd.DataFrame({"item_id": str(name), "timestamp": grid, **columns})


def _columns(name: str, values: Sequence[Any]) -> dict[str, np.ndarray]:
    """A list of numbers as a column, a list of such lists as several."""
    if not values or not isinstance(values[0], list):
        return {name: np.array([_number(value) for value in values])}
    return {f"{name}_{i}": np.array([_number(v) for v in row]) for i, row in enumerate(values)}


def _number(value: Any) -> float:
    return np.nan if value is None or value == "NaN" else float(value)


def _metadata_freq(path: Path) -> str | None:
    for folder in (path.parent, path.parent.parent):
        if (folder / "metadata.json").is_file():
            return json.loads((folder / "metadata.json").read_text()).get("freq")
    return None


# ---- Monash ------------------------------------------------------------------------------------------------


def read_tsf(path: Path, freq: str | None) -> Layout:
    """A `.tsf` file of the Monash archive: `@frequency`, `@attribute`, and `name:start:value,value,?` below.

    Raises:
        DataError: what is not of this format; the message numbers the line.
    """
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    freq = FREQUENCIES.get(freq, freq) if freq else None
    attributes, parts, in_data = [], [], False
    for number, line in _content(lines):
        where = f"{path}, line {number}"
        if in_data:
            parts.append(_tsf_series(line, attributes, where, len(parts), freq))
        elif line.lower() == "@data":
            in_data = True
        elif line.startswith("@attribute"):
            attributes.append(tuple(line.split()[1:3]))
        elif line.startswith("@frequency"):
            freq = freq or _tsf_frequency(line, where)
        elif not line.startswith("@"):
            raise DataError(f"{where}: {line[:40]!r} stands before @data.")
    if not parts:
        raise DataError(f"{path} has no series after @data.")
    return Layout(pd.concat(parts, ignore_index=True), freq)


def _content(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    return (
        (number, line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    )


def _tsf_frequency(line: str, where: str) -> str:
    name = line.split()[-1]
    if name not in TSF_FREQUENCIES:
        raise DataError(f"{where}: {name!r} is no frequency: {', '.join(TSF_FREQUENCIES)}. Give freq=...")
    return FREQUENCIES.get(TSF_FREQUENCIES[name], TSF_FREQUENCIES[name])


def _tsf_series(
    line: str, attributes: Sequence[tuple[str, ...]], where: str, place: int, freq: str | None
) -> pd.DataFrame:
    *given, values = line.split(":")
    if len(given) != len(attributes):
        raise DataError(f"{where} has {len(given)} attributes, the header {len(attributes)}.")
    named = {name: value for (name, *_), value in zip(attributes, given, strict=True)}
    kinds = {name: kind for name, *rest in attributes for kind in rest}
    dates = [name for name, kind in kinds.items() if kind == "date"]
    start = named[dates[0]] if dates else START
    if freq is None:
        raise DataError(f"{where}: the header has no @frequency; give it, such as freq=h.")
    try:
        row = np.array([np.nan if v.strip() in ("?", "") else float(v) for v in values.split(",")])
        grid = stamps(_tsf_time(start), len(row), freq)
    except ValueError as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}") from None
    name = next((named[n] for n, kind in kinds.items() if kind == "string"), f"series_{place}")
    return pd.DataFrame({"item_id": name, "timestamp": grid, "target": row})


def _tsf_time(text: str) -> str:
    """`2004-01-31 23-30-00` with colons."""
    day, _, time = text.partition(" ")
    return f"{day} {time.replace('-', ':')}" if time else day
