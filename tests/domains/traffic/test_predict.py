"""From a file of recent readings to a forecast file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from domains.traffic.data import TrafficData
from domains.traffic.formats import write_series
from domains.traffic.predict import predict
from domains.traffic.series import TrafficSeries, regular_clock
from zoo.config import compose
from zoo.create import create_model
from zoo.errors import ConfigError, DataError
from zoo.registry import model_signature
from zoo.weights.checkpoint import load_model, save_model

IDS = ["s10", "s2", "s33", "s4", "s5"]


class Trained(NamedTuple):
    model: nn.Module
    facts: dict[str, Any]
    data: TrafficData
    series: TrafficSeries


def make_series(days: int = 2) -> TrafficSeries:
    rng = np.random.default_rng(0)
    values = (60 + 5 * rng.standard_normal((288 * days, len(IDS), 1))).astype(np.float32)
    values[rng.random(values.shape) < 0.05] = 0
    return TrafficSeries(values, regular_clock("2024-01-04", len(values), 5), list(IDS), 5, ["value"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A model with random weights, as a run would leave it."""
    torch.manual_seed(0)
    folder, series = tmp_path_factory.mktemp("run"), make_series()
    write_series(series, folder / "train.csv")
    places = "".join(f"{i},{s},34.{i},-118.{i}\n" for i, s in enumerate(IDS))
    (folder / "places.csv").write_text("index,sensor_id,latitude,longitude\n" + places)
    data = TrafficData(name="file", path=str(folder / "train.csv"), locations=str(folder / "places.csv"))
    data.setup()
    accepted = {key: value for key, value in data.model_kwargs().items() if key in model_signature("stid")}
    model = create_model("stid", **accepted).eval()
    save_model(model, folder / "model.safetensors", extra=data.extra())
    return Trained(*load_model(folder / "model.safetensors"), data, series)


@pytest.fixture
def forecast(trained: Trained, tmp_path: Path) -> Callable[..., pd.DataFrame]:
    """Writes a series as `input.csv`, predicts with the given settings, reads the forecast back."""

    def run(series: TrafficSeries, suffix: str = ".csv", **settings: Any) -> pd.DataFrame:
        write_series(series, tmp_path / "input.csv")
        predict(trained.model, trained.facts, config(tmp_path, suffix, **settings))
        if suffix == ".parquet":
            return pd.read_parquet(tmp_path / "out.parquet")
        return pd.read_csv(tmp_path / "out.csv", parse_dates=["timestamp"], dtype={"forecast": np.float32})

    return run


def config(folder: Path, suffix: str = ".csv", **settings: Any) -> DictConfig:
    files = [f"input={folder / 'input.csv'}", f"output={folder / 'out'}{suffix}"]
    cfg = compose("predict", ["predict=traffic", *files])
    return OmegaConf.merge(cfg, settings)  # pyright: ignore[reportReturnType]


def part(series: TrafficSeries, rows: slice | np.ndarray) -> TrafficSeries:
    return replace(series, values=series.values[rows], timestamps=series.timestamps[rows])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_forecast_is_bit_equal_to_that_of_the_trained_model(
    trained: Trained, forecast: Callable[..., pd.DataFrame], suffix: str
) -> None:
    data = trained.data
    start = int(data.test_set.starts[7])
    batch = data.test_set.__getitems__([7])
    with torch.no_grad():
        scaled = trained.model(batch["x"], batch["time"])
    expected = (scaled * torch.tensor(data.std) + torch.tensor(data.mean))[0].numpy()
    table = forecast(part(trained.series, slice(0, start + data.history)), suffix)
    assert list(table) == ["timestamp", "sensor", "horizon_minutes", "forecast"]
    assert np.array_equal(table["forecast"].to_numpy().reshape(12, 5), expected)
    assert table["sensor"].tolist() == IDS * 12
    assert table["horizon_minutes"].tolist() == np.repeat(np.arange(5, 61, 5), 5).tolist()
    times = regular_clock(trained.series.timestamps[start + data.history], 12, 5)
    assert np.array_equal(table["timestamp"].to_numpy("datetime64[s]"), np.repeat(times, 5))


def test_the_order_of_the_sensors_in_the_input_does_not_matter(
    trained: Trained, forecast: Callable[..., pd.DataFrame]
) -> None:
    expected = forecast(trained.series)
    pd.testing.assert_frame_equal(forecast(trained.series.select(IDS[::-1])), expected)


