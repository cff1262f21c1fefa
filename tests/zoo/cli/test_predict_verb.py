"""`zoo predict` on the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from domains.traffic.formats import write_series
from domains.traffic.series import TrafficSeries, regular_clock
from zoo.cli.predict import app
from zoo.create import create_model
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.checkpoint import save_model

IDS = ["a", "b", "c"]
FACTS = {
    "data": "file",
    "sensor_ids": IDS,
    "interval_minutes": 5,
    "history": 12,
    "horizon": 12,
    "channels": ["value"],
    "mean": 60.0,
    "std": 10.0,
    "null_value": 0.0,
    "preprocessing": {"channels": ["value"], "mean": [60.0], "std": [10.0]},
    "coordinates": None,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds `model.safetensors` and a day of readings in `recent.csv`."""
    monkeypatch.chdir(tmp_path)
    save_model(create_model("stid", num_nodes=3), "model.safetensors", extra=FACTS)
    values = np.random.default_rng(0).normal(60, 5, (288, 3, 1)).astype(np.float32)
    write_series(TrafficSeries(values, regular_clock("2024-01-04", 288, 5), IDS, 5), "recent.csv")
    return tmp_path


def zoo_predict(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_checkpoint_and_recent_readings_give_a_forecast(folder: Path) -> None:
    out = zoo_predict(
        "checkpoint=model.safetensors", "input=recent.csv", "output=next.parquet", "plots=plots"
    )
    assert "next.parquet" in out
    assert "plots/forecast.png" in out
    table = pd.read_parquet(folder / "next.parquet")
    assert len(table) == 36
    assert table["timestamp"].iloc[0] == pd.Timestamp("2024-01-05 00:00")


def test_a_run_folder_stands_for_its_weights(folder: Path) -> None:
    (folder / "config.yaml").write_text("domain: {name: traffic}\n")
    zoo_predict("run=.", "input=recent.csv")
    assert (folder / "forecast.csv").is_file()


def test_cfg_prints_the_config_and_writes_nothing(folder: Path) -> None:
    assert "input: recent.csv" in zoo_predict("input=recent.csv", "--cfg")
    assert not (folder / "forecast.csv").exists()


def test_weights_must_be_named_once(folder: Path) -> None:
    for arguments in (["input=recent.csv"], ["run=.", "checkpoint=model.safetensors"]):
        with pytest.raises(ConfigError, match="either run=RUN or checkpoint=FILE"):
            zoo_predict(*arguments)


def test_a_mistyped_key_suggests_the_right_one(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"'outptu'.*'output'"):
        zoo_predict("outptu=x.csv")


def test_a_folder_without_a_run_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run in nowhere"):
        zoo_predict("run=nowhere", "input=recent.csv")
