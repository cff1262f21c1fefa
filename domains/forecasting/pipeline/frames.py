"""Long data frames in and out of the forecaster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from domains.forecasting.pipeline.categories import as_column
from domains.forecasting.pipeline.inputs import Item, build_items
from domains.forecasting.series import (
    checked_frame,
    future_timestamps,
    infer_frequency,
    listed,
    series_bounds,
)
from zoo.errors import DataError, did_you_mean

FUTURE = "The frame of the future"


@dataclass(frozen=True)
class FrameInputs:
    """The series of a long frame, and the rows to forecast."""

    items: list[Item]
    ahead: pd.DataFrame
    """Names and time stamps of the steps to forecast, series below each other."""
    target: list[str]
    horizon: int

    @classmethod
    def read(
        cls,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None,
        *,
        horizon: int,
        target: list[str],
        id_column: str,
        timestamp_column: str,
        freq: str | None,
    ) -> FrameInputs:
        """Checked frames as items; see `Forecaster.predict_frame`.

        Raises:
            DataError: columns, series, rows or time stamps that cannot be used.
        """
        if horizon < 1:
            raise DataError(f"A horizon of {horizon} steps cannot be forecast.")
        if not target:
            raise DataError("There is no target: name a column, or several.")
        columns = {"id_column": id_column, "timestamp_column": timestamp_column}
        covariates = [name for name in df.columns if name not in (id_column, timestamp_column, *target)]
        frame: Any = checked_frame(df, target=target, covariates=covariates, **columns)
        offset = infer_frequency(frame, id_column, timestamp_column, freq)
        bounds = series_bounds(frame[id_column])
        names, last = frame[id_column].iloc[bounds[:-1]], frame[timestamp_column].iloc[bounds[1:] - 1]
        stamps = [future_timestamps(stamp, offset, horizon) for stamp in last]
        ahead = pd.DataFrame(
            {
                id_column: names.repeat(horizon).reset_index(drop=True),
                timestamp_column: stamps[0].append(stamps[1:]),
            }
        )
        future = {}
        if future_df is not None:
            _check_columns(future_df, covariates, target, **columns)
            known = [name for name in covariates if name in future_df.columns]
            later = _aligned(future_df, ahead, known, horizon, **columns)
            future = {name: later[name] for name in known}
        values = frame[target].to_numpy(dtype=np.float32).T
        items = build_items(
            [values[:, a:b] for a, b in pairwise(bounds)],
            {name: as_column(frame[name]) for name in covariates},
            future,
            list(future),
            horizon,
        )
        return cls(items, ahead, target, horizon)


def _check_columns(
    future_df: pd.DataFrame,
    covariates: Sequence[str],
    target: Sequence[str],
    id_column: str,
    timestamp_column: str,
) -> None:
    for name in future_df.columns:
        if name in target:
            raise DataError(f"{FUTURE} has the target {name!r}: leave it out, it is to be forecast.")
        if name not in (id_column, timestamp_column, *covariates):
            raise DataError(
                f"{FUTURE} has a column {name!r} that the data frame has not."
                f"{did_you_mean(str(name), list(covariates))} A covariate needs its past, too."
            )


def _aligned(
    future_df: pd.DataFrame,
    ahead: pd.DataFrame,
    known: Sequence[str],
    horizon: int,
    id_column: str,
    timestamp_column: str,
) -> pd.DataFrame:
    """The frame of the future with exactly the rows of `ahead`, in its order."""
    columns = {"id_column": id_column, "timestamp_column": timestamp_column}
    later: Any = checked_frame(future_df, target=[], covariates=known, source=FUTURE, **columns)
    names = pd.Index(ahead[id_column].iloc[::horizon])
    place = names.get_indexer(later[id_column])
    if (place < 0).any():
        strange = later[id_column][place < 0].unique().tolist()
        raise DataError(f"{FUTURE} has series {listed(strange)}, which the data frame has not.")
    counts = np.bincount(place, minlength=len(names))
    if (wrong := np.flatnonzero(counts != horizon)).size:
        i = wrong[0]
        raise DataError(
            f"{FUTURE} has {counts[i]} rows of series {str(names[i])!r}, not the {horizon} of the horizon"
            + (f"; so for {listed(names[wrong[1:]].tolist())}." if len(wrong) > 1 else ".")
        )
    later = later.iloc[np.argsort(place, kind="stable")].reset_index(drop=True)
    stamps = pd.DatetimeIndex(later[timestamp_column]), pd.DatetimeIndex(ahead[timestamp_column])
    if (stamps[0].tz is None) != (stamps[1].tz is None):
        raise DataError(f"{FUTURE}: time stamps have a time zone in one frame and none in the other.")
    if (off := np.flatnonzero(stamps[0] != stamps[1])).size:
        i = off[0]
        raise DataError(
            f"{FUTURE}: series {str(ahead[id_column].iloc[i])!r} continues with {stamps[0][i]}, expected is "
            f"{stamps[1][i]}. If the frequency was inferred wrongly, give freq=..."
        )
    return later


def forecast_frame(
    frame: FrameInputs, quantiles: Sequence[Tensor], medians: Sequence[Tensor], levels: Sequence[float]
) -> pd.DataFrame:
    """Forecasts `(targets, H, levels)` and medians `(targets, H)` of all series as one long frame."""
    count, horizon = len(frame.target), frame.horizon
    steps = np.arange(len(frame.ahead)).reshape(-1, 1, horizon)
    result = frame.ahead.iloc[np.repeat(steps, count, axis=1).ravel()].reset_index(drop=True)
    result["target_name"] = np.tile(np.repeat(np.array(frame.target, dtype=object), horizon), len(quantiles))
    result["predictions"] = torch.stack(list(medians)).flatten().numpy()
    values = torch.stack(list(quantiles)).flatten(0, 2).numpy()
    for i, level in enumerate(levels):
        result[str(level)] = values[:, i]
    return result
