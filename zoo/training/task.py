"""The base of every domain's task: one training step, its optimiser and its bookkeeping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, cast

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric

from zoo.attention.layers import auxiliary_loss
from zoo.cli.console import console
from zoo.create import create_model
from zoo.errors import ConfigError, ZooError, did_you_mean
from zoo.registry import model_signature
from zoo.training.data import DataModule
from zoo.training.finetune import starting_point
from zoo.training.optim import build_optimizer, build_schedule

SUM_DTYPE = torch.float32 if torch.backends.mps.is_available() else torch.float64


class Mean(Metric):
    """A mean over an epoch by sums and counts, so that batches weigh by what they hold; 0 of nothing."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=SUM_DTYPE), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


class Tested(Protocol):
    """What a test leaves to report on: a tested `Task`, or judged results."""

    def results(self, data: Any) -> dict[str, Any]: ...

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]: ...

    def plots(self, data: Any, results: dict[str, Any], folder: Path) -> None: ...


class Task(pl.LightningModule):
    """Trains a model; a subclass says what its loss and its metrics are.

    A model may define `no_weight_decay() -> names`, see `build_optimizer`.

    Args:
        model: the network; parameters with `requires_grad=False` stay as they are.
        cfg: the run's config; `optimizer` and `schedule` are read, and for a layer decay that `optimizer`
            does not give `finetune.layer_decay`.
    """

    monitor: ClassVar[str] = "val/loss"
    """Metric by which the best weights are chosen where `checkpointing.monitor` is null."""
    mode: ClassVar[str] = "min"
    changes: ClassVar[tuple[str, ...]] = ()
    """Arguments of a model that fine-tuning may change; `transfer` then takes them as keywords."""

    def __init__(self, model: nn.Module, cfg: DictConfig) -> None:
        super().__init__()
        self.model, self.cfg = model, cfg
        self.train_loss, self.eval_loss = Mean(), Mean()

    @classmethod
    def build(cls, cfg: DictConfig, data: Any, model: nn.Module | None = None) -> Self:
        """The task for `data`, with `model`, or else a new one as `cfg.model` says."""
        return cls(model or new_model(cfg, data), cfg)

    @staticmethod
    def check(facts: Mapping[str, Any], data: Any, source: str) -> None:
        """Refuse with a CheckpointError to use weights stored with `facts` on data they do not belong to."""

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: Any) -> None:
        """Make the inputs of `data` like those that the weights stored with `facts` were trained on."""

    @classmethod
    def transfer(cls, path: Path, data: Any) -> nn.Module:
        """The model of a checkpoint, made for the new `data`; says what was taken over."""
        model, report = starting_point(path, data.model_kwargs())
        console.print(report)
        return model

    def loss(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        """The sum of the errors of a batch and the number of terms in it, both 0-dimensional.

        `stage` is "train", "val" or "test"; in the last two the subclass also updates its metrics.
        """
        raise NotImplementedError

    @staticmethod
    def facts_of(model: nn.Module) -> dict[str, Any]:
        """What stands for the facts of weights that carry none, as official ones."""
        return {}

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the data module that make inputs such as the weights stored with `facts` take.

        `given` are those of the config; what is returned replaces them.
        """
        return {}

    def metrics(self, stage: str) -> dict[str, Tensor]:
        """The metrics of the epoch that ends, by name, reset afterwards."""
        return {}

    def results(self, data: DataModule) -> dict[str, Any]:
        """What `results.json` holds after the test: json-able. Called on one process."""
        return {
            name: float(value) for name, value in self.trainer.callback_metrics.items() if "test/" in name
        }

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        """The few numbers of the results by which a model is compared with itself."""
        return {name: value for name, value in results.items() if isinstance(value, float)}

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        """What the terminal shows of the results."""
        table = Table("metric", "test")
        for name, value in results.items():
            table.add_row(name, f"{value:.4g}")
        return [table]

    def plots(self, data: DataModule, results: dict[str, Any], folder: Path) -> None:
        """Draw the pictures a person of the field looks at into `folder`."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        total, count = self.loss(batch, "train")
        self.train_loss.update(total, count)
        loss = self._global_mean(total, count) + auxiliary_loss(self.model)
        self.log("train/step_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.eval_loss.update(*self.loss(batch, "val"))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.eval_loss.update(*self.loss(batch, "test"))

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val")

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["train_loss"] = [
            self._summed(s.clone()) for s in (self.train_loss.total, self.train_loss.count)
        ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        share = 1.0 if self.global_rank == 0 else 0.0
        total, count = checkpoint["train_loss"]
        self.train_loss.update(total.to(self.device) * share, count.to(self.device) * share)

    def configure_optimizers(self) -> Any:
        layer_decay = OmegaConf.select(self.cfg, "finetune.layer_decay", default=1.0)
        optimizer = build_optimizer(self.model, **({"layer_decay": layer_decay} | plain(self.cfg.optimizer)))
        factor = build_schedule(
            lr=self.cfg.optimizer.lr,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            **checked("schedule", build_schedule, self.cfg.schedule),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"},
        }

    @property
    def data(self) -> DataModule:
        """The data module of the running trainer."""
        return cast(Any, self.trainer).datamodule

    @property
    def steps_per_epoch(self) -> Fraction:
        """Training samples over samples per optimiser step, not rounded."""
        return Fraction(self.data.size("train"), self.data.batch_size * self.trainer.accumulate_grad_batches)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run.

        Lightning's `estimated_stepping_batches` would make the loaders before a checkpoint can set their
        position.
        """
        trainer = cast(Any, self.trainer)
        batches = math.ceil(self.data.size("train") / self.data.batch_size)
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        by_epochs = trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
        by_steps = OmegaConf.select(self.cfg, "trainer.max_steps", default=-1)
        total = min((steps for steps in (by_epochs, by_steps) if steps > 0), default=math.inf)
        if math.isinf(total):
            raise ConfigError("Set trainer.max_epochs or trainer.max_steps, so that training ends.")
        return int(total)

    def _global_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """This process' part of the mean over the global batch.

        DDP averages the gradients of the processes, hence the factor `world_size`.
        """
        counts = torch.stack([count.to(total.dtype), (~torch.isfinite(total)).to(total.dtype)]).detach()
        everywhere, broken = self._summed(counts)
        if self._looks_now and broken > 0:
            raise ZooError(
                f"The training loss is no longer finite at step {self.global_step} "
                f"(epoch {self.current_epoch + 1}). "
                "Lower optimizer.lr, set trainer.gradient_clip_val, or look for extreme values in the data."
            )
        return total / everywhere.clamp(min=1) * self.trainer.world_size

    @property
    def _looks_now(self) -> bool:
        """Whether to look at the loss: in every step where that is free, else when Lightning logs."""
        return self.device.type == "cpu" or self.global_step % cast(Any, self.trainer).log_every_n_steps == 0

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return cast(Tensor, self.trainer.strategy.reduce(tensor, reduce_op="sum"))

    def _log_epoch(self, stage: str) -> None:
        values = {"loss": self.eval_loss.compute(), **self.metrics(stage)}
        self.eval_loss.reset()
        self.log_dict({f"{stage}/{name}": value.float() for name, value in values.items()})


def new_model(cfg: DictConfig, data: DataModule) -> nn.Module:
    """The model of `cfg.model`; what the config leaves out, or null, of what the data decide, they decide."""
    accepted = model_signature(cfg.model.name)
    given = {key: value for key, value in data.model_kwargs().items() if key in accepted}
    options = {str(key): value for key, value in cfg.model.items() if key != "name"}
    chosen: dict[str, Any] = given | {
        key: value for key, value in options.items() if value is not None or key not in given
    }
    return create_model(cfg.model.name, **chosen)


def plain(config: DictConfig) -> dict[str, Any]:
    """A config node as a dict."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))


def checked(key: str, function: Callable[..., Any], config: DictConfig) -> dict[str, Any]:
    """The config node `key` as keyword arguments of `function`; a ConfigError for a name it does not take."""
    known = inspect.signature(function).parameters
    for name in config:
        if name not in known:
            raise ConfigError(f"Unknown key {key}.{name}.{did_you_mean(str(name), known)}")
    return plain(config)
