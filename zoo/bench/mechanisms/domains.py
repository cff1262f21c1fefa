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


def _atoms(results: Mapping[str, Any]) -> float:
    return 1000 * results["mean"]["force_mae"]


def _detection(results: Mapping[str, Any]) -> float:
    return 100 * results["scores"]["group_detr_mini"]["AP50"]


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
    "atoms": DomainTask(
        "force MAE, meV/Å, lower is better",
        ("model=allscaip_mini", "data.frames=200", "trainer.max_epochs=4"),
        ("model=allscaip_mini", "data.frames=20", "trainer.max_steps=1"),
        _atoms,
    ),
    "detection": DomainTask(
        "AP50, %",
        ("data.baselines=false", "trainer.max_steps=500"),
        ("data.baselines=false", "data.count=[8,4,4]", "trainer.max_steps=1"),
        _detection,
    ),
}
"""By domain, with its default model and data; of atoms a small AllScAIP, whose attention among all atoms is
swapped, of detection the encoder's. Attention over the neighbours of an atom, and at places that queries
predict, stays: no other layer can stand for it."""
_ALWAYS = ("plots=false", "logger.tensorboard=false", "trainer.enable_progress_bar=false")


def overrides(attention: Mapping[str, Any], domain: str, *, quick: bool) -> tuple[str, ...]:
    """Of `zoo train`: with the seed, what tells one run of a comparison from another."""
    task = DOMAIN_TASKS[domain]
    given = (f"model.attention.{key}={value}" for key, value in attention.items())
    return (*given, *(task.quick if quick else task.overrides))


def swapped(name: str, attention: Mapping[str, Any], domain: str, *, quick: bool, seed: int) -> Swapped:
    """Train the default model of a domain with this attention.

    Raises:
        ZooError: the layer cannot do what the model asks of it.
    """
    from zoo.config import compose
    from zoo.training.run import train

    task, chosen = DOMAIN_TASKS[domain], overrides(attention, domain, quick=quick)
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        here = f"seed={seed}", f"run_dir={Path(folder) / 'run'}"
        run = train(compose("train", [f"domain={domain}", *chosen, *_ALWAYS, *here]))
    assert run is not None
    return Swapped(name, (seed,), domain, task.measure, chosen, (task.read(run.results),))
