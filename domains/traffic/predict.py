"""From recent readings and a trained model to a forecast file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from torch import nn

from domains.traffic.formats import read_series
from domains.traffic.metrics import HorizonErrors
from domains.traffic.plots import forecast_plot, quantity, sensor_map, unit
from domains.traffic.preprocessing import Preprocessing
from domains.traffic.series import TrafficSeries, listed
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path

REPORTED_MINUTES = (15, 30, 60)
SHOWN_HISTORIES = 3  # how many times the model's history a plot goes back


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Forecast the steps that follow the readings of `cfg.input`; write them, and plots if asked for.

    Args:
        model: in eval mode, as `zoo.load_model` returns it.
        facts: the `extra` stored with it, as `TrafficData.extra` makes it.
        cfg: as `configs/predict.yaml`.

    Returns:
        The files written: the table `timestamp, sensor, horizon_minutes, forecast`, then the plots.

    Raises:
        DataError: readings of other sensors or another interval than the model's, or too few of them.
        ConfigError: a setting that cannot be.
    """
    output = _checked_output(cfg.output)
    series = _read(cfg, facts)
    now = _present(cfg, series, facts["history"], facts["horizon"])
    forecast = forecast_after(model, facts, series, now)
    timestamps = _clock(series, now, facts["history"], facts["horizon"])[facts["history"] :]
    _write(forecast, timestamps, series, output)
    truth = _truth(facts, series, now)
    if np.isfinite(truth).any():
        console.print(_error_table(facts, series, now, forecast, truth))
    return [output, *_draw(cfg, facts, series, now, forecast, truth)]


@torch.no_grad()
def forecast_after(model: nn.Module, facts: Mapping[str, Any], series: TrafficSeries, now: int) -> np.ndarray:
    """The forecast `[Q, N]` in original units of the steps after row `now`, from the readings up to it.

    Args:
        series: the model's sensors and channels, in its order.
    """
    history = facts["history"]
    preprocessing = Preprocessing(**facts["preprocessing"])
    inputs = preprocessing.inputs(series.values[: now + 1])[-history:]
    time = preprocessing.time(_clock(series, now, history, facts["horizon"]), series.interval_minutes)
    scaled = model(inputs[None], time[None])
    return (scaled * torch.tensor(facts["std"]) + torch.tensor(facts["mean"]))[0].numpy()


# ---- the readings ------------------------------------------------------------------------------------------


def _read(cfg: DictConfig, facts: Mapping[str, Any]) -> TrafficSeries:
    """The readings of `cfg.input` with the sensors and channels of the model."""
    if not cfg.input:
        raise ConfigError("zoo predict needs recent readings: input=FILE.")
    series = read_series(cfg.input, **OmegaConf.to_object(cfg.reading))  # pyright: ignore[reportCallIssue]
    if series.interval_minutes != facts["interval_minutes"]:
        raise DataError(
            f"{cfg.input} has a reading every {series.interval_minutes} minutes, but the model was trained "
            f"on one every {facts['interval_minutes']} minutes: resample the readings."
        )
    return _order_sensors(_order_channels(series, facts["channels"]), facts["sensor_ids"], cfg.absent_sensors)


def _order_channels(series: TrafficSeries, wanted: Sequence[str]) -> TrafficSeries:
    if len(wanted) == len(series.channels) == 1:  # formats with one channel do not name it alike
        return series
    for name in wanted:
        if name not in series.channels:
            raise DataError(
                f"{series.source} has no channel {name!r}, which the model needs; it has "
                f"{', '.join(series.channels)}.{did_you_mean(name, series.channels)}"
            )
    places = [series.channels.index(name) for name in wanted]
    return replace(series, values=series.values[:, :, places], channels=list(wanted))


def _order_sensors(series: TrafficSeries, wanted: Sequence[str], absent_sensors: str) -> TrafficSeries:
    """The sensors of the model in its order; those it does not know are left out, with a note."""
    if absent_sensors not in ("error", "missing"):
        raise ConfigError(f"absent_sensors={absent_sensors} is not one of error, missing.")
    given, known = set(series.sensor_ids), set(wanted)
    absent = [sensor for sensor in wanted if sensor not in given]
    unknown = [sensor for sensor in series.sensor_ids if sensor not in known]
    if len(absent) == len(wanted):
        raise DataError(
            f"{series.source} has {listed(series.sensor_ids, 'sensor')}, none of which is among the model's "
            f"{listed(wanted, 'sensor')}. Name the columns with reading.sensor_ids=FILE if the file does not."
        )
    if absent and absent_sensors == "error":
        raise DataError(
            f"{series.source} has no readings of {listed(absent, 'sensor')} of the model's {len(wanted)}"
            + (f", and {listed(unknown, 'sensor')} that it does not know" if unknown else "")
            + ". Set absent_sensors=missing to forecast as if their readings were missing."
        )
    if unknown:
        console.print(f"Left out {listed(unknown, 'sensor')} that the model does not know.", highlight=False)
    if absent:
        nothing = np.full((len(series.values), len(absent), len(series.channels)), np.nan, np.float32)
        values = np.concatenate([series.values, nothing], axis=1)
        series = replace(series, values=values, sensor_ids=[*series.sensor_ids, *absent])
    return series.select(wanted)


