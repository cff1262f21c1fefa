"""A failure in mid-run keeps the last good checkpoint and says how to go on."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import toy

from zoo.errors import CheckpointError, ConfigError, ZooError
from zoo.training.checkpoint_io import AtomicCheckpointIO
from zoo.training.run import train

SLOW = "model.sleep=0.06"


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.001)


def assert_can_go_on(run: Path, text: str) -> None:
    assert f"zoo train resume={run}" in text
    assert AtomicCheckpointIO().load_checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] > 0


def test_infinite_input_stops_with_its_step(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"no longer finite at step \d+ \(epoch 1\)") as caught:
        train(toy.config(tmp_path / "run", "data.poison=true"))
    assert_can_go_on(tmp_path / "run", str(caught.value))
    weights = AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")[
        "state_dict"
    ]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("key", ["max_epochs", "max_steps"])
def test_training_of_no_length_is_refused_before_the_folder_is_made(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        train(toy.config(tmp_path / "run", f"trainer.{key}=0"))
    assert not (tmp_path / "run").exists()


def test_out_of_memory_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = toy.ToyTask.training_step

    def hungry(self: toy.ToyTask, batch: object, batch_idx: int) -> torch.Tensor:
        if self.global_step == 5:
            raise torch.OutOfMemoryError("Tried to allocate 99 GiB.")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(toy.ToyTask, "training_step", hungry)
    with pytest.raises(ZooError, match=r"99 GiB.*data\.batch_size") as caught:
        train(toy.config(tmp_path / "run"))
    assert_can_go_on(tmp_path / "run", str(caught.value))


def test_interrupt_says_how_to_go_on(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    child = toy.process("train", log, run, SLOW)
    wait_for(run / "checkpoints" / "last.ckpt")
    os.kill(child.pid, signal.SIGINT)
    child.join()
    assert child.exitcode not in (0, -9)
    assert_can_go_on(run, log.read_text())


def test_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    child = toy.process("train", log, run, SLOW, "model.ballast=20000", "checkpointing.every_n_steps=4")
    wait_for(run / "checkpoints" / "last.ckpt")
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    child.join()
    assert child.exitcode == 2, log.read_text()
    assert "Cannot write" in log.read_text()
    assert_can_go_on(run, log.read_text())
    assert not list((run / "checkpoints").glob(".*"))


def test_a_second_run_does_not_overwrite_the_first(tmp_path: Path) -> None:
    train(toy.config(tmp_path, "trainer.max_epochs=1"))
    with pytest.raises(ConfigError, match="There is a run in"):
        train(toy.config(tmp_path))


def test_monitor_of_an_unknown_metric_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpointing\.monitor=val/los\. Did you mean 'val/loss'"):
        train(toy.config(tmp_path, "checkpointing.monitor=val/los"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.name=adamm", r"optimizer\.name=adamm.*'adam"),
        ("optimizer.momentun=0.9", r"optimizer\.momentun"),
        ("schedule.name=cosin", r"schedule\.name=cosin.*'cosine'"),
        ("schedule.warmup=3", r"schedule\.warmup.*'warmup_steps'"),
        ("trainer.max_epochs=-1", r"max_epochs or trainer\.max_steps"),
        ("trainer.precision=17", r"Lightning refuses the trainer settings.*17"),
    ],
)
def test_wrong_setting_is_named(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(toy.config(tmp_path / "run", override))


def test_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"last\.ckpt is not a checkpoint of the zoo, or is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_checkpoint_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "model.ckpt")
