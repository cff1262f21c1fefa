"""Tables of computers and scores: reading them, and which columns belong to which group."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from zoo.errors import ConfigError, DataError, did_you_mean

SUFFIXES = (".csv", ".parquet")
Groups = dict[str, list[str]]


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they are for; patterns are resolved.

    Attributes:
        numeric: columns of each group of numbers.
        text: columns of each group of texts.
        target: the scores.
        workload: together they name what was run.
    """

    numeric: Groups
    text: Groups
    target: list[str]
    workload: list[str]

    @property
    def numbers(self) -> list[str]:
        """All columns of numbers, in the order in which the model sees them."""
        return [column for group in self.numeric.values() for column in group]

    @property
    def texts(self) -> list[str]:
        """All columns of texts, in the order in which the model sees them."""
        return [column for group in self.text.values() for column in group]

    def state(self) -> dict[str, Any]:
        """Json-able."""
        return asdict(self)

    @classmethod
    def resolve(
        cls,
        table: pd.DataFrame,
        *,
        numeric: Mapping[str, Sequence[str]],
        text: Mapping[str, Sequence[str]],
        target: str | Sequence[str],
        workload: Sequence[str] | None,
        source: str,
    ) -> Columns:
        """Find the columns that names and glob patterns stand for; empty groups are left out.

        A column belongs to the first group that asks for it by name; a pattern takes only what no other group
        has taken, and no target. Where `workload` is None, the columns of group `workload_text` stand for it.

        Raises:
            DataError: a name or pattern without a column.
            ConfigError: a column in two groups, no target, or no group with a column.
        """
        targets = [target] if isinstance(target, str) else list(target)
        if not targets:
            raise ConfigError("Which column holds the score? data.target=COLUMN.")
        _all_there(table, targets, source)
        given = {f"numeric.{name}": _listed(patterns) for name, patterns in numeric.items()}
        given |= {f"text.{name}": _listed(patterns) for name, patterns in text.items()}
        found = _resolved(table, given, targets, source)
        if not any(found.values()):
            raise ConfigError(
                f"No group has a column: say which columns of {source} describe the hardware, for example "
                f"data.numeric.memory=[NAME,...]. It has: {_shown(table)}."
            )
        numbers = {n: found[f"numeric.{n}"] for n in numeric if found[f"numeric.{n}"]}
        texts = {n: found[f"text.{n}"] for n in text if found[f"text.{n}"]}
        if workload is None:
            named = texts.get("workload_text", [])
        else:
            named = _listed(workload)
            _all_there(table, named, source)
        return cls(numbers, texts, targets, named)


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _resolved(
    table: pd.DataFrame, given: Mapping[str, Sequence[str]], targets: Sequence[str], source: str
) -> Groups:
    """The columns of each group, exact names before patterns."""
    owner: dict[str, str] = {}
    for group, patterns in given.items():
        for name in patterns:
            if name not in table:
                continue
            if name in targets:
                raise ConfigError(f"Column {name!r} is the target; it cannot be in data.{group}, too.")
            if owner.setdefault(name, group) != group:
                raise ConfigError(f"Column {name!r} is in data.{owner[name]} and in data.{group}.")
    found: Groups = {group: [] for group in given}
    for group, patterns in given.items():
        for pattern in patterns:
            if pattern in table:
                columns = [pattern]
            else:
                free = [c for c in table if owner.get(c, group) == group and c not in targets]
                columns = [c for c in free if fnmatch.fnmatchcase(c, pattern)]
                if not columns:
                    _missing(table, pattern, source, f" (data.{group})")
            owner |= dict.fromkeys(columns, group)
            found[group] += [column for column in columns if column not in found[group]]
    return found


def _all_there(table: pd.DataFrame, names: Sequence[str], source: str) -> None:
    for name in names:
        if name not in table:
            _missing(table, name, source)


def _missing(table: pd.DataFrame, name: str, source: str, where: str = "") -> None:
    hint = did_you_mean(name, table.columns)
    raise DataError(f"{source} has no column {name!r}{where}.{hint} It has: {_shown(table)}.")


def _shown(table: pd.DataFrame, most: int = 40) -> str:
    names = [str(name) for name in table.columns]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---- reading -----------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV or Parquet file, or all of a folder below each other; every value as it is written, as text.

    Raises:
        DataError: nothing there, another format, a file that cannot be read, or without rows.
    """
    path = Path(path)
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no {' or '.join(SUFFIXES)} file.")
    tables = [_read(file) for file in files]
    for file, table in zip(files, tables, strict=True):
        if set(table.columns) != set(tables[0].columns):
            other = sorted(set(table.columns) ^ set(tables[0].columns))
            raise DataError(f"{file} has other columns than {files[0]}: {', '.join(other[:5])}.")
    table = pd.concat(tables, ignore_index=True)
    if not len(table):
        raise DataError(f"{path} has no rows.")
    return table


def _read(path: Path) -> pd.DataFrame:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: a table is a {' or '.join(SUFFIXES)} file.")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=str)
        table = pd.read_parquet(path)
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    return as_written(table)


def as_written(table: pd.DataFrame) -> pd.DataFrame:
    """Every value as text, missing ones as NaN."""
    return table.astype(str).where(table.notna(), np.nan)


def numbers_of(table: pd.DataFrame, columns: Sequence[str], source: str) -> np.ndarray:
    """float64 `(R, columns)`, NaN where a cell is empty.

    Raises:
        DataError: a cell that is no number, or infinite; the message names column and row.
    """
    values = np.empty((len(table), len(columns)))
    for i, column in enumerate(columns):
        cells: Any = table[column]
        parsed = np.asarray(pd.to_numeric(cells, errors="coerce"), dtype=np.float64)
        wrong = np.flatnonzero((np.isnan(parsed) & cells.notna().to_numpy()) | np.isinf(parsed))
        if len(wrong):
            raise DataError(
                f"{source}: column {column!r} holds {cells.iloc[wrong[0]]!r} in row {wrong[0] + 1}, "
                "which is no finite number. A column of words belongs to a group of data.text."
            )
        values[:, i] = parsed
    return values


def keys(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """One text `(R,)` for the values of these columns."""
    return np.asarray(["\0".join(map(str, row)) for row in table[list(columns)].to_numpy()])