def _present(cfg: DictConfig, series: TrafficSeries, history: int, horizon: int) -> int:
    """The row of the last reading that the model may see."""
    if cfg.at is not None and cfg.backtest:
        raise ConfigError("Give either at=TIMESTAMP or backtest=true, which leaves out the last readings.")
    if cfg.at is None:
        now = len(series.timestamps) - 1 - (horizon if cfg.backtest else 0)
    else:
        now = _row_of(cfg.at, series)
    if now + 1 < history:
        known = f"{max(now + 1, 0)} readings per sensor up to {cfg.at or 'the time to forecast from'}"
        raise DataError(f"{series.source} has {known}; the model needs the last {history}.")
    recent = series.timestamps[now + 1 - history : now + 1]
    if recent[-1] - recent[0] != (history - 1) * _step(series):
        raise DataError(
            f"{series.source} has a gap within the last {history} readings before {series.timestamps[now]}: "
            "use reading.gaps=fill to count the lost rows as missing."
        )
    return now


def _row_of(at: str, series: TrafficSeries) -> int:
    try:
        moment = np.datetime64(at, "s")
    except ValueError:
        raise ConfigError(f"at={at} is no date and time; write for example 'at=2012-03-07 08:00'.") from None
    rows = np.flatnonzero(series.timestamps == moment)
    if not len(rows):
        raise DataError(
            f"{series.source} has no readings of {moment}; it reaches from {series.timestamps[0]} to "
            f"{series.timestamps[-1]} in steps of {series.interval_minutes} minutes."
        )
    return int(rows[0])


def _clock(series: TrafficSeries, now: int, history: int, horizon: int) -> np.ndarray:
    """`[P + Q]` datetime64[s] of the history that ends at row `now`, and of the horizon."""
    return series.timestamps[now] + np.arange(1 - history, horizon + 1) * _step(series)


def _step(series: TrafficSeries) -> np.timedelta64:
    return np.timedelta64(60 * series.interval_minutes, "s")


# ---- the forecast ------------------------------------------------------------------------------------------


def _checked_output(output: str) -> Path:
    path = Path(output)
    if path.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"output={output}: the suffix must be .csv or .parquet.")
    return path


def _write(forecast: np.ndarray, timestamps: np.ndarray, series: TrafficSeries, path: Path) -> None:
    """One row per step and sensor, by time."""
    steps, sensors = forecast.shape
    frame = pd.DataFrame(
        {
            "timestamp": np.repeat(timestamps, sensors),
            "sensor": np.tile(np.array(series.sensor_ids, dtype=object), steps),
            "horizon_minutes": np.repeat(np.arange(1, steps + 1) * series.interval_minutes, sensors),
            "forecast": forecast.ravel(),
        }
    )
    with atomic_path(path) as part:
        if path.suffix == ".csv":
            frame.to_csv(part, index=False)
        else:
            frame.to_parquet(part, index=False)


# ---- against what came -------------------------------------------------------------------------------------


def _readings(facts: Mapping[str, Any], series: TrafficSeries) -> np.ndarray:
    """`[T, N]` of the forecast channel, NaN where missing."""
    values = series.values[:, :, :1]
    return np.where(Preprocessing(**facts["preprocessing"]).observed(values), values, np.nan)[:, :, 0]


def _truth(facts: Mapping[str, Any], series: TrafficSeries, now: int) -> np.ndarray:
    """`[Q, N]` readings of the steps forecast, NaN where they are missing or not in the file."""
    truth = np.full((facts["horizon"], len(series.sensor_ids)), np.nan, np.float32)
    step = (series.timestamps[now + 1 :] - series.timestamps[now]) // _step(series)
    known = np.flatnonzero(step <= facts["horizon"])
    truth[step[known] - 1] = _readings(facts, series)[now + 1 + known]
    return truth


