"""What a run keeps beside the weights: random states, the metrics table, checkpoints, progress."""

from __future__ import annotations

import csv
import io
import math
import random
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from zoo.cli.console import console
from zoo.errors import ConfigError, ZooError, did_you_mean
from zoo.files import atomic_write


class RandomState(Callback):
    """Carries the random generators of every process over a restart; gives each process its own stream."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.saved: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"processes": gather(_generators())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict["processes"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rank = trainer.global_rank
        if rank < len(self.saved):
            _set_generators(self.saved[rank])
        elif rank > 0:
            pl.seed_everything(self.seed + rank, verbose=False)


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _generators() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generators(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class MetricsTable(Callback):
    """One row per validation (per epoch without one): epoch, step, learning rate, losses and metrics.

    The rows travel in the checkpoints, so that a resumed run ends with the file of an uninterrupted one.

    Args:
        path: the CSV file; None keeps the rows in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[dict[str, float | int]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = state_dict["rows"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._record(
                trainer,
                pl_module,
                {n: v for n, v in trainer.callback_metrics.items() if n.startswith("val/")},
            )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.rows or self.rows[-1]["step"] != trainer.global_step:
            self._record(trainer, pl_module, {})

    def _record(self, trainer: pl.Trainer, task: Any, metrics: dict[str, Any]) -> None:
        row: dict[str, float | int] = {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/loss": float(task.train_loss.compute()),
        }
        task.train_loss.reset()
        self.rows.append(row | {name: float(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics({k: row[k] for k in ("lr", "train/loss")}, step=trainer.global_step)
        if self.path and trainer.is_global_zero:
            write_rows(self.path, self.rows)


def write_rows(path: Path, rows: list[dict[str, float | int]]) -> None:
    """Write rows as CSV; the columns are those of all rows, in order of first appearance."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    table.writeheader()
    for row in rows:
        table.writerow({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()})
    with atomic_write(path, "w") as file:
        file.write(text.getvalue())


class Checkpoints(Checkpoint):
    """Writes `best.ckpt` after the best validation so far and `last.ckpt` after every epoch.

    Args:
        folder: where the files go.
        monitor: name of a validation metric.
        mode: "min" or "max".
        every_n_steps: also write `last.ckpt` every so many optimiser steps.
    """

    def __init__(
        self, folder: Path, *, monitor: str, mode: str = "min", every_n_steps: int | None = None
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"checkpointing.mode={mode}: write min or max.")
        self.folder, self.monitor, self.every_n_steps = folder, monitor, every_n_steps
        self.mode, self.sign = mode, 1 if mode == "min" else -1
        self.best = math.inf
        self.last_step = 0

    @property
    def last_path(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """The best weights, or the last where nothing was validated."""
        return self.folder / "best.ckpt" if math.isfinite(self.best) else self.last_path

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.last_step = state_dict["best"], state_dict["last_step"]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            known = [name for name in trainer.callback_metrics if name.startswith("val/")]
            raise ConfigError(
                f"There is no metric checkpointing.monitor={self.monitor}."
                f"{did_you_mean(self.monitor, known)} Metrics: {', '.join(known)}."
            )
        score = self.sign * float(trainer.callback_metrics[self.monitor])
        if score < self.best:
            self.best = score
            self._save(trainer, pl_module, self.folder / "best.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        loop, step = trainer.fit_loop, trainer.global_step
        if not self.every_n_steps or step % self.every_n_steps or step == self.last_step:
            return
        # Lightning resumes past a validation that was still to come: leave that moment to the epoch's end.
        if not loop.epoch_loop._should_check_val_fx(cast(Any, loop._data_fetcher)):
            self._save(trainer, pl_module, self.last_path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module, self.last_path)

    def _save(self, trainer: pl.Trainer, task: pl.LightningModule, path: Path) -> None:
        for name, parameter in task.named_parameters():
            if not torch.isfinite(parameter).all():
                raise ZooError(
                    f"{name} is no longer finite at step {trainer.global_step}; {path.name} was not written."
                )
        self.last_step = trainer.global_step
        trainer.save_checkpoint(path)


class StopAtStep(Callback):
    """Ends training after `max_steps` optimiser steps, with a validation and a checkpoint there.

    Stands in for Lightning's own `max_steps`, with which a run resumed after an epoch ends that epoch again.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop_if_done(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self._stop_if_done(trainer)

    def _stop_if_done(self, trainer: pl.Trainer) -> None:
        if trainer.global_step >= self.max_steps:
            trainer.should_stop = True


class Patience(EarlyStopping):
    """Lightning's early stopping, which after a restart remembers that it had stopped."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class ProgressLine(ProgressBar):
    """One bar for the whole run with the time that remains, and a line of metrics per validation."""

    def __init__(self) -> None:
        super().__init__()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[times]}"),
            TextColumn("{task.fields[loss]}"),
            console=console,
            transient=True,
        )
        self.started, self.start_step = 0.0, 0

    def disable(self) -> None:
        self.bar.disable = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.started, self.start_step = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero:
            self.disable()
        self.bar.start()
        self.task = self.bar.add_task(
            "", total=pl_module.total_steps, completed=self.start_step, times="", loss=""
        )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        done, spent = trainer.global_step - self.start_step, time.monotonic() - self.started
        left = spent / max(done, 1) * (pl_module.total_steps - trainer.global_step)
        loss = trainer.progress_bar_metrics.get("train/step_loss")
        self.bar.update(
            self.task,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            completed=trainer.global_step,
            times=f"{_clock(spent)} gone, {_clock(left)} left",
            loss="" if loss is None else f"loss {loss:.3g}",
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        table = next(c for c in cast(Any, trainer).callbacks if isinstance(c, MetricsTable))
        if trainer.is_global_zero and table.rows:
            row = table.rows[-1]
            values = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("epoch", "step"))
            spent = _clock(time.monotonic() - self.started)
            self.bar.console.print(
                f"epoch {row['epoch']}  step {row['step']}  {values}  [dim]{spent}[/]",
                highlight=False,
                soft_wrap=True,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self.bar.stop()


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
