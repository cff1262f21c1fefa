"""One task of each domain with its attention swapped: `zoo train`, short and the same for every layer."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from zoo.bench.mechanisms.record import Swapped


@dataclass(frozen=True)
class DomainTask:
    """What is trained, and how it is judged."""

    measure: str
    overrides: tuple[str, ...]
    """Of `zoo train`, beside the attention."""
    quick: tuple[str, ...]
    """To see that it runs."""
    read: Callable[[Mapping[str, Any]], float]
    """From the results of the run."""


def _traffic(results: Mapping[str, Any]) -> float:
    return fmean(results["errors"]["gman"]["mae"])


def _forecasting(results: Mapping[str, Any]) -> float:
    return 100 * results["leaderboards"]["WQL"]["skill_score"]["chronos2_mini"]


def _vision(results: Mapping[str, Any]) -> float:
    return 100 * results["accuracy"]["biformer_digits"]


def _superres(results: Mapping[str, Any]) -> float:
    return results["mean"]["model"]["psnr_y"]


DOMAIN_TASKS = {
    "traffic": DomainTask(
        "MAE, lower is better",
        ("data.weeks=1", "trainer.max_steps=150"),
        ("data.weeks=1", "trainer.max_steps=1", "trainer.limit_test_batches=2"),
        _traffic,
    ),
    "forecasting": DomainTask(
        "WQL skill, %",
        ("trainer.max_epochs=2",),
        ("trainer.max_steps=1", "data.windows=1"),
        _forecasting,
    ),
    "vision": DomainTask(
        "top-1, %",
        ("trainer.max_epochs=4", "data.baselines=false"),
        ("trainer.max_steps=1", "data.baselines=false"),
        _vision,
    ),
    "superres": DomainTask(
        "PSNR, dB",
        ("trainer.max_epochs=1",),
        ("trainer.max_steps=1",),
        _superres,
    ),
}
"""By domain, with its default model and data. Atoms and detection have attentions of their own, which no
other layer can stand for: over the neighbours of atoms, and at places that queries predict."""
_ALWAYS = ("plots=false", "logger.tensorboard=false", "trainer.enable_progress_bar=false")


def swapped(name: str, attention: Mapping[str, Any], domain: str, *, quick: bool, seed: int) -> Swapped:
    """Train the default model of a domain with this attention.

    Raises:
        ZooError: the layer cannot do what the model asks of it.
    """
    from zoo.config import compose
    from zoo.training.run import train

    task = DOMAIN_TASKS[domain]
    given = [f"model.attention.{key}={value}" for key, value in attention.items()]
    chosen = (*given, *(task.quick if quick else task.overrides), f"seed={seed}")
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        run_dir = f"run_dir={Path(folder) / 'run'}"
        run = train(compose("train", [f"domain={domain}", *chosen, *_ALWAYS, run_dir]))
    assert run is not None
    return Swapped(name, domain, task.measure, task.read(run.results), chosen)
