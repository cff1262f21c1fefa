"""A run that is killed and resumed ends as the run that was left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import toy

from zoo.errors import CheckpointError, ConfigError
from zoo.training.run import resumed_config

SLOW = "model.sleep=0.01"
VARIANTS = {
    "plain": (),
    "ema": ("ema.decay=0.9", "schedule.name=constant"),
    "accumulation": ("trainer.accumulate_grad_batches=3", "checkpointing.every_n_steps=1"),
    "early stopping": (
        "early_stopping.patience=1",
        "optimizer.lr=0.3",
        "trainer.max_epochs=9",
        "schedule.name=constant",
    ),
    "max steps": ("trainer.max_steps=19",),
    "validation within the epoch": ("trainer.val_check_interval=0.5", "checkpointing.every_n_steps=3"),
    "validation every other epoch": ("trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4"),
    "loader workers": ("data.num_workers=1",),
}


def finish(function: str, log: Path, *arguments: str) -> None:
    child = toy.process(function, log, *arguments)
    child.join()
    assert child.exitcode == 0, log.read_text()


def kill_when(moment: Callable[[], bool], log: Path, run: Path, *overrides: str) -> None:
    """Train until `moment` comes, then `kill -9`."""
    child = toy.process("train", log, str(run), *overrides)
    while child.is_alive() and not moment():
        time.sleep(0.0005)
    child.kill()
    child.join()
    assert child.exitcode == -9, f"the run ended before the moment came\n{log.read_text()}"


def written(path: Path, times: int) -> Callable[[], bool]:
    """True once `path` has been replaced `times` times."""
    seen: set[int] = set()

    def moment() -> bool:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        return len(seen) >= times

    return moment


def outcome(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in ("metrics.csv", "results.json", "model.safetensors")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_and_resumed_run_ends_like_the_uninterrupted_one(variant: str, tmp_path: Path) -> None:
    overrides, log = (*VARIANTS[variant], SLOW), tmp_path / "log"
    finish("train", log, str(tmp_path / "whole"), *overrides)
    for times in (2, 9) if variant == "plain" else (5,):
        run = tmp_path / f"killed{times}"
        kill_when(written(run / "checkpoints" / "last.ckpt", times), log, run, *overrides)
        finish("resume", log, str(run))
        assert outcome(run) == outcome(tmp_path / "whole")


def test_kill_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    overrides, log = (SLOW, "checkpointing.every_n_steps=null"), tmp_path / "log"
    finish("train", log, str(tmp_path / "whole"), *overrides)
    run = tmp_path / "killed"
    kill_when(written(run / "checkpoints" / "last.ckpt", 1), log, run, *overrides)
    finish("resume", log, str(run))
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("name", ["last", "best"])
def test_kill_during_a_checkpoint_write(name: str, tmp_path: Path) -> None:
    overrides, log = ("model.ballast=3000000",), tmp_path / "log"
    finish("train", log, str(tmp_path / "whole"), *overrides)
    run = tmp_path / "killed"
    folder = run / "checkpoints"

    def writing() -> bool:
        return (folder / "last.ckpt").exists() and any(folder.glob(f".{name}.ckpt.*.part"))

    kill_when(writing, log, run, *overrides)
    assert list(folder.glob(".*.part")), "the kill came too late to interrupt the write"
    finish("resume", log, str(run))
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not list(folder.glob(".*.part"))


def test_kill_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "killed"
    finish("train", log, str(tmp_path / "whole"), SLOW)
    kill_when((run / "config.yaml").exists, log, run, SLOW)
    finish("resume", log, str(run))
    assert outcome(run) == outcome(tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing_and_can_train_longer(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    finish("train", log, str(run))
    before = outcome(run)
    finish("resume", log, str(run))
    assert outcome(run) == before
    finish("resume", log, str(run), "trainer.max_epochs=5")
    rows = (run / "metrics.csv").read_text().splitlines()
    assert rows[:4] == before["metrics.csv"].decode().splitlines()
    assert len(rows) == 6


def test_resume_refuses_what_would_change_the_past(tmp_path: Path) -> None:
    log, run = tmp_path / "log", tmp_path / "run"
    finish("train", log, str(run), "trainer.max_epochs=1")
    with pytest.raises(ConfigError, match=r"keeps its optimizer\.lr.*trainer"):
        resumed_config(run, ["optimizer.lr=1"])
    with pytest.raises(ConfigError, match=r"logger\.tensorbord.*logger\.tensorboard"):
        resumed_config(run, ["logger.tensorbord=true"])


def test_resume_of_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no run in .*config\.yaml"):
        resumed_config(tmp_path, [])
