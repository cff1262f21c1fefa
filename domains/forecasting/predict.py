"""From a table of series and trained weights to a table of forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from domains.forecasting.baselines import SeasonalNaive
from domains.forecasting.metrics import BASELINE, judge, scores
from domains.forecasting.pipeline.forecaster import Forecaster
from domains.forecasting.plots import PANELS, Fan, fan_chart
from domains.forecasting.series import checked_frame, listed, season_length, series_bounds
from domains.forecasting.sources import read_frame, read_table
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path

COMPARED = ("MASE", "WQL", "SQL", "coverage")


@dataclass(frozen=True)
class Question:
    """What is to be forecast from what.

    Attributes:
        past: a long frame, sorted.
        future: the known covariates of the steps to forecast; None without any.
        truth: the targets of these steps, in a back-test.
        columns: `id_column` and `timestamp_column`.
        target: columns to forecast.
        freq: of the time stamps.
        horizon: steps to forecast.
    """

    past: Any
    future: Any
    truth: Any
    columns: dict[str, str]
    target: list[str]
    freq: Any
    horizon: int


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Forecast every series of `cfg.input`; write the quantiles, and fan charts if asked for.

    Args:
        model: a Chronos-2 in eval mode, as `zoo.load_model` returns it.
        facts: the `extra` stored with it, as `ForecastData.extra` makes it.
        cfg: as `configs/predict.yaml` with `configs/predict/forecasting.yaml`.

    Returns:
        The files written: the table of forecasts in the columns of the official pipeline, then the picture.

    Raises:
        DataError: a table that cannot be used; the message names column and series.
        ConfigError: a setting that cannot be.
    """
    output = _checked_output(cfg)
    question = _read(cfg, facts)
    forecaster = Forecaster(cast(Any, model.to(chosen_device(cfg.device))))
    table = forecaster.predict_frame(
        question.past,
        question.future,
        horizon=question.horizon,
        target=question.target,
        levels=list(cfg.levels),
        freq=question.freq,
        cross_learning=cfg.cross_learning,
        context_length=cfg.context_length,
        batch_size=cfg.batch_size,
        **question.columns,
    )
    with atomic_path(output) as part:
        if output.suffix == ".csv":
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)
    if question.truth is not None:
        console.print(_error_table(question, table, list(cfg.levels)))
    if not cfg.plots:
        return [output]
    picture = Path(cfg.plots) / "forecast.png"
    fan_chart(_fans(question, table, list(cfg.levels), cfg.series), picture)
    return [output, picture]


def _checked_output(cfg: DictConfig) -> Path:
    path = Path(cfg.output)
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"output={path}: the suffix must be .csv or .parquet.")
    if not cfg.input:
        raise ConfigError("zoo predict needs series to forecast: input=FILE.")
    return path


# ---- the table ---------------------------------------------------------------------------------------------


def _read(cfg: DictConfig, facts: Mapping[str, Any]) -> Question:
    horizon = cfg.horizon or facts.get("horizon")
    if not horizon or horizon < 1:
        raise ConfigError("How many steps are to be forecast? horizon=24, for example.")
    options: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(
            cfg, ["id_column", "timestamp_column", "target", "past", "known", "freq", "gaps"]
        )
    )
    for name in ("past", "known"):
        options[name] = [options[name]] if isinstance(options[name], str) else options[name]
    frame, found = read_frame(cfg.input, **options)
    columns = {name: found[name] for name in ("id_column", "timestamp_column")}
    target, known = found["target"], options["known"]
    past, future, truth = frame, None, None
    if cfg.backtest:
        past, later = _cut(frame, [horizon] * _count(frame, columns), columns)
        truth, future = later, _only(later, columns, known)
    elif known and cfg.future:
        later = _read_future(cfg.future, known, columns)
        future = _only(later, columns, known)
    elif known:
        past, future = _known_ahead(frame, target, known, horizon, columns, cfg.input)
    return Question(past, future, truth, columns, target, found["freq"], horizon)


def _read_future(path: str, known: Sequence[str], columns: Mapping[str, str]) -> pd.DataFrame:
    """The table of known covariates; a column that the series have and it lacks cannot be known."""
    table = read_table(Path(path))
    if columns["id_column"] not in table and columns["timestamp_column"] in table:
        raise DataError(f"{path} has no column {columns['id_column']!r} that names the series.")
    return checked_frame(table, target=[], covariates=known, source=path, **columns)


def _count(frame: pd.DataFrame, columns: Mapping[str, str]) -> int:
    return len(series_bounds(frame[columns["id_column"]])) - 1


def _only(frame: pd.DataFrame, columns: Mapping[str, str], known: Sequence[str]) -> Any:
    return frame[[*columns.values(), *known]] if known else None


def _cut(frame: Any, steps: Sequence[int], columns: Mapping[str, str]) -> tuple[Any, Any]:
    """The frame without the last `steps` rows of each series, and these."""
    bounds = series_bounds(frame[columns["id_column"]])
    last = np.zeros(len(frame), dtype=bool)
    for (start, end), count in zip(pairwise(bounds), steps, strict=True):
        if end - start <= count:
            name = frame[columns["id_column"]].iloc[start]
            raise DataError(
                f"Series {str(name)!r} has {end - start} rows: nothing is left to forecast {count} steps "
                "from."
            )
        last[end - count : end] = True
    return frame[~last].reset_index(drop=True), frame[last].reset_index(drop=True)


