"""The forms in which series come, made one: rows of history and of what is known of the future."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from domains.forecasting.pipeline.categories import Column, Rows, as_column, encode
from zoo.errors import DataError, did_you_mean

KEYS = ("target", "past_covariates", "future_covariates")
"""Of a series given as a dict."""


class Item(NamedTuple):
    """One forecast: targets first, then covariates of the past only, then those whose future is known."""

    context: Tensor
    """float32 `(rows, T)`, NaN where missing."""
    future: Tensor
    """float32 `(rows, H)`, NaN where unknown."""
    num_targets: int
    num_known: int
    """Rows at the end that are known covariates, even where their future values are missing."""


def prepare(inputs: Any, horizon: int) -> list[Item]:
    """Series in any of the accepted forms as items.

    Args:
        inputs: an array or tensor `(series, variates, T)`, all of them targets; a list of arrays or tensors
            `(T,)` or `(variates, T)`; a list of dicts with `target`, and maybe `past_covariates` and
            `future_covariates` by name (see `Forecaster`); or a list of items.

    Raises:
        DataError: forms, shapes or values that cannot be used; the message numbers the series from 0.
    """
    if horizon < 0:
        raise DataError(f"A horizon of {horizon} steps cannot be forecast.")
    if isinstance(inputs, Tensor | np.ndarray):
        if inputs.ndim != 3:
            raise DataError(
                f"An array of series has the axes (series, variates, steps), not {list(inputs.shape)}. "
                "Series of different lengths come as a list."
            )
        inputs = list(inputs)
    if isinstance(inputs, Mapping | str) or not isinstance(inputs, Sequence):
        raise DataError(f"Series come as an array, a list or a data frame, not as a {type(inputs).__name__}.")
    if not len(inputs):
        raise DataError("There is no series to forecast.")
    if all(isinstance(item, Item) for item in inputs):
        return list(inputs)
    if any(isinstance(item, Mapping) for item in inputs):
        return _from_dicts(inputs, horizon)
    return [_only_targets(_targets(item, f"Series {i}"), horizon) for i, item in enumerate(inputs)]


def _only_targets(target: np.ndarray, horizon: int) -> Item:
    context = torch.from_numpy(target)
    return Item(context, context.new_full((len(target), horizon), torch.nan), len(target), 0)


def build_items(
    targets: Sequence[np.ndarray],
    past: Mapping[str, Column],
    future: Mapping[str, Column],
    known: Sequence[str],
    horizon: int,
) -> list[Item]:
    """Items from the stacked covariates of all series.

    Args:
        targets: float32 `(targets, T)` of each series.
        past: covariates of the history, the rows of all series below each other.
        future: known covariates, `horizon` rows for each series; those of `known` that are not in it are
            known covariates whose values are missing.
    """
    lengths = [target.shape[1] for target in targets]
    stacked = np.concatenate(targets, axis=1)
    order = [name for name in past if name not in known] + [name for name in past if name in known]
    columns = {name: past[name] for name in order}
    encoded, ahead = encode(columns, future, stacked, Rows(lengths, horizon))
    unknown = np.full(len(targets) * horizon, np.nan, np.float32)
    rows = np.stack([*stacked, *encoded.values()])
    later = np.stack([*[unknown] * len(stacked), *(ahead.get(name, unknown) for name in order)])
    ends = np.cumsum(lengths)
    return [
        Item(
            torch.from_numpy(rows[:, end - length : end].copy()),
            torch.from_numpy(later[:, i * horizon : (i + 1) * horizon].copy()),
            len(stacked),
            len(known),
        )
        for i, (end, length) in enumerate(zip(ends, lengths, strict=True))
    ]


# ---- series as dicts ---------------------------------------------------------------------------------------


def _from_dicts(items: Sequence[Any], horizon: int) -> list[Item]:
    for i, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise DataError(f"Series {i} is a {type(item).__name__}, others are dicts: give all in one form.")
        _check_keys(item, i)
    targets = [_targets(item["target"], f"Series {i}") for i, item in enumerate(items)]
    past = [_table(item, "past_covariates", i) for i, item in enumerate(items)]
    future = [_table(item, "future_covariates", i) for i, item in enumerate(items)]
    _check_schema(targets, past, future)
    known = sorted(future[0])
    given = [name for name in known if not _unavailable(future[0][name])]
    return build_items(
        targets,
        {name: _stack(past, name, [t.shape[1] for t in targets], "past") for name in sorted(past[0])},
        {name: _stack(future, name, [horizon] * len(items), "future") for name in given},
        known,
        horizon,
    )


def _check_keys(item: Mapping[str, Any], i: int) -> None:
    unknown = [key for key in item if key not in KEYS]
    if unknown:
        hint = did_you_mean(str(unknown[0]), KEYS)
        raise DataError(f"Series {i} has a key {unknown[0]!r}.{hint} Its keys are {', '.join(KEYS)}.")
    if "target" not in item:
        raise DataError(f"Series {i} has no 'target'.")


def _table(item: Mapping[str, Any], key: str, i: int) -> Mapping[str, Any]:
    table = item.get(key)
    if table is None:
        return {}
    if not isinstance(table, Mapping):
        raise DataError(f"Series {i}: {key} is a dict of name to values, not a {type(table).__name__}.")
    return table


def _unavailable(values: Any) -> bool:
    """Known in future, but not now."""
    return values is None or (hasattr(values, "__len__") and len(values) == 0)


def _check_schema(
    targets: Sequence[np.ndarray],
    past: Sequence[Mapping[str, Any]],
    future: Sequence[Mapping[str, Any]],
) -> None:
    """One schema for all: covariates are encoded together."""
    stray = sorted(set(future[0]) - set(past[0]))
    if stray:
        raise DataError(
            f"Series 0 has a future {stray[0]!r} without its past: past_covariates has "
            f"{', '.join(sorted(past[0])) or 'nothing'}.{did_you_mean(stray[0], past[0])}"
        )
    for i in range(1, len(targets)):
        if len(targets[i]) != len(targets[0]):
            raise DataError(
                f"Series {i} has {len(targets[i])} targets, series 0 has {len(targets[0])}: forecast series "
                "with different numbers of targets in calls of their own."
            )
        for kind, tables in (("past_covariates", past), ("future_covariates", future)):
            if set(tables[i]) != set(tables[0]):
                raise DataError(
                    f"Series {i} has the {kind} {sorted(tables[i])}, series 0 has {sorted(tables[0])}: "
                    "forecast series with different covariates in calls of their own."
                )
        for name in future[0]:
            if _unavailable(future[i][name]) != _unavailable(future[0][name]):
                raise DataError(f"The future of {name!r} is given for one of series 0 and {i}, not for both.")


def _stack(tables: Sequence[Mapping[str, Any]], name: str, lengths: Sequence[int], when: str) -> Column:
    """The values of one covariate of all series, below each other."""
    parts = []
    for i, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        values = _array(table[name])
        if values.shape != (length,):
            steps = "as its target" if when == "past" else "as the horizon"
            raise DataError(
                f"Series {i}: the {when} {name!r} has shape {list(values.shape)}, not {length} steps {steps}."
            )
        if values.dtype.kind == "f" and np.isinf(values).any():
            raise DataError(f"Series {i}: the {when} {name!r} has infinite values.")
        parts.append(values)
    return as_column(np.concatenate(parts))


def _array(values: Any) -> np.ndarray:
    if not isinstance(values, Tensor):
        return np.asarray(values)
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def _targets(values: Any, name: str) -> np.ndarray:
    """float32 `(targets, T)`, checked."""
    try:
        array = _array(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name} is no array of numbers: {error}.") from None
    if array.dtype.kind not in "fiu":
        raise DataError(f"{name} must hold numbers; it has {array.dtype} values.")
    if array.ndim not in (1, 2):
        raise DataError(f"{name} has shape {list(array.shape)}, not (steps,) or (variates, steps).")
    array = np.atleast_2d(array)
    if not array.size:
        raise DataError(f"{name} is empty.")
    if np.isinf(array).any():
        raise DataError(f"{name} has infinite values. Give NaN where a value is unknown.")
    with np.errstate(over="ignore"):
        result = array.astype(np.float32)
    if np.isinf(result).any():
        raise DataError(f"{name} has values beyond {np.finfo(np.float32).max:.1e}: rescale it.")
    if np.isnan(result).all(1).any():
        warnings.warn(f"{name} has no value at all: its forecast is that of a series at 0.", stacklevel=4)
    return result
