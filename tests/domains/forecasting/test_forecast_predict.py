"""`zoo predict` for series: tables in, quantiles and fan charts out; mistakes named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from domains.forecasting.pipeline import Forecaster
from domains.forecasting.weights import save_folder
from zoo.cli.predict import app
from zoo.create import create_model
from zoo.errors import ConfigError, DataError

HORIZON = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds official weights in `weights`, and a table of two series, whose last rows have no target."""
    monkeypatch.chdir(tmp_path)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    save_folder(create_model("chronos2_mini", context_length=64, **sizes), tmp_path / "weights")
    draw = np.random.default_rng(0)
    stamps = pd.date_range("2024-01-01", periods=60 + HORIZON, freq="h")
    parts = [
        pd.DataFrame(
            {"shop": name, "when": stamps, "sales": draw.normal(10, 2, 68), "price": draw.normal(size=68)}
        )
        for name in ("north", "south")
    ]
    table = pd.concat(parts)
    table.loc[table["when"] >= stamps[60], "sales"] = np.nan
    table.to_csv("sales.csv", index=False)
    return tmp_path


COLUMNS = ["id_column=shop", "timestamp_column=when", "target=sales"]
WEIGHTS = ["domain=forecasting", "model=chronos2", "checkpoint=weights", f"horizon={HORIZON}"]


def zoo_predict(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*WEIGHTS, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_rows_without_target_hold_the_future_of_known_covariates(folder: Path) -> None:
    zoo_predict("data=sales.csv", *COLUMNS, "known=[price]", "plots=plots")
    table = pd.read_csv("forecast.csv")
    assert list(table.columns)[:4] == ["shop", "when", "target_name", "predictions"]
    assert list(table.columns)[4:] == [f"0.{i}" for i in range(1, 10)]
    assert table["when"].iloc[0] == "2024-01-03 12:00:00"
    assert len(table) == 2 * HORIZON
    assert (folder / "plots" / "forecast.png").is_file()

    frame = pd.read_csv("sales.csv")
    past, future = frame[frame["sales"].notna()], frame[frame["sales"].isna()].drop(columns="sales")
    expected = Forecaster.from_folder("weights").predict_frame(
        past, future, horizon=HORIZON, target="sales", id_column="shop", timestamp_column="when"
    )
    np.testing.assert_allclose(table["0.9"], expected["0.9"], rtol=1e-5)


def test_a_table_of_the_future_gives_the_same(folder: Path) -> None:
    frame = pd.read_csv("sales.csv")
    frame[frame["sales"].notna()].to_csv("past.csv", index=False)
    frame[frame["sales"].isna()].drop(columns="sales").to_csv("future.csv", index=False)
    zoo_predict("input=past.csv", *COLUMNS, "known=[price]", "future=future.csv", "output=a.parquet")
    zoo_predict("input=sales.csv", *COLUMNS, "known=[price]", "output=b.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet("a.parquet"), pd.read_parquet("b.parquet"))


def test_a_backtest_shows_the_errors_beside_seasonal_naive(folder: Path) -> None:
    pd.read_csv("sales.csv").dropna().to_csv("past.csv", index=False)
    out = zoo_predict("input=past.csv", *COLUMNS, "backtest=true", "plots=plots", "series=[south]")
    assert "Errors in the last 8 steps, season 24" in out
    assert "seasonal naive" in out
    assert pd.read_csv("forecast.csv")["when"].iloc[0] == "2024-01-03 04:00:00"


def test_covariates_that_end_too_early_name_the_series(folder: Path) -> None:
    pd.read_csv("sales.csv").iloc[:-2].to_csv("short.csv", index=False)
    with pytest.raises(DataError, match=r"price must be known for 8 steps .*end 6 steps .*'south'"):
        zoo_predict("input=short.csv", *COLUMNS, "known=[price]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=sales.csv", *COLUMNS, "output=a.xlsx"], "suffix must be .csv or .parquet"),
        (["input=sales.csv", *COLUMNS, "series=[noth]", "plots=p"], "no series 'noth'. Did you mean 'north'"),
        (["input=sales.csv", *COLUMNS, "domain=traffic"], "weights are for domain=forecasting"),
        (["input=sales.csv", *COLUMNS, "horizont=3"], "Did you mean 'horizon'"),
    ],
)
def test_settings_are_checked(folder: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo_predict(*arguments)


def test_a_target_that_is_also_a_covariate_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="'sales' is asked for twice"):
        zoo_predict("input=sales.csv", *COLUMNS, "past=[sales]")
