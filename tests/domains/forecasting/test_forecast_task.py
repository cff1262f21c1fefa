"""Training, testing and fine-tuning of a tiny forecaster from the command line."""

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

from domains.forecasting.weights import load_folder, save_folder
from zoo.cli import app
from zoo.create import create_model
from zoo.weights.checkpoint import load_model

TINY = ["model.d_model=16", "model.d_kv=8", "model.d_ff=16", "model.num_heads=2", "model.num_layers=1"]
SHORT = ["data.steps=2", "data.batch_size=2", "trainer.max_epochs=2", "data.context_length=64"]
QUIET = ["trainer.enable_progress_bar=false", "logger.tensorboard=false"]


def zoo_cli(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def table(path: Path, steps: int = 150) -> Path:
    """Two series of hours that follow their covariate `price`, one step late."""
    draw = np.random.default_rng(0)
    parts = []
    for name in "ab":
        price = draw.normal(size=steps)
        target = 10 + 3 * np.concatenate([[0], price[:-1]])
        stamps = pd.date_range("2024-01-01", periods=steps, freq="h")
        parts.append(pd.DataFrame({"item_id": name, "timestamp": stamps, "target": target, "price": price}))
    pd.concat(parts).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, pre-trained for four steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    zoo_cli("train", "domain=forecasting", *TINY, *SHORT, *QUIET, f"run_dir={folder}")
    return folder


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_pre_training_is_tested_zero_shot_beside_seasonal_naive(run: Path) -> None:
    found = results(run)
    assert list(found["sets"]) == ["monthly", "quarterly", "yearly"]
    for facts in found["sets"].values():
        errors = facts["errors"]
        assert list(errors) == ["chronos2_mini", "seasonal naive", "seasonal naive, normal"]
        assert all(value is not None for values in errors.values() for value in values.values())
    assert found["leaderboards"]["WQL"]["skill_score"]["seasonal naive"] == 0
    pictures = {path.name for path in (run / "plots").glob("*.png")}
    assert {"forecast_monthly.png", "calibration.png", "skill.png", "training.png"} <= pictures
    model, facts = load_model(run / "model.safetensors")
    assert (model.context_length, facts["horizon"]) == (64, 48)


def test_two_runs_with_one_seed_are_equal(run: Path, tmp_path: Path) -> None:
    zoo_cli("train", "domain=forecasting", *TINY, *SHORT, *QUIET, f"run_dir={tmp_path}/again", "plots=false")
    one, other = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert results(run)["sets"] == results(tmp_path / "again")["sets"]


def test_a_resumed_run_reaches_the_numbers_of_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    arguments = [*TINY, *SHORT, *QUIET, f"run_dir={tmp_path}/half", "plots=false", "schedule.name=constant"]
    zoo_cli("train", "domain=forecasting", *arguments, "trainer.max_epochs=1")
    zoo_cli("train", f"resume={tmp_path}/half", "trainer.max_epochs=2")
    whole = [text.replace("half", "whole") for text in arguments]
    zoo_cli("train", "domain=forecasting", *whole)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("half", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_evaluated_on_a_table_with_rolling_windows(run: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "sales.csv")
    out = zoo_cli(
        *("evaluate", f"run={run}", "data=forecast_file", f"data.path={path}", "data.target=target"),
        *("data.known=[price]", "data.horizon=12", "data.windows=3", f"output={tmp_path}/evaluation"),
    )
    assert "sales: 6 forecasts of 12 steps, season 24" in out
    errors = results(tmp_path / "evaluation")["sets"]["sales"]["errors"]
    assert set(errors["chronos2_mini"]) >= {"MASE", "WQL", "SQL", "CRPS", "coverage"}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fine_tuning_starts_from_a_run(run: Path, tmp_path: Path, method: str) -> None:
    path = table(tmp_path / "sales.csv")
    zoo_cli(
        *("finetune", f"checkpoint={run}", "data=forecast_file", f"data.path={path}", "data.target=target"),
        *("data.known=[price]", "data.horizon=40", "data.min_past=8", *QUIET, f"method={method}"),
        *("data.steps=2", "data.batch_size=2", "trainer.max_epochs=1", f"run_dir={tmp_path}/tuned"),
        "plots=false",
    )
    model, facts = load_model(tmp_path / "tuned" / "model.safetensors")
    assert (model.context_length, model.time_encoding_scale) == (64, 64)
    assert facts["known"] == ["price"]
    before, after = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "tuned"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "encoder.block.0.layer.0.self_attention.q.weight" in changed
    assert ("encoder.block.0.layer.2.mlp.wi.weight" in changed) == (method == "full")


def test_official_weights_grow_to_what_they_are_tuned_for(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 1}
    official = create_model("chronos2_mini", context_length=32, max_output_patches=1, **sizes)
    save_folder(official, tmp_path / "official")
    path = table(tmp_path / "sales.csv")
    zoo_cli(
        *("finetune", "model=chronos2", f"checkpoint={tmp_path}/official", "data=forecast_file"),
        *(
            f"data.path={path}",
            "data.target=target",
            "data.horizon=40",
            "data.context_length=48",
            "data.min_past=8",
        ),
        *("data.steps=2", "data.batch_size=2", "trainer.max_epochs=1", f"run_dir={tmp_path}/tuned"),
        *("plots=false", *QUIET),
    )
    model, _ = load_model(tmp_path / "tuned" / "model.safetensors")
    assert (model.context_length, model.max_output_patches, model.time_encoding_scale) == (48, 3, 32)
    save_folder(model, tmp_path / "back")
    assert load_folder(tmp_path / "back").context_length == 48


def test_groups_off_forecasts_every_series_alone(run: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "sales.csv")
    common = ["evaluate", f"run={run}", "data=forecast_file", f"data.path={path}", "data.target=target"]
    common += ["data.known=[price]", "data.horizon=12", "plots=false"]
    zoo_cli(*common, f"output={tmp_path}/on")
    zoo_cli(*common, f"output={tmp_path}/off", "data.groups=false")
    zoo_cli(*common[:5], "data.horizon=12", "plots=false", f"output={tmp_path}/without")
    on, off, without = (
        results(tmp_path / name)["sets"]["sales"]["errors"]["chronos2_mini"]["WQL"]
        for name in ("on", "off", "without")
    )
    assert off == without
    assert on != off
