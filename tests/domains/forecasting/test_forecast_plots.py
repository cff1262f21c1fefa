"""Every picture is written, whatever is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.plots import Fan, calibration_plot, fan_chart, skill_plot, training_curve

LEVELS = (0.1, 0.5, 0.9)


def fan(horizon: int, **changes: object) -> Fan:
    history = np.sin(np.arange(50.0))
    history[30] = np.nan
    quantiles = np.arange(3.0) + np.arange(horizon)[:, None]
    return Fan(**({"title": "a", "history": history, "quantiles": quantiles, "levels": LEVELS} | changes))  # pyright: ignore[reportArgumentType]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("horizon", [1, 12])
def test_fan_charts(tmp_path: Path, count: int, horizon: int) -> None:
    stamps = pd.date_range("2024-01-01", periods=50 + horizon, freq="MS")
    fans = [fan(horizon), fan(horizon, timestamps=stamps, truth=np.full(horizon, np.nan))] * count
    fan_chart(fans[:count], tmp_path / "fan.png")
    assert is_png(tmp_path / "fan.png")


def test_calibration_skill_and_training(tmp_path: Path) -> None:
    calibration_plot({"a": np.array([0.2, 0.5, 0.7])}, LEVELS, tmp_path / "calibration.png")
    errors = {"model": {"WQL": 0.1}, "seasonal naive": {"WQL": 0.2}, "other": {"WQL": 0.3}}
    skill_plot({name: {"errors": errors} for name in "abc"}, "model", tmp_path / "skill.png")
    (tmp_path / "metrics.csv").write_text("epoch,train/loss,val/loss\n1,9.0,8.0\n2,7.0,\n")
    training_curve(tmp_path / "metrics.csv", tmp_path / "training.png")
    assert all(is_png(path) for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 3