def test_at_forecasts_from_that_moment_as_if_later_readings_were_not_there(
    trained: Trained, forecast: Callable[..., pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = forecast(part(trained.series, slice(0, 401)))
    found = forecast(trained.series, at=str(trained.series.timestamps[400]))
    pd.testing.assert_frame_equal(found, expected)
    assert "last value" in capsys.readouterr().out


def test_backtest_leaves_out_the_last_horizon_and_prints_its_error(
    trained: Trained, forecast: Callable[..., pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    table = forecast(trained.series, backtest=True)
    truth = trained.series.values[-12:, :, 0]
    error = np.abs(table["forecast"].to_numpy().reshape(12, 5) - truth)
    expected = [error[step][truth[step] != 0].mean() for step in (2, 5, 11)]
    line = next(line for line in capsys.readouterr().out.splitlines() if "forecast" in line)
    found = [float(cell.split("/")[0]) for cell in line.split("│")[2:5]]
    assert found == pytest.approx(expected, abs=0.006)


def test_a_lost_row_counts_as_missing_readings(
    trained: Trained, forecast: Callable[..., pd.DataFrame]
) -> None:
    zeroed = replace(trained.series, values=trained.series.values.copy())
    zeroed.values[-4] = 0
    rows = np.delete(np.arange(len(zeroed.values)), -4)
    pd.testing.assert_frame_equal(forecast(part(trained.series, rows)), forecast(zeroed))


def test_absent_sensors_are_named_and_forecast_only_on_request(
    trained: Trained, forecast: Callable[..., pd.DataFrame]
) -> None:
    without = trained.series.select([s for s in IDS if s != "s33"])
    with pytest.raises(
        DataError, match=r"no readings of 1 sensor \('s33'\) of the model's 5.*absent_sensors"
    ):
        forecast(without)
    zeroed = replace(trained.series, values=trained.series.values.copy())
    zeroed.values[:, 2] = 0
    pd.testing.assert_frame_equal(forecast(without, absent_sensors="missing"), forecast(zeroed))


def test_unknown_sensors_are_named_and_left_out(
    trained: Trained, forecast: Callable[..., pd.DataFrame], capsys: pytest.CaptureFixture[str]
) -> None:
    more = replace(
        trained.series,
        values=np.concatenate([trained.series.values[:, :1], trained.series.values], axis=1),
        sensor_ids=["new", *IDS],
    )
    pd.testing.assert_frame_equal(forecast(more), forecast(trained.series))
    assert "Left out 1 sensor ('new')" in capsys.readouterr().out


def test_bad_input_is_refused_with_the_reason(
    trained: Trained, forecast: Callable[..., pd.DataFrame]
) -> None:
    series = trained.series
    foreign = replace(series, sensor_ids=["a", "b", "c", "d", "e"])
    coarse = replace(
        series, timestamps=regular_clock("2024-01-01", len(series.values), 15), interval_minutes=15
    )
    gap = part(series, np.delete(np.arange(len(series.values)), -4))
    for given, settings, message in (
        (foreign, {}, r"5 sensors \('a'.*none of which is among the model's 5 sensors"),
        (coarse, {}, r"every 15 minutes, but the model was trained on one every 5 minutes"),
        (part(series, slice(0, 7)), {}, r"7 readings per sensor .* needs the last 12"),
        (part(series, slice(0, 14)), {"backtest": True}, r"has 2 readings per sensor"),
        (
            series,
            {"at": "2024-01-09 08:00"},
            r"no readings of 2024-01-09T08:00:00; it reaches from 2024-01-04",
        ),
        (gap, {"reading": {"gaps": "keep"}}, r"gap within the last 12 readings .* reading.gaps=fill"),
    ):
        with pytest.raises(DataError, match=message):
            forecast(given, **settings)


def test_bad_settings_are_refused_with_the_reason(
    trained: Trained, forecast: Callable[..., pd.DataFrame]
) -> None:
    for settings, message in (
        ({"at": "noon"}, "at=noon is no date and time"),
        ({"at": "2024-01-05", "backtest": True}, "either at=TIMESTAMP or backtest=true"),
        ({"absent_sensors": "drop"}, "absent_sensors=drop is not one of error, missing"),
        ({"suffix": ".txt"}, r"suffix must be \.csv or \.parquet"),
        ({"plots": "plots", "sensors": ["s3"]}, "no sensor 's3'.*Did you mean"),
        ({"input": None}, "needs recent readings: input=FILE"),
    ):
        with pytest.raises(ConfigError, match=message):
            forecast(trained.series, **settings)


@pytest.mark.parametrize("backtest", [False, True])
def test_plots_are_written_beside_the_forecast(trained: Trained, tmp_path: Path, backtest: bool) -> None:
    write_series(trained.series, tmp_path / "input.csv")
    cfg = config(tmp_path, backtest=backtest, plots=str(tmp_path / "plots"), sensors=["s4", "s10"])
    written = predict(trained.model, trained.facts, cfg)
    assert [path.name for path in written] == ["out.csv", "forecast.png", "map.png"]
    assert all(path.stat().st_size > 0 for path in written)
