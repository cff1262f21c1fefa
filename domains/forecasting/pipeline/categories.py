"""Covariates as numbers: categories by the mean of the target, or by their place in the alphabet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from zoo.errors import DataError

Column = Any
"""A pandas series; its own hints are too wide to check against."""


class Rows(NamedTuple):
    """How the rows of stacked series, history and future, belong to their series."""

    lengths: Sequence[int]
    """Steps of history of each series."""
    horizon: int

    @property
    def past(self) -> np.ndarray:
        """Number of the series of each row of history."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def future(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.horizon)


def as_column(values: Any) -> Column:
    """Numbers as float32, all else (text, booleans, objects) as categories."""
    column: Any = values if isinstance(values, pd.Series) else pd.Series(values)
    numeric = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    if numeric:
        return pd.Series(column.to_numpy(dtype=np.float32, na_value=np.nan))
    return column.astype("category")


def encode(
    past: Mapping[str, Column], future: Mapping[str, Column], targets: np.ndarray, rows: Rows
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every covariate as float32, in the order of `past`.

    Args:
        past: stacked rows of history of all series, as `as_column` makes them.
        future: stacked future rows of those that are known.
        targets: `(targets, rows)`; one target gives the categories its means, several cannot.
    """
    encoded: dict[str, np.ndarray] = {}
    ahead: dict[str, np.ndarray] = {}
    for name, column in past.items():
        later = future.get(name)
        if not isinstance(column.dtype, pd.CategoricalDtype):
            encoded[name] = _numbers(column)
            if later is not None:
                ahead[name] = _future_numbers(name, later)
            continue
        codes, later_codes = _codes(column, later)
        if len(targets) == 1:
            encoded[name], values = target_means(codes, later_codes, targets[0], rows)
        else:
            encoded[name], values = codes.astype(np.float32), _ordinal(column, later_codes)
        if values is not None:
            ahead[name] = values
    return encoded, ahead


def _numbers(column: Column) -> np.ndarray:
    return column.to_numpy(dtype=np.float32, na_value=np.nan)


def _future_numbers(name: str, column: Column) -> np.ndarray:
    try:
        return _numbers(column)
    except (TypeError, ValueError):
        raise DataError(f"The past of {name!r} holds numbers, its future {column.dtype} values.") from None


def _codes(past: Column, future: Column | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Places among the K sorted categories of the past; K where missing, K + 1 where new in the future."""
    categories = past.dtype.categories
    missing = len(categories)
    codes = past.cat.codes.to_numpy(dtype=np.int64)
    codes = np.where(codes < 0, missing, codes)
    if future is None:
        return codes, None
    later = categories.get_indexer(future)
    absent = np.where(future.isna().to_numpy(), missing, missing + 1)
    return codes, np.where(later < 0, absent, later)


def _ordinal(past: Column, future: np.ndarray | None) -> np.ndarray | None:
    """The codes of the future as values; NaN where the category is new."""
    if future is None:
        return None
    new = len(past.dtype.categories) + 1
    return np.where(future == new, np.nan, future).astype(np.float32)


def target_means(
    past: np.ndarray, future: np.ndarray | None, target: np.ndarray, rows: Rows
) -> tuple[np.ndarray, np.ndarray | None]:
    """`(m + sum_c) / (1 + n_c)` for each row of category c: m is the mean of the series' own target, sum and
    number are over its finite targets in that category. A category that it never had gets m.
    """
    width = int(max(past.max(initial=0), 0 if future is None else future.max(initial=0))) + 1
    count = len(rows.lengths)
    known = np.isfinite(target)
    values = np.where(known, target, 0.0).astype(np.float64)
    series = rows.past
    totals, numbers = (np.bincount(series, weights=w, minlength=count) for w in (values, known.astype(float)))
    means = np.divide(totals, numbers, out=np.zeros(count), where=numbers > 0)
    cell = series * width + past
    sums, counts = (
        np.bincount(cell, weights=w, minlength=count * width) for w in (values, known.astype(float))
    )
    table = (np.repeat(means, width) + sums) / (1 + counts)
    later = None if future is None else table[rows.future * width + future].astype(np.float32)
    return table[cell].astype(np.float32), later