def _known_ahead(
    frame: Any,
    target: Sequence[str],
    known: Sequence[str],
    horizon: int,
    columns: Mapping[str, str],
    source: str,
) -> tuple[Any, Any]:
    """Split off the rows after the last known target, which hold the future of the known covariates."""
    has_target = frame[list(target)].notna().any(axis=1).to_numpy()
    bounds = series_bounds(frame[columns["id_column"]])
    trailing = []
    for start, end in pairwise(bounds):
        seen = np.flatnonzero(has_target[start:end])
        trailing.append(int(end - start - 1 - seen[-1]) if len(seen) else 0)
    short = [i for i, rows in enumerate(trailing) if rows < horizon]
    if short:
        names = frame[columns["id_column"]].iloc[bounds[short]].tolist()
        raise DataError(
            f"{source}: {', '.join(known)} must be known for {horizon} steps after the last known target, "
            f"but end {trailing[short[0]]} steps after it in series {listed(names)}. Add rows with empty "
            "targets, give future=FILE, or list the covariates under past."
        )
    past, later = _cut(frame, trailing, columns)
    first = np.concatenate([np.arange(rows) < horizon for rows in trailing])
    return past, _only(later[first].reset_index(drop=True), columns, known)


# ---- what came of it ---------------------------------------------------------------------------------------


def _arrays(question: Question, table: Any, levels: Sequence[float]) -> tuple[list[np.ndarray], np.ndarray]:
    """Histories `[T, D]` of all series, and quantiles `[I, H, D, L]`."""
    bounds = series_bounds(question.past[question.columns["id_column"]])
    values = question.past[question.target].to_numpy(dtype=np.float64)
    quantiles = table[[str(level) for level in levels]].to_numpy(dtype=np.float64)
    shape = (len(bounds) - 1, len(question.target), question.horizon, len(levels))
    return [values[a:b] for a, b in pairwise(bounds)], np.moveaxis(quantiles.reshape(shape), 1, 2)


def _truth(question: Question) -> np.ndarray:
    """`[I, H, D]`"""
    values = question.truth[question.target].to_numpy(dtype=np.float64)
    return values.reshape(-1, question.horizon, len(question.target))


def _error_table(question: Question, table: pd.DataFrame, levels: Sequence[float]) -> Table:
    """Errors of the back-test beside those of seasonal naive."""
    histories, quantiles = _arrays(question, table, levels)
    season, truth = season_length(question.freq), _truth(question)
    naive = SeasonalNaive(season)([{"target": h.T} for h in histories], question.horizon, levels)
    shown = Table(
        "forecast", *COMPARED, title=f"Errors in the last {question.horizon} steps, season {season}"
    )
    for name, made in (("forecast", quantiles), (BASELINE, np.stack([np.moveaxis(n, 0, 1) for n in naive]))):
        point = made[..., int(np.argmin(np.abs(np.asarray(levels) - 0.5)))]
        judged = judge(truth, made, histories, season=season, levels=levels, point=point)
        shown.add_row(name, *(f"{value:.4g}" for value in scores(judged, COMPARED).values()))
    return shown


def _fans(
    question: Question, table: pd.DataFrame, levels: Sequence[float], chosen: str | Sequence[str]
) -> list[Fan]:
    """The series to draw, each target by itself."""
    histories, quantiles = _arrays(question, table, levels)
    truth = None if question.truth is None else _truth(question)
    bounds = series_bounds(question.past[question.columns["id_column"]])
    names = [str(name) for name in question.past[question.columns["id_column"]].iloc[bounds[:-1]]]
    past = pd.DatetimeIndex(question.past[question.columns["timestamp_column"]])
    ahead = pd.DatetimeIndex(table[question.columns["timestamp_column"]])
    per_series = question.horizon * len(question.target)
    fans = []
    for i in _places(chosen, names):
        stamps = past[bounds[i] : bounds[i + 1]].append(
            ahead[i * per_series : i * per_series + question.horizon]
        )
        for d, target in enumerate(question.target):
            title = names[i] if len(question.target) == 1 else f"{names[i]}: {target}"
            fans.append(
                Fan(
                    title,
                    histories[i][:, d],
                    quantiles[i, :, d],
                    levels,
                    None if truth is None else truth[i, :, d],
                    pd.DatetimeIndex(stamps),
                )
            )
    return fans[:PANELS]


def _places(chosen: str | Sequence[str], names: Sequence[str]) -> list[int]:
    if chosen == "first":
        return list(range(min(PANELS, len(names))))
    wanted = [str(name) for name in ([chosen] if isinstance(chosen, str) else chosen)]
    for name in wanted:
        if name not in names:
            raise ConfigError(f"series: the input has no series {name!r}.{did_you_mean(name, names)}")
    return [names.index(name) for name in wanted]
