"""Price panels: what many stocks traded at on many days.

Shapes: D days, N stocks. A stock that did not trade on a day is NaN there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from domains.forecasting.series import listed
from domains.forecasting.sources import read_table
from zoo.errors import DataError, did_you_mean
from zoo.files import atomic_path

log = logging.getLogger(__name__)

DATE_NAMES = ("date", "datetime", "timestamp", "day", "time")
SYMBOL_NAMES = ("symbol", "instrument", "ticker", "code", "asset", "stock", "item_id")
PRICES = ("open", "high", "low", "close")
FIELDS = (*PRICES, "volume")
"""Columns of a long table that have a meaning here; every other numeric one is a feature as it is."""


@dataclass(frozen=True)
class Panel:
    """Prices of N stocks over D days.

    Attributes:
        dates: `(D,)` datetime64, rising.
        symbols: N names.
        fields: `close`, and of `open`, `high`, `low`, `volume` those that are known, each `(D, N)`; adjusted
            for splits and dividends, if returns are to be true.
        extra: further features by name, each `(D, N)`.
        expected: `(D, N)` the part of the return from the next day to the one after that could be known on a
            day; only of simulated panels.
        source: for messages.
    """

    dates: np.ndarray
    symbols: list[str]
    fields: dict[str, np.ndarray]
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    expected: np.ndarray | None = None
    source: str = "The panel"

    @property
    def close(self) -> np.ndarray:
        return self.fields["close"]


def read_panel(
    path: str | Path, *, date_column: str | None = None, symbol_column: str | None = None
) -> Panel:
    """A CSV or Parquet table of prices, in any order of rows.

    A long table has a row per day and stock, with columns date, symbol and close, and as far as known open,
    high, low and volume; every other numeric column is a feature. A table without a column of symbols is
    wide: dates, and a column of closes for each stock.

    Args:
        path: of the table.
        date_column: by default the first of `DATE_NAMES`.
        symbol_column: by default the first of `SYMBOL_NAMES`.

    Raises:
        DataError: a column that is missing, not numeric, infinite or no price; a day and stock that occur
            twice; fewer than two stocks. The message names column, stock and day.
    """
    path = Path(path)
    table = read_table(path)
    date = _column(table, date_column, DATE_NAMES, "date_column", path)
    if date is None:
        raise DataError(
            f"{path} has no column of dates, only {listed(list(table.columns), 8)}. Say date_column=NAME."
        )
    table[date] = _dates(table[date], path)
    symbol = _column(table, symbol_column, SYMBOL_NAMES, "symbol_column", path)
    if symbol is None and "close" in (str(name).lower() for name in table.columns):
        raise DataError(
            f"{path} has closes, but no column that names the stocks. Say symbol_column=NAME, or for a wide "
            "table call the columns by the stocks."
        )
    long = _from_wide(table, date, path) if symbol is None else _from_long(table, date, symbol, path)
    return _pivot(long, str(path))


def write_panel(panel: Panel, path: str | Path) -> None:
    """A long CSV or Parquet table, a row for every day and stock with a close."""
    days, stocks = np.nonzero(~np.isnan(panel.close))
    columns = {"date": panel.dates[days], "symbol": np.asarray(panel.symbols)[stocks]}
    columns |= {name: values[days, stocks] for name, values in (panel.fields | panel.extra).items()}
    table = pd.DataFrame(columns)
    with atomic_path(path) as part:
        if Path(path).suffix == ".parquet":
            table.to_parquet(part, index=False)
        else:
            table.to_csv(part, index=False, float_format="%.6g")


# ---- checks ------------------------------------------------------------------------------------------------


def _column(
    table: pd.DataFrame, given: str | None, usual: Sequence[str], option: str, path: Path
) -> str | None:
    if given is not None:
        if given not in table:
            hint = did_you_mean(given, [str(name) for name in table.columns])
            raise DataError(f"{path} has no column {given!r} ({option}).{hint}")
        return given
    by_name = {str(name).lower(): str(name) for name in table.columns}
    return next((by_name[name] for name in usual if name in by_name), None)


def _dates(values: Any, path: Path) -> Any:
    try:
        stamps = pd.to_datetime(values if values.dtype.kind != "i" else values.astype(str))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: column {values.name!r} is no column of dates: {error}") from None
    if stamps.isna().any():
        raise DataError(f"{path}: row {int(stamps.isna().to_numpy().argmax()) + 1} has no date.")
    return stamps.dt.tz_localize(None) if getattr(stamps.dt, "tz", None) is not None else stamps


def _from_wide(table: Any, date: str, path: Path) -> pd.DataFrame:
    if table[date].duplicated().any():
        day = table[date][table[date].duplicated()].iloc[0]
        raise DataError(f"{path}: the date {day:%Y-%m-%d} occurs twice. Keep one row per day.")
    long = table.melt(id_vars=date, var_name="symbol", value_name="close")
    return _numeric(long.rename(columns={date: "date"}), ["close"], path)


def _from_long(table: Any, date: str, symbol: str, path: Path) -> pd.DataFrame:
    names = {str(name): str(name).lower() for name in table.columns if str(name).lower() in FIELDS}
    table = table.rename(columns={**names, date: "date", symbol: "symbol"})
    if "close" not in table:
        raise DataError(
            f"{path} has no column 'close', only {listed(list(table.columns), 8)}. "
            "Rename the column of (adjusted) closing prices."
        )
    if table["symbol"].isna().any():
        row = int(table["symbol"].isna().to_numpy().argmax()) + 1
        raise DataError(f"{path}: row {row} names no stock in column {symbol!r}.")
    table["symbol"] = table["symbol"].astype(str)
    twice = table.duplicated(["date", "symbol"])
    if twice.any():
        first = table[twice].iloc[0]
        raise DataError(
            f"{path}: stock {first['symbol']!r} has two rows for {first['date']:%Y-%m-%d} "
            f"({int(twice.sum())} such rows). Keep one per day and stock."
        )
    others = [name for name in table.columns if name not in ("date", "symbol")]
    text = [name for name in others if table[name].dtype.kind not in "iufb" and name not in FIELDS]
    if text:
        log.warning("%s: left out %s: not numeric, so no feature", path, listed(text))
    return _numeric(table, [name for name in others if name not in text], path)


def _numeric(table: Any, columns: Sequence[str], path: Path) -> pd.DataFrame:
    """The table with these columns as numbers, each checked."""
    where = {"date": table["date"], "symbol": table["symbol"].astype(str)}
    checked: dict[str, Any] = {}
    for name in columns:
        values: Any = pd.to_numeric(table[name], errors="coerce")
        values = values.astype(float)
        _refuse(values.isna() & table[name].notna(), table, name, path, "is no number")
        _refuse(np.isinf(values), table, name, path, "is infinite")
        if name in PRICES:
            _refuse(values <= 0, table, name, path, "is no price: prices are above 0")
        if name == "volume":
            _refuse(values < 0, table, name, path, "is below 0")
        checked[name] = values
    return pd.DataFrame(where | checked)


def _refuse(flags: Any, table: Any, column: str, path: Path, what: str) -> None:
    if flags.any():
        row = table[flags.to_numpy()].iloc[0]
        raise DataError(
            f"{path}: {column} of stock {str(row['symbol'])!r} on {row['date']:%Y-%m-%d} {what} "
            f"({row[column]}; {int(flags.sum())} such values). Leave missing values empty."
        )


def _pivot(long: Any, source: str) -> Panel:
    long = long[long["close"].notna()]
    if long["symbol"].nunique() < 2:
        found = listed(list(long["symbol"].unique())) or "none"
        raise DataError(f"{source} has prices of {found} only: a ranking needs at least two stocks.")
    dates, symbols = np.sort(long["date"].unique()), sorted(long["symbol"].unique())
    day = np.searchsorted(dates, long["date"].to_numpy())
    stock = np.searchsorted(np.asarray(symbols, dtype=object), long["symbol"].to_numpy(dtype=object))
    arrays: Mapping[str, np.ndarray] = {
        str(name): np.full((len(dates), len(symbols)), np.nan)
        for name in long.columns
        if name not in ("date", "symbol")
    }
    for name, values in arrays.items():
        values[day, stock] = long[name].to_numpy()
    fields = {name: arrays[name] for name in FIELDS if name in arrays}
    extra = {name: arrays[name] for name in sorted(arrays) if name not in FIELDS}
    return Panel(dates.astype("datetime64[s]"), symbols, fields, extra, source=source)