def _error_table(
    facts: Mapping[str, Any], series: TrafficSeries, now: int, forecast: np.ndarray, truth: np.ndarray
) -> Table:
    """Errors of the forecast, and of going on with the last reading, at the usual horizons."""
    history, horizon = facts["history"], facts["horizon"]
    past = pd.DataFrame(_readings(facts, series)[now + 1 - history : now + 1])
    carried = past.ffill().iloc[-1].fillna(facts["mean"]).to_numpy(copy=True)
    target = torch.from_numpy(truth)[None]
    last = torch.from_numpy(carried).expand_as(target)
    interval = series.interval_minutes
    minutes = [m for m in REPORTED_MINUTES if m % interval == 0 and m // interval <= horizon] or [
        interval * horizon
    ]
    title = f"MAE / RMSE / MAPE (%) after {series.timestamps[now]}"
    table = Table("error", *(f"{m} min" for m in minutes), "all steps", title=title, title_justify="left")
    for name, values in (("forecast", torch.from_numpy(forecast)[None]), ("last value", last)):
        metric = HorizonErrors(horizon, null_value=None)
        metric.update(values, target)
        errors = {key: value.tolist() for key, value in metric.compute().items()}
        cells = [
            " / ".join(f"{errors[key][m // interval - 1]:.2f}" for key in ("mae", "rmse", "mape"))
            for m in minutes
        ]
        table.add_row(
            name, *cells, " / ".join(f"{errors[f'average_{key}']:.2f}" for key in ("mae", "rmse", "mape"))
        )
    return table


def _draw(
    cfg: DictConfig,
    facts: Mapping[str, Any],
    series: TrafficSeries,
    now: int,
    forecast: np.ndarray,
    truth: np.ndarray,
) -> list[Path]:
    if not cfg.plots:
        return []
    folder, what, history = Path(cfg.plots), quantity(facts["data"]), facts["history"]
    has_truth = bool(np.isfinite(truth).any())
    chosen = _choose(cfg.sensors, series.sensor_ids, forecast, truth)
    shown = min(now + 1, SHOWN_HISTORIES * history)
    forecast_plot(
        [series.sensor_ids[i] for i in chosen],
        _clock(series, now, shown, facts["horizon"]),
        _recent(facts, series, now, shown)[:, chosen],
        forecast[:, chosen],
        folder / "forecast.png",
        truth=truth[:, chosen] if has_truth else None,
        what=what,
    )
    if facts["coordinates"] is None:
        return [folder / "forecast.png"]
    horizon = f"{facts['horizon'] * series.interval_minutes} min"
    sensor_map(
        np.array(facts["coordinates"]),
        _mean_error(forecast, truth) if has_truth else forecast[-1],
        folder / "map.png",
        f"MAE over {horizon} ({unit(what)})" if has_truth else f"forecast {what} in {horizon}",
        slow_is_bad=not has_truth and what.startswith("speed"),
    )
    return [folder / "forecast.png", folder / "map.png"]


def _recent(facts: Mapping[str, Any], series: TrafficSeries, now: int, steps: int) -> np.ndarray:
    """`[steps, N]` readings that end at row `now`, on an even clock: NaN where a row is missing, too."""
    back = (series.timestamps[now] - series.timestamps[: now + 1]) // _step(series)
    rows = np.flatnonzero(back < steps)
    recent = np.full((steps, len(series.sensor_ids)), np.nan, np.float32)
    recent[steps - 1 - back[rows]] = _readings(facts, series)[rows]
    return recent


def _choose(
    sensors: str | Sequence[str], ids: Sequence[str], forecast: np.ndarray, truth: np.ndarray, count: int = 4
) -> list[int]:
    """Places of the sensors to plot: those named, the first, or the worst (without truth, the slowest)."""
    if sensors == "first":
        return list(range(min(count, len(ids))))
    if sensors == "worst":
        error = _mean_error(forecast, truth)
        badness = np.nan_to_num(error, nan=-np.inf) if np.isfinite(error).any() else -forecast.mean(axis=0)
        return [int(i) for i in np.argsort(-badness)[:count]]
    named = [str(sensor) for sensor in ([sensors] if isinstance(sensors, str) else sensors)]
    for sensor in named:
        if sensor not in ids:
            raise ConfigError(f"sensors: the model has no sensor {sensor!r}.{did_you_mean(sensor, ids)}")
    return [ids.index(sensor) for sensor in named]


def _mean_error(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """`[N]` mean absolute error over the steps known; NaN for a sensor without any."""
    known = np.isfinite(truth)
    total = np.where(known, np.abs(forecast - truth), 0).sum(axis=0)
    return np.divide(total, known.sum(axis=0), out=np.full(total.shape, np.nan), where=known.any(axis=0))
