"""Score predictors from the command line: train, resume, evaluate, fine-tune, predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from domains.forecasting.hardware.simulate import simulate_runs
from zoo.cli import app
from zoo.create import create_model
from zoo.errors import ZooError
from zoo.weights.checkpoint import load_model, save_model

TWO = ["chess score", "stream score"]
TINY = [
    *("domain=forecasting", "model=ncpp", "model.width=2", "data.machines=20", "data.folds=4"),
    "data.target=[chess score,stream score]",
]
SHORT = ["trainer.max_epochs=2", "trainer.enable_progress_bar=false", "logger.tensorboard=false"]
COLUMNS = [
    "data.numeric.memory=[memory*]",
    'data.numeric.processor=[cores,"*clock"]',
    "data.text.system_text=[architecture]",
    "data.text.workload_text=[workload,preset]",
    "data.target=score",
    "data.leave_out=machine",
]


def zoo_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def mistake(*arguments: str) -> str:
    with pytest.raises(ZooError) as error:
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    return str(error.value)


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the simulated computers."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    zoo_cli("train", *TINY, *SHORT, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row per run, as a user has it."""
    path = tmp_path_factory.mktemp("tables") / "runs.csv"
    simulate_runs(20, 3, seed=1).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def file_run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "file"
    zoo_cli(
        *("train", "domain=forecasting", "model=ncpp", "model.width=2", "data=hardware_file"),
        *(f"data.path={table}", *COLUMNS, "data.log_target=true", *SHORT, f"run_dir={folder}"),
    )
    return folder


def test_a_run_reports_every_score_beside_what_needs_no_network(run: Path) -> None:
    found = results(run)
    assert found["rows"] == {"train": 14, "val": 1, "test": 5}
    assert list(found["targets"]) == TWO
    assert list(found["all"]) == ["ncpp", "boosting", "ridge", "mean"]
    of_one = found["targets"]["chess score"]["ridge"]
    assert set(of_one) >= {
        "MAE",
        "MSE",
        "RMSE",
        "MAPE",
        "APE<3",
        "APE<5",
        "APE<10",
        "P90 APE",
        "P95 APE",
        "P99 APE",
    }
    assert (run / "plots" / "scores.png").stat().st_size > 10_000
    shown: Any = pd.read_csv(run / "plots" / "predictions.csv")
    ape = 100 * (shown["chess score by ridge"] / shown["chess score"] - 1).abs()
    assert ape.mean() == pytest.approx(of_one["MAPE"])


def test_the_checkpoint_alone_reads_tables(run: Path) -> None:
    model, facts = load_model(run / "model.safetensors")
    assert model.zoo_config["config"]["num_targets"] == 2  # pyright: ignore
    assert len(facts["encoder"]["centre"]) == sum(model.numeric.values()) == 16  # pyright: ignore


def test_two_runs_with_one_seed_are_equal_and_a_resumed_one_too(run: Path, tmp_path: Path) -> None:
    quiet = ["plots=false", "trainer.max_epochs=1"]
    zoo_cli("train", *TINY, *SHORT, *quiet, f"run_dir={tmp_path}/half")
    zoo_cli("train", f"resume={tmp_path}/half", "trainer.max_epochs=2")
    one, other = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "half"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_evaluates_to_the_same_errors(run: Path, tmp_path: Path) -> None:
    zoo_cli("evaluate", f"run={run}", f"output={tmp_path}/again")
    assert results(tmp_path / "again")["targets"] == results(run)["targets"]


def test_a_table_of_runs_is_left_out_by_machine(file_run: Path, table: Path) -> None:
    found = results(file_run)
    assert found["rows"] == {"train": 45, "val": 3, "test": 12}
    assert list(found["targets"]["score"]) == ["ncpp", "boosting", "ridge", "workload mean", "mean"]
    tested = set(pd.read_csv(file_run / "plots" / "predictions.csv")["machine"])
    assert len(tested) == 4


def test_weights_are_evaluated_on_another_table(file_run: Path, tmp_path: Path) -> None:
    simulate_runs(4, 2, seed=5).to_csv(tmp_path / "new.csv", index=False)
    out = zoo_cli(
        *("evaluate", f"run={file_run}", "data=hardware_file", f"data.test_path={tmp_path}/new.csv"),
        f"output={tmp_path}/evaluation",
    )
    assert "errors in 8 test rows" in out
    assert list(results(tmp_path / "evaluation")["targets"]["score"]) == ["ncpp"]


def test_prediction_writes_the_table_with_scores(file_run: Path, table: Path, tmp_path: Path) -> None:
    out = zoo_cli(
        "predict", f"run={file_run}", f"input={table}", f"output={tmp_path}/p.csv", f"plots={tmp_path}/plots"
    )
    assert "Errors in 60 rows" in out
    assert (tmp_path / "plots" / "scores.png").is_file()
    made = pd.read_csv(tmp_path / "p.csv")
    held = pd.read_csv(file_run / "plots" / "predictions.csv")
    both = made.merge(held, on=["machine", "workload", "preset"])
    np.testing.assert_allclose(both["predicted score"], both["score by ncpp"], rtol=1e-5)
    pd.read_csv(table).drop(columns="score").to_parquet(tmp_path / "unknown.parquet")
    zoo_cli("predict", f"run={file_run}", f"input={tmp_path}/unknown.parquet", f"output={tmp_path}/u.parquet")
    again = pd.read_parquet(tmp_path / "u.parquet")["predicted score"].astype(float)
    np.testing.assert_allclose(again, made["predicted score"], rtol=1e-5)


