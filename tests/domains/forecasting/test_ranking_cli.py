"""Ranking of stocks from the command line, on a tiny market."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from domains.forecasting.ranking.baselines import ridge
from domains.forecasting.ranking.data import RankingData, collate
from domains.forecasting.ranking.panel import Panel, read_panel, write_panel
from domains.forecasting.ranking.simulate import Market, simulate
from zoo.cli import app
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.weights.checkpoint import load_model

TINY = ["model.hidden=8", "model.num_groups=2", "model.group_size=3", "model.top_k=2", "model.expert_dim=4"]
MARKET = ["data.market.days=120", "data.market.stocks=12", "data.window=5", "trainer.max_epochs=1"]
QUIET = ["trainer.enable_progress_bar=false", "logger.tensorboard=false"]


def zoo_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def panel() -> Panel:
    return simulate(Market(days=120, stocks=12))


@pytest.fixture(scope="module")
def prices(panel: Panel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prices") / "prices.csv"
    write_panel(panel, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MIGA, trained for an epoch on a simulated market of 120 days."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_CACHE", str(folder.parent / "cache"))
        zoo_cli("train", "domain=forecasting", "model=miga", *TINY, *MARKET, *QUIET, f"run_dir={folder}")
    return folder


@pytest.fixture(autouse=True)
def _cache(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(run.parent / "cache"))


# ---- train, evaluate, fine-tune ----------------------------------------------------------------------------


def test_a_run_is_judged_beside_baselines_and_what_is_attainable(run: Path) -> None:
    found = results(run)["rankings"]
    assert list(found) == ["miga", "ridge", "reversal", "momentum", "attainable"]
    for values in found.values():
        assert {"IC", "ICIR", "RankIC", "RankICIR", "annual_excess_return", "IR", "turnover"} <= set(values)
    assert found["attainable"]["RankIC"] > 0
    pictures = {path.name for path in (run / "plots").glob("*.png")}
    assert pictures == {"ic.png", "portfolio.png", "quantiles.png"}
    _, facts = load_model(run / "model.safetensors")
    assert (facts["window"], facts["horizon"], len(facts["features"])) == (5, 1, 34)


def test_evaluation_repeats_the_test(run: Path, tmp_path: Path) -> None:
    out = zoo_cli("evaluate", f"run={run}", f"output={tmp_path}", "plots=false")
    assert "that this market allows" in " ".join(out.split())
    assert results(tmp_path)["rankings"] == results(run)["rankings"]


def test_weights_are_tested_on_prices_of_a_file_with_the_scale_they_were_trained_with(
    run: Path, prices: Path, tmp_path: Path
) -> None:
    options = ["data=price_panel", f"data.path={prices}", "data.window=5", "data.cost=0.001", "plots=false"]
    zoo_cli("evaluate", f"checkpoint={run}/model.safetensors", *options, f"output={tmp_path}")
    own, file = results(run)["rankings"]["miga"], results(tmp_path)["rankings"]["miga"]
    assert file["IC"] == pytest.approx(own["IC"], abs=1e-3)
    assert file["annual_return"] < own["annual_return"]
    assert "attainable" not in results(tmp_path)["rankings"]


def test_weights_are_not_tested_on_other_features_or_windows(run: Path, panel: Panel, tmp_path: Path) -> None:
    wide = tmp_path / "wide.csv"
    table = pd.DataFrame(panel.close, columns=pd.Index(panel.symbols))
    table.insert(0, "date", panel.dates)
    table.to_csv(wide, index=False)
    start = ["evaluate", f"checkpoint={run}/model.safetensors", "data=price_panel", "plots=false"]
    with pytest.raises(CheckpointError, match="trained on other features: the data lack body, range"):
        zoo_cli(*start, f"data.path={wide}", "data.window=5")
    with pytest.raises(CheckpointError, match=r"windows of 5 days, not of 10\. Set data.window=5"):
        zoo_cli(*start[:2], f"output={tmp_path}", "data=simulated_market", "data.market.days=120")


def test_a_run_is_fine_tuned_on_prices_of_a_file(run: Path, prices: Path, tmp_path: Path) -> None:
    zoo_cli(
        "finetune",
        f"checkpoint={run}",
        "data=price_panel",
        f"data.path={prices}",
        "trainer.max_epochs=1",
        *QUIET,
        f"run_dir={tmp_path / 'tuned'}",
    )
    assert results(tmp_path / "tuned")["data"] == "file"


def test_data_of_another_problem_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data of domain=forecasting/ranking have no option data\."):
        zoo_cli("train", "domain=forecasting", "model=miga", "data=m4_hourly", f"run_dir={tmp_path / 'x'}")


# ---- predict -----------------------------------------------------------------------------------------------


def test_ranks_of_the_last_day(run: Path, prices: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranks.csv"
    out = zoo_cli("predict", f"run={run}", f"input={prices}", f"output={output}", f"plots={tmp_path}")
    assert "scores.png" in out
    table: Any = pd.read_csv(output)
    panel = read_panel(prices)
    assert list(table.columns) == ["date", "symbol", "score", "rank"]
    assert set(table["date"]) == {str(panel.dates[-1])[:10]}
    assert set(table["symbol"]) == set(np.asarray(panel.symbols)[~np.isnan(panel.close[-1])])
    assert table["rank"].tolist() == list(range(1, len(table) + 1))
    assert (table["score"].diff().dropna() <= 0).all()


def test_ranks_of_all_days_do_not_depend_on_the_days_that_follow(
    run: Path, prices: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ranks.parquet"
    zoo_cli("predict", f"run={run}", f"input={prices}", f"output={output}", "date=all")
    table: Any = pd.read_parquet(output)
    day = sorted(set(table["date"]))[60]
    early = pd.read_csv(prices)
    early[early["date"] <= day].to_csv(tmp_path / "early.csv", index=False)
    zoo_cli("predict", f"run={run}", f"input={tmp_path / 'early.csv'}", f"output={tmp_path / 'e.csv'}")
    then = table[table["date"] == day]
    alone = pd.read_csv(tmp_path / "e.csv")
    assert alone["symbol"].tolist() == then["symbol"].tolist()
    np.testing.assert_allclose(alone["score"], then["score"], atol=1e-5)


def test_a_day_or_table_that_cannot_be_ranked_is_named(run: Path, prices: Path, tmp_path: Path) -> None:
    start = ["predict", f"run={run}", f"input={prices}", f"output={tmp_path / 'ranks.csv'}"]
    with pytest.raises(DataError, match="no prices of 2015-01-10; the nearest day is 2015-01-09"):
        zoo_cli(*start, "date=2015-01-10")
    with pytest.raises(DataError, match="no stock traded on 2015-01-06 and on 5 days up to it"):
        zoo_cli(*start, "date=2015-01-06")
    with pytest.raises(ConfigError, match="date=soon is no date"):
        zoo_cli(*start, "date=soon")
    with pytest.raises(ConfigError, match=r"suffix must be \.csv or \.parquet"):
        zoo_cli(*start, "output=ranks.txt")


# ---- data --------------------------------------------------------------------------------------------------


def test_the_simulated_market_is_written_and_described(tmp_path: Path) -> None:
    zoo_cli("data", "make", "forecasting/ranking", "--output", str(tmp_path), "--weeks", "20")
    out = zoo_cli("data", "info", str(tmp_path / "prices.csv"), "--domain", "forecasting/ranking")
    assert "100, 2015-01-05 to 2015-05-22" in out
    assert "volume" in out


def test_parts_are_apart_by_what_a_label_reaches_ahead(prices: Path) -> None:
    data = RankingData("file", prices, window=5, horizon=3)
    data.setup()
    parts = data.parts
    assert parts["val"][0] - parts["train"][-1] > 4
    assert parts["test"][0] - parts["val"][-1] > 4
    assert parts["test"][-1] == len(data.panel.dates) - 5


def test_the_scale_is_that_of_the_training_days(prices: Path, tmp_path: Path) -> None:
    data = RankingData("file", prices, window=5)
    data.setup()
    last = data.panel.dates[data.parts["train"][-1]]
    table: Any = pd.read_csv(prices)
    later = table["date"] > str(last)[:10]
    table.loc[later, "close"] *= np.random.default_rng(0).uniform(0.5, 2, later.sum())
    table.to_csv(tmp_path / "changed.csv", index=False)
    changed = RankingData("file", tmp_path / "changed.csv", window=5)
    changed.setup()
    assert changed.scale.facts() == data.scale.facts()


def test_dates_of_the_parts_can_be_chosen(prices: Path) -> None:
    data = RankingData("file", prices, window=5, val_start="2015-04-01", test_start="2015-05-01")
    data.setup()
    assert str(data.panel.dates[data.parts["val"][0]])[:10] == "2015-04-01"
    assert str(data.panel.dates[data.parts["test"][0]])[:10] == "2015-05-01"
    wrong = RankingData("file", prices, window=5, val_start="2030-01-01")
    with pytest.raises(DataError, match="leaves no day for the part 'val'"):
        wrong.setup()


def test_days_of_unequal_numbers_of_stocks_are_padded(prices: Path) -> None:
    data = RankingData("file", prices, window=5)
    data.setup()
    counts = [len(sample.label) for sample in (data.train_set[i] for i in range(data.size("train")))]
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    batch = collate([data.train_set[low], data.train_set[high]])
    assert batch.mask.sum(1).tolist() == [counts[low], counts[high]]
    assert counts[low] < counts[high]
    assert not batch.x[~batch.mask].any()
    assert batch.place[0, 1 + counts[low] :].eq(-1).all()
    torch.testing.assert_close(batch.x[1], data.train_set[high].x)


def test_ridge_finds_a_linear_premium() -> None:
    data = RankingData(market={"days": 200, "stocks": 40, "strength": 0})
    data.setup()
    signal = data.train_set.values[..., 0]  # pyright: ignore[reportAttributeAccessIssue]
    data.returns = np.where(np.isnan(data.returns), np.nan, 0.01 * signal)
    data.use(data.scale)
    scores = ridge(data)
    days, stocks = np.nonzero(~np.isnan(data.returns))
    assert np.corrcoef(scores[days, stocks], signal[days, stocks])[0, 1] > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "data.window=0"),
        ({"name": "fiel"}, "data.name=fiel"),
        ({"market": {"day": 3}}, "data.market.day.*Did you mean 'days'"),
        ({"name": "file"}, "data.path=FILE"),
        ({"test_start": "later", "market": {"days": 100, "stocks": 5}}, "data.test_start=later is no date"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RankingData(**options).setup()


def test_too_few_days_are_said_so(panel: Panel, tmp_path: Path) -> None:
    write_panel(panel, tmp_path / "prices.csv")
    data = RankingData("file", tmp_path / "prices.csv", window=119)
    with pytest.raises(DataError, match=r"at least 3 are needed\. Lower data.window"):
        data.setup()
