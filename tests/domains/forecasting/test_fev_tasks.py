"""Tasks of fev: its windows, its metrics, on a tiny data set."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import zoo
from domains.forecasting.data import ForecastData
from domains.forecasting.fev_tasks import levels_of, read_tasks
from domains.forecasting.task import ForecastTask
from zoo.errors import ConfigError, DataError

fev = pytest.importorskip("fev")

SMALL = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "initializer_factor": 0.4}
TASKS = {
    "tasks": [
        {
            "dataset_path": "shops.parquet",
            "horizon": 7,
            "num_windows": 2,
            "window_step_size": 5,
            "seasonality": 7,
            "eval_metric": "SQL",
            "quantile_levels": [0.05, 0.5, 0.9],
            "target": "sales",
            "known_dynamic_columns": ["promotion", "kind"],
            "past_dynamic_columns": ["visits"],
            "task_name": "shops",
        },
        {
            "dataset_path": "shops.parquet",
            "horizon": 4,
            "max_context_length": 20,
            "eval_metric": "MASE",
            "target": ["visits", "sales"],
            "task_name": "shops",
        },
    ]
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tasks_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    parts = []
    for name, steps in (("b", 60), ("a", 45), ("c", 12)):
        parts.append(
            pd.DataFrame(
                {
                    "id": name,
                    "timestamp": pd.date_range("2024-01-01", periods=steps, freq="D"),
                    "sales": rng.normal(size=steps).cumsum() + 20,
                    "promotion": rng.integers(0, 2, steps).astype(float),
                    "kind": rng.choice(["x", "y"], steps),
                    "visits": rng.normal(size=steps),
                }
            )
        )
    pd.concat(parts).to_parquet(tmp_path / "shops.parquet")
    path = tmp_path / "tasks.yaml"
    path.write_text(yaml.safe_dump(TASKS))
    return path


def test_windows_are_those_of_fev(tasks_file: Path) -> None:
    first, second = read_tasks(tasks_file)
    assert (first.series.name, second.series.name) == ("shops", "shops_2")
    assert (first.sizes, second.sizes) == ([2, 3], [3])  # 12 steps are too few for the first window
    assert [(w.item.name, w.cut, w.item.length) for w in first.windows[:2]] == [("a", 33, 40), ("b", 48, 55)]
    assert second.series.targets == ("sales", "visits")
    assert [(w.cut, w.future.shape) for w in second.windows] == [(20, (4, 2)), (20, (4, 2)), (8, (4, 2))]
    inputs: Any = first.windows[0].inputs()
    assert {k: len(v) for k, v in inputs["past_covariates"].items()} == {
        "visits": 33,
        "promotion": 33,
        "kind": 33,
    }
    assert {k: len(v) for k, v in inputs["future_covariates"].items()} == {"promotion": 7, "kind": 7}
    assert levels_of([first, second]) == [0.05, *[i / 10 for i in range(1, 10)]]


def evaluated(tasks_file: Path) -> tuple[ForecastTask, dict[str, Any]]:
    torch.manual_seed(0)
    model: Any = zoo.create_model("chronos2", **SMALL, context_length=64)
    data = ForecastData("fev", tasks_file)
    data.setup("test")
    data.fit_to({"context_length": 64})
    task = ForecastTask(model.eval(), OmegaConf.create({}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in data.test_dataloader():
            task.test_step(batch, 0)
        return task, task.results(data)


def test_errors_are_those_that_fev_finds_of_the_official_pipeline(tasks_file: Path, tmp_path: Path) -> None:
    chronos = pytest.importorskip("chronos")
    from domains.forecasting.weights import save_folder

    task, results = evaluated(tasks_file)
    save_folder(task.model, tmp_path / "weights")  # pyright: ignore[reportArgumentType]
    official = chronos.Chronos2Pipeline.from_pretrained(str(tmp_path / "weights"), device_map="cpu")
    for own, facts in zip(read_tasks(tasks_file), results["sets"].values(), strict=True):
        made, _ = official.predict_fev(own.task)
        theirs = own.task.evaluation_summary(made, model_name="official")
        for metric, value in facts["errors"]["chronos2"].items():
            assert value == pytest.approx(theirs[metric], rel=1e-5), metric


def test_skill_and_win_rate_are_those_of_fev(tasks_file: Path) -> None:
    task, results = evaluated(tasks_file)
    theirs: Any = fev.leaderboard(results["summaries"], baseline_model="seasonal naive")
    board = results["leaderboards"]["test_error"]
    for name in ("chronos2", "seasonal naive, normal"):
        assert board["skill_score"][name] == pytest.approx(theirs.loc[name, "skill_score"], abs=1e-5)
        assert board["win_rate"][name] == pytest.approx(theirs.loc[name, "win_rate"], abs=1e-5)
    assert list(results["leaderboards"]) == ["test_error", "MASE"]  # the second task has no quantiles
    assert len(task.report(results)) == 2 + 2


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dataset_path": "nowhere.parquet"}, DataError, "task 1: there is no file nowhere.parquet"),
        ({"horizont": 3}, ConfigError, "task 1: .*horizont"),
        ({"eval_metric": "MISE"}, ConfigError, "task 1: .*MISE"),
        ({"target": "turnover"}, DataError, "task 1: .*turnover"),
        ({"horizon": 100}, DataError, "task 1: .*too short"),
    ],
)
def test_tasks_that_cannot_be_used(tasks_file: Path, changes: dict, kind: Any, message: str) -> None:
    tasks_file.write_text(yaml.safe_dump([TASKS["tasks"][0] | changes]))
    with pytest.raises(kind, match=message):
        read_tasks(tasks_file)


def test_files_that_hold_no_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file"):
        read_tasks(tmp_path / "tasks.yaml")
    (tmp_path / "tasks.yaml").write_text("tasks: 3")
    with pytest.raises(DataError, match="holds no tasks of fev"):
        read_tasks(tmp_path / "tasks.yaml")


def test_it_cannot_be_trained_on(tasks_file: Path) -> None:
    data = ForecastData("fev", tasks_file)
    data.setup("fit")
    with pytest.raises(ConfigError, match="zoo evaluate"):
        data.train_dataloader()
