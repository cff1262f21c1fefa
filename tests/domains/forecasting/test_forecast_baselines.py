"""Naive forecasts on small series and on M4, and the models of statsforecast."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from domains.forecasting.backtest import backtest, rolling_windows
from domains.forecasting.baselines import BASELINES, SeasonalNaive, build_baseline
from domains.forecasting.metrics import scores
from domains.forecasting.sources import read_m4
from zoo.errors import ConfigError, MissingExtra

HAS_STATSFORECAST = importlib.util.find_spec("statsforecast") is not None


def test_the_last_season_goes_on() -> None:
    [forecast] = SeasonalNaive(3)([{"target": np.arange(7.0)}], 5, (0.1, 0.9))
    assert forecast.shape == (1, 5, 2)
    assert forecast[0, :, 0].tolist() == forecast[0, :, 1].tolist() == [4, 5, 6, 4, 5]


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1.0, 2.0, 3.0, np.nan, 5.0, 6.0], [1, 5, 6]),  # a missing value: the season before
        ([1.0, 2.0], [2, 1, 2]),  # shorter than a season: what is unknown is the last value
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
    ],
)
def test_gaps_are_filled_from_what_is_known(history: list[float], expected: list[float]) -> None:
    assert SeasonalNaive(3).point(np.array([history]), 3)[0].tolist() == expected


def test_normal_quantiles_widen_by_the_season() -> None:
    history = np.array([0.0, 0.0, 1.0, -1.0])  # seasonal differences of 1 and -1
    [forecast] = build_baseline("gaussian_seasonal_naive", 2)([{"target": history}], 4, (0.5, 0.8413447))
    spread = forecast[0, :, 1] - forecast[0, :, 0]
    np.testing.assert_allclose(spread, np.sqrt([1, 1, 2, 2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("seasonal_naive", {"MASE": 1.19321, "WQL": 0.048309}),
        ("gaussian_seasonal_naive", {"MASE": 1.19321, "WQL": 0.03757, "SQL": 0.99090}),
    ],
)
def test_m4_hourly_has_the_published_errors(
    shared_data: Path, name: str, published: dict[str, float]
) -> None:
    series = read_m4(shared_data / "forecasting" / "m4_hourly")
    judged = backtest(build_baseline(name, 24), rolling_windows(series, 48), season=24)
    for metric, value in scores(judged, list(published)).items():
        assert value == pytest.approx(published[metric], rel=1e-4)


def test_an_unknown_baseline_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'auto_et'\. Did you mean 'auto_ets'"):
        build_baseline("auto_et", 1)


@pytest.mark.skipif(HAS_STATSFORECAST, reason="statsforecast is installed")
def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"statsforecast.*attention-zoo\[forecasting\]"):
        build_baseline("auto_theta", 12)


@pytest.mark.skipif(not HAS_STATSFORECAST, reason="needs statsforecast")
@pytest.mark.parametrize("name", [name for name in BASELINES if name.startswith("auto")])
def test_statsforecast_models_follow_trend_and_season(name: str) -> None:
    t = np.arange(96.0)
    noise = np.random.default_rng(0).normal(0, 0.1, 96)
    series = 0.1 * t + 2 * np.sin(2 * np.pi * t / 12) + noise
    series[40] = np.nan
    [forecast] = build_baseline(name, 12)([{"target": series[:84]}], 12, (0.1, 0.5, 0.9))
    assert forecast.shape == (1, 12, 3)
    assert (np.diff(forecast[0], axis=1) > 0).all()
    assert np.abs(forecast[0, :, 1] - series[84:]).mean() < 0.4
