"""`zoo convert` from a run of the zoo to one that every other verb takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from command_line import zoo

from zoo.attention import AttentionError
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.checkpoint import load_model

ST_LLM = ("model.width=24", "model.num_heads=4", "model.llm_layers=2", "model.max_positions=8")
QUIET = ("plots=false", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu")
FEW = ("calibration.tokens=400", "calibration.held_out=100")


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four days of six sensors, a reading every 15 minutes."""
    path = tmp_path_factory.mktemp("readings") / "city.csv"
    draw, stamps = np.random.default_rng(0), pd.date_range("2024-01-01", periods=96 * 4, freq="15min")
    phase = np.arange(len(stamps))[:, None] * 2 * np.pi / 96 + np.arange(6)
    speed = 55 + 10 * np.sin(phase) + draw.normal(0, 2, phase.shape)
    pd.DataFrame(speed, index=pd.Index(stamps, name="timestamp"), columns=list("abcdef")).to_csv(path)
    return path


@pytest.fixture(scope="module")
def run(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "st_llm"
    zoo(
        "train",
        "domain=traffic",
        "model=st_llm",
        *ST_LLM,
        *QUIET,
        "data=traffic_file",
        f"data.path={file}",
        "data.history=4",
        "data.horizon=4",
        "data.batch_size=64",
        "trainer.max_epochs=1",
        "logger.tensorboard=false",
        f"run_dir={folder}",
    )
    return folder


@pytest.fixture(scope="module")
def latent(run: Path) -> Path:
    """The run with latent attention of low rank."""
    folder = run.parent / "mla"
    output = zoo("convert", f"run={run}", "to=mla", "to.kv_rank=6", f"output={folder}", *FEW, *QUIET)
    (folder / "output.txt").write_text(output)
    return folder


def test_prints_what_each_layer_loses_and_the_test_before_and_after(run: Path, latent: Path) -> None:
    output = (latent / "output.txt").read_text()
    found = json.loads((latent / "conversion.json").read_text())
    assert found["to"] == {"name": "mla", "kv_rank": 6}
    assert [layer["layer"] for layer in found["layers"]] == [f"gpt2.blocks.{i}.attention" for i in (0, 1)]
    for layer in found["layers"]:
        assert 0 < layer["error"] < 1
        assert f"{layer['error']:.4f}" in output
        assert f"{layer['held_out']:.4f}" in output
        assert layer["cache"] == [4 * 2 * 24, 4 * 6]
    assert "192 -> 24" in output
    errors = results(run)["errors"]["st_llm"]
    assert found["test"]["original"]["MAE"] == pytest.approx(errors["average_mae"][0], rel=1e-5)
    converted = results(latent)["errors"]["st_llm"]["average_mae"][0]
    assert found["test"]["converted"]["MAE"] == pytest.approx(converted, rel=1e-5)
    assert f"{converted:.4g}" in output
    assert not list(latent.glob("plots/*"))


def test_converted_run_is_one_for_evaluate_and_predict(latent: Path, file: Path, tmp_path: Path) -> None:
    zoo("evaluate", f"run={latent}", f"output={tmp_path / 'again'}", *QUIET[::2])
    assert results(tmp_path / "again") == results(latent)
    zoo("predict", f"run={latent}", f"input={file}", f"output={tmp_path / 'forecast.csv'}")
    assert len(pd.read_csv(tmp_path / "forecast.csv")) > 0


def test_converted_run_is_fine_tuned_and_converted_again(latent: Path, file: Path, tmp_path: Path) -> None:
    zoo(
        "finetune",
        f"checkpoint={latent}",
        "data=traffic_file",
        f"data.path={file}",
        "data.history=4",
        "data.horizon=4",
        "trainer.max_epochs=1",
        "logger.tensorboard=false",
        f"run_dir={tmp_path / 'tuned'}",
        *QUIET,
    )
    model, _ = load_model(tmp_path / "tuned" / "model.safetensors")
    assert cast(Any, model).attention["name"] == "mla"
    with pytest.raises(AttentionError, match="'mla' as it is here cannot become 'gqa'"):
        zoo("convert", f"run={tmp_path / 'tuned'}", "to=gqa", "to.num_kv_heads=2", *FEW, *QUIET)


def test_full_conversion_leaves_the_results(run: Path, tmp_path: Path) -> None:
    made = tmp_path / "moh"
    wanted = ("to=moh", "to.shared_heads=1", "to.routed_heads=3")
    zoo("convert", f"run={run}", *wanted, f"output={made}", *FEW, *QUIET)
    test = json.loads((made / "conversion.json").read_text())["test"]
    assert test["converted"] == pytest.approx(test["original"], rel=1e-4)


def test_file_of_weights_is_converted_on_given_data(run: Path, file: Path, tmp_path: Path) -> None:
    given = ("data=traffic_file", f"data.path={file}", "data.history=4", "data.horizon=4")
    weights = run / "model.safetensors"
    zoo("convert", f"checkpoint={weights}", "to=mqa", *given, f"output={tmp_path / 'mqa'}", *FEW, *QUIET)
    zoo("evaluate", f"run={tmp_path / 'mqa'}", f"output={tmp_path / 'again'}", *QUIET[::2])
    assert results(tmp_path / "again") == results(tmp_path / "mqa")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"needs to=NAME, one of gqa, linear, lolcats, mla, moh, mqa"),
        (("to=gpa",), r"no conversion to=gpa\. Did you mean.*gqa"),
        (("to=gqa", "to.num_kv_heads=3"), "do not form 3 equal groups"),
        (("to=mla", "to.rank=3"), r"'mla' has no option 'rank'.*kv_rank"),
        (("to=mqa", "argument=attn"), r"'st_llm' has no argument 'attn'.*It has: attention"),
        (("to=mqa", "model.width=3"), r"takes model and domain from the weights; leave out model\.width=3"),
        (("to=mqa", "calibration.token=3"), r"Unknown key 'calibration\.token'.*calibration\.tokens"),
        (("to=mqa", "calibration.tokens=0"), "calibration.tokens and calibration.held_out are at least 1"),
    ],
)
def test_mistakes_are_explained(run: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises((ConfigError, AttentionError), match=message):
        zoo("convert", f"run={run}", f"output={tmp_path / 'made'}", *arguments, *QUIET)
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten_or_resumed(run: Path, latent: Path) -> None:
    with pytest.raises(ConfigError, match=r"There is a run in .* already"):
        zoo("convert", f"run={run}", "to=mqa", f"output={latent}", *QUIET)
    with pytest.raises(CheckpointError, match=r"holds a converted model.*zoo finetune checkpoint="):
        zoo("train", f"resume={latent}")
