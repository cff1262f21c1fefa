"""A domain of a few hundred numbers: regression with missing targets."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from zoo.create import create_model
from zoo.errors import ZooError
from zoo.layers.norm import BatchNorm
from zoo.registry import Domain, register_domain, register_model
from zoo.training.data import DataModule
from zoo.training.run import resumed_config, train
from zoo.training.task import Task


class ToyData(DataModule):
    """`size` samples x `[8]`, y `[3]`, a third of the targets NaN."""

    def __init__(self, size: int = 60, poison: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.length, self.poison = size, poison

    def setup(self, stage: str | None = None) -> None:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(self.length, 8, generator=draw)
        y = torch.tanh(x @ torch.randn(8, 3, generator=draw)) + 0.1 * torch.randn(
            self.length, 3, generator=draw
        )
        y[torch.rand(y.shape, generator=draw) < 1 / 3] = torch.nan
        if self.poison:
            x[self.length // 2] = torch.inf
        self.train_set, self.val_set, self.test_set = (TensorDataset(x, y) for _ in range(3))


class ToyModel(nn.Module):
    """Linear, batch norm, dropout, linear; slow on request."""

    def __init__(self, width: int = 16, dropout: float = 0.2, sleep: float = 0.0, ballast: int = 0) -> None:
        super().__init__()
        self.sleep = sleep
        self.register_buffer("ballast", torch.zeros(ballast))
        self.stem = nn.Linear(8, width)
        self.norm = BatchNorm(width)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.sleep)
        return self.head(self.drop(torch.relu(self.norm(self.stem(x)))))


class ToyTask(Task):
    def loss(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        x, y = batch
        known = ~torch.isnan(y)
        return (self.model(x) - y.nan_to_num()).abs()[known].sum(), known.sum()


@register_model(
    model=ToyModel,
    summary="toy",
    paper="none",
    licence="Apache-2.0",
    source="none",
    status="re-implementation",
)
def toy(**kwargs: Any) -> ToyModel:
    return ToyModel(**kwargs)


register_domain(
    Domain(
        name=__name__.partition(".")[0], summary="toy", task=f"{__name__}:ToyTask", data=f"{__name__}:ToyData"
    )
)


def config(run_dir: Any, *overrides: str) -> Any:
    """A run of three epochs of eight steps."""
    cfg = OmegaConf.create(
        {
            "seed": 0,
            "run_dir": str(run_dir),
            "resume": None,
            "compile": False,
            "plots": True,
            "domain": {"name": __name__.partition(".")[0]},
            "model": {"name": "toy"},
            "data": {"batch_size": 8},
            "optimizer": {"name": "adamw", "lr": 1e-2, "weight_decay": 1e-2},
            "schedule": {"name": "cosine", "warmup_steps": 3},
            "ema": None,
            "loss": {},
            "checkpointing": {"monitor": "val/loss", "mode": "min", "every_n_steps": 1},
            "early_stopping": None,
            "trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
            "logger": {"csv": True, "tensorboard": False},
        }
    )
    return OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))


def model(**kwargs: Any) -> nn.Module:
    return create_model("toy", **kwargs)


def process(function: str, log: Path, *arguments: object, env: dict[str, str] | None = None) -> Any:
    """A started process that trains (`train`) or resumes (`resume`) a run: its folder, then overrides.

    Forked from one that has imported everything; exits with 2 after a ZooError.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toy"])
    child = context.Process(target=_here, args=(function, str(log), env or {}, *map(str, arguments)))
    child.start()
    return child


def _here(function: str, log: str, env: dict[str, str], *arguments: str) -> None:
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    try:
        train(
            config(*arguments) if function == "train" else resumed_config(arguments[0], list(arguments[1:]))
        )
    except ZooError as error:
        print(error, flush=True)
        os._exit(2)
