"""`zoo train`, `evaluate` and `finetune` on a small file of readings."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from command_line import QUIET, zoo

from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.weights.checkpoint import load_model, read_checkpoint

SMALL = (
    "model=gman",
    "model.head_dim=2",
    "model.num_heads=2",
    "trainer.max_epochs=2",
    "data.batch_size=64",
    "plots=false",
)


def readings(path: Path, sensors: list[str], days: int = 4, seed: int = 0) -> Path:
    """Speeds every 15 minutes with a daily pattern per sensor, as a wide CSV."""
    draw = np.random.default_rng(seed)
    stamps = pd.date_range("2024-01-01", periods=96 * days, freq="15min")
    phase = np.arange(len(stamps))[:, None] * 2 * np.pi / 96 + np.arange(len(sensors))
    speed = 55 + 10 * np.sin(phase) + draw.normal(0, 2, phase.shape)
    pd.DataFrame(speed, index=pd.Index(stamps, name="timestamp"), columns=sensors).to_csv(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readings")
    readings(folder / "city.csv", list("abcdef"))
    readings(folder / "other.csv", list("ghijkl"), seed=1)
    readings(folder / "grown.csv", list("fabxyz"), seed=2)
    return folder


def small(files: Path, name: str = "city") -> tuple[str, ...]:
    return ("data=traffic_file", f"data.path={files / name}.csv", "data.history=4", "data.horizon=4")


@pytest.fixture(scope="module")
def run(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    output = zoo(
        "train",
        "domain=traffic",
        *small(files),
        *SMALL,
        *QUIET,
        f"run_dir={folder}",
        "ema.decay=0.9",
        "plots=true",
    )
    (folder / "output.txt").write_text(output)
    return folder


def test_run_folder_holds_everything(run: Path) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "metrics.csv",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model.safetensors",
    }
    assert expected | {"results.json", "environment.json"} <= names
    assert any(name.startswith("plots/") and name.endswith(".png") for name in names)


def test_table_compares_the_model_with_every_baseline(run: Path) -> None:
    output = (run / "output.txt").read_text()
    for text in (
        "gman",
        "last value",
        "time-of-day mean",
        "ridge on 4 lags",
        "15 min",
        "30 min",
        "60 min",
        "average",
    ):
        assert text in output
    assert "than the best baseline" in output


def test_exported_weights_are_the_tested_ones(run: Path, files: Path) -> None:
    output = zoo(
        "evaluate", f"run={run}", f"output={run / 'again'}", "plots=false", "trainer.accelerator=cpu"
    )
    assert "ridge on 4 lags" in output
    assert json.loads((run / "again" / "results.json").read_text()) == json.loads(
        (run / "results.json").read_text()
    )


def test_best_epoch_is_exported(run: Path) -> None:
    with open(run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == int(min(rows, key=lambda row: float(row["val/mae"]))["step"])
    state, _ = read_checkpoint(run / "model.safetensors")
    for name, value in state.items():
        torch.testing.assert_close(value, best["state_dict"][f"model.{name}"], rtol=0, atol=0)


def test_checkpoint_alone_is_evaluated_on_named_data(run: Path, files: Path, tmp_path: Path) -> None:
    zoo(
        "evaluate",
        f"checkpoint={run / 'model.safetensors'}",
        *small(files),
        f"output={tmp_path}",
        "plots=false",
    )
    own, again = (
        json.loads((folder / "results.json").read_text())["errors"]["gman"] for folder in (run, tmp_path)
    )
    assert again == own


def test_weights_of_other_sensors_are_refused(run: Path, files: Path) -> None:
    with pytest.raises(CheckpointError, match=r"belongs to other sensors.*a, b, c.*g, h, i.*zoo finetune"):
        zoo("evaluate", f"run={run}", *small(files, "other"))


def test_evaluate_without_weights_says_what_it_needs(files: Path) -> None:
    with pytest.raises(ConfigError, match=r"run=RUN or checkpoint=FILE"):
        zoo("evaluate", *small(files))


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"There is no run in .*config\.yaml"):
        zoo("evaluate", f"run={tmp_path}")


def test_cfg_prints_the_config_and_stops(files: Path, tmp_path: Path) -> None:
    output = zoo(
        "train",
        "domain=traffic",
        *small(files),
        f"run_dir={tmp_path / 'run'}",
        "trainer.max_epochs=7",
        "--cfg",
    )
    assert "max_epochs: 7" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "head", "probe"])
def test_finetune_trains_what_the_method_says(method: str, run: Path, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    zoo(
        "finetune",
        *small(files),
        f"checkpoint={run}",
        f"method={method}",
        "trainer.max_epochs=1",
        "data.batch_size=64",
        "plots=false",
        *QUIET,
        f"run_dir={folder}",
    )
    before, after = (read_checkpoint(path / "model.safetensors")[0] for path in (run, folder))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    no_gradient = {"output.1.bias"}  # batch norm follows and cancels it
    head = {name for name in after if name.startswith("output.")} - no_gradient
    assert (changed > head) if method == "full" else (changed == head)


def test_finetune_on_other_sensors_says_what_it_took_over(run: Path, files: Path, tmp_path: Path) -> None:
    output = zoo(
        "finetune",
        *small(files, "grown"),
        f"checkpoint={run}",
        "trainer.max_epochs=1",
        "plots=false",
        *QUIET,
        f"run_dir={tmp_path / 'tuned'}",
    )
    assert "3 of 6 are in the checkpoint" in output
    _, facts = load_model(tmp_path / "tuned" / "model.safetensors")
    assert facts["sensor_ids"] == list("fabxyz")


def test_finetune_freezes_by_glob(run: Path, files: Path, tmp_path: Path) -> None:
    zoo(
        "finetune",
        *small(files),
        f"checkpoint={run}",
        "trainer.max_epochs=1",
        "plots=false",
        *QUIET,
        f"run_dir={tmp_path / 'tuned'}",
        'finetune.freeze=["embedding.*"]',
        "finetune.layer_decay=0.8",
    )
    before, after = (read_checkpoint(path / "model.safetensors")[0] for path in (run, tmp_path / "tuned"))
    assert all(torch.equal(before[name], after[name]) for name in after if name.startswith("embedding."))
    assert any(not torch.equal(before[name], after[name]) for name in after)


def test_finetune_resumes(run: Path, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    zoo(
        "finetune",
        *small(files),
        f"checkpoint={run}",
        "method=head",
        "trainer.max_epochs=1",
        "plots=false",
        *QUIET,
        f"run_dir={folder}",
    )
    zoo("train", f"resume={folder}", "trainer.max_epochs=2")
    assert len((folder / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=hed", "method=hed.*'head'"),
        ('finetune.freeze=["embeding.*"]', r"no parameter matches 'embeding\.\*'"),
        ("model=stid", "takes the model from the checkpoint"),
        ("checkpoint=missing.safetensors", r"missing\.safetensors"),
    ],
)
def test_finetune_mistakes_are_named(override: str, message: str, run: Path, files: Path) -> None:
    given = [f"checkpoint={run}"] if "checkpoint" not in override else []
    with pytest.raises(ZooError, match=message):
        zoo("finetune", *small(files), *given, override)


def test_finetune_makes_the_inputs_that_the_weights_take(files: Path, tmp_path: Path) -> None:
    model = ("model=stid", "model.num_layers=1", "data.missing=mask", "data.fill=forward")
    short = ("trainer.max_epochs=1", "data.batch_size=64", "plots=false", *QUIET)
    zoo("train", "domain=traffic", *small(files), *model, *short, f"run_dir={tmp_path / 'first'}")
    zoo(
        "finetune",
        f"checkpoint={tmp_path / 'first'}",
        *small(files),
        *short,
        f"run_dir={tmp_path / 'second'}",
    )
    stored = read_checkpoint(tmp_path / "second" / "model.safetensors")[1]["extra"]["preprocessing"]
    assert (stored["missing"], stored["fill"]) == ("mask", "forward")