def test_fine_tuning_reads_new_tables_as_the_weights_do(file_run: Path, tmp_path: Path) -> None:
    simulate_runs(12, 3, seed=7).to_csv(tmp_path / "new.csv", index=False)
    zoo_cli(
        *(
            "finetune",
            f"checkpoint={file_run}",
            "data=hardware_file",
            f"data.path={tmp_path}/new.csv",
            *SHORT,
        ),
        *(f"run_dir={tmp_path}/tuned", "data.leave_out=machine", "optimizer.lr=1e-3", "plots=false"),
    )
    facts = [load_model(folder / "model.safetensors")[1] for folder in (file_run, tmp_path / "tuned")]
    assert facts[0]["encoder"] == facts[1]["encoder"]
    before, after = (load_file(folder / "model.safetensors") for folder in (file_run, tmp_path / "tuned"))
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_the_embedded_table_can_be_written_and_looked_into(tmp_path: Path) -> None:
    zoo_cli("data", "make", "forecasting/hardware", "--output", str(tmp_path))
    out = zoo_cli("data", "info", str(tmp_path / "hardware.csv"), "--domain", "forecasting/hardware")
    assert "rows 500" in out
    assert "chess score" in out


def test_the_open_sample_is_left_out_by_run(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "forecasting" / "perfcastdb"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    out = zoo_cli(
        *("train", "domain=forecasting", "model=ncpp", "data=perfcastdb", f"data.path={folder}", *SHORT),
        *("model.width=2", "trainer.max_epochs=1", "plots=false", f"run_dir={tmp_path}/run"),
    )
    assert "training rows are too few to say which method is better" in out
    assert sum(results(tmp_path / "run")["rows"].values()) == 280


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.numeric.memmory=[a]"], "data.numeric.memmory"),
        (["data.numeric.memory=[DIMM]"], "has no column 'DIMM' (data.numeric.memory)"),
        (["data.target=scores"], "has no column 'scores'. Did you mean 'score'"),
        (["data.leave_out=host"], "has no column 'host' (data.leave_out)"),
        (["data.fold=5"], "data.fold=5: there are the folds 0 to 4"),
        (["model.vocabulary=50"], "model.vocabulary=50 is less than data.vocabulary=100"),
        (["data.vocabulary=1"], "data.vocabulary=1: padding and one character"),
        (["data.scaling=zcore"], "data.scaling=zcore is not one of zscore, minmax"),
        (["data.validation=1.5"], "data.validation=1.5: a share between 0 and 1"),
        (
            ["data.numeric.system=[workload]"],
            "'workload' is in data.numeric.system and in data.text.workload_text",
        ),
        (["data.numeric.system=[machine]"], "column 'machine' holds 'm0"),
    ],
)
def test_mistakes_in_columns_and_splits(
    table: Path, arguments: list[str], message: str, tmp_path: Path
) -> None:
    given = [
        "train",
        "domain=forecasting",
        "model=ncpp",
        "data=hardware_file",
        f"data.path={table}",
        *COLUMNS,
    ]
    assert message in mistake(*given, *arguments, *SHORT, f"run_dir={tmp_path}/run")


def test_a_file_that_is_not_named(tmp_path: Path) -> None:
    given = ["train", "domain=forecasting", "model=ncpp", "data=hardware_file", f"run_dir={tmp_path}"]
    assert "needs its table: data.path=FILE" in mistake(*given)


def test_weights_without_scaling_and_tables_without_columns_are_refused(
    file_run: Path, tmp_path: Path
) -> None:
    save_model(create_model("forecasting/ncpp", width=2), tmp_path / "bare.safetensors")
    simulate_runs(2, 1).drop(columns="cores").to_csv(tmp_path / "few.csv", index=False)
    simulate_runs(2, 1).drop(columns="score").to_csv(tmp_path / "unknown.csv", index=False)
    bare = ["predict", f"checkpoint={tmp_path}/bare.safetensors", f"input={tmp_path}/few.csv"]
    assert "does not say which columns it reads" in mistake(*bare)
    from_run = ["predict", f"run={file_run}", f"output={tmp_path}/out.csv"]
    few = mistake(*from_run, f"input={tmp_path}/few.csv")
    assert "few.csv has no column 'cores', which the model reads" in few
    unknown = mistake(*from_run, f"input={tmp_path}/unknown.csv", f"plots={tmp_path}")
    assert "a picture compares with the measured scores" in unknown
    assert not (tmp_path / "out.csv").exists()
