"""Suites: jobs beside their peers with the ratio that is asked for, and costs over sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import torch
from omegaconf import DictConfig
from rich.console import RenderableType

from zoo.bench.compare import Job, compare, scaling
from zoo.bench.machine import machine
from zoo.bench.report import Report, Row
from zoo.bench.timing import Call, pinned
from zoo.devices import chosen_device
from zoo.errors import ConfigError, UnknownName, did_you_mean
from zoo.registry import load_object

SUITES = {
    "primitives": "zoo.bench.attention:SUITE",
    "attention": "zoo.bench.mechanisms:run",
    "vision": "domains.vision.bench:SUITE",
    "forecasting": "domains.forecasting.bench:SUITE",
    "superres": "domains.superres.bench:SUITE",
    "atoms": "domains.atoms.bench:SUITE",
    "detection": "domains.detection.bench:SUITE",
    "image_attention": "domains.vision.compare:run",
}
"""Each a `Suite`, or a function from the config and the device to what is shown and written."""


@dataclass(frozen=True)
class Case:
    """A job beside its peer; `build` makes the inputs when its turn comes."""

    name: str
    """What is done and at which size, e.g. "causal window of 128, N = 1,024"."""
    build: Callable[[torch.device], Job]
    target: float | None = None
    """Times faster than the peer that is asked for."""
    tolerance: float = 1e-4
    """Relative difference of the results that rounding allows."""
    items: int | None = None
    """What one call works on, such as images, for the throughput."""
    device: str | None = None
    """The kind of device that it is for; None = any."""
    rounds: int | None = None
    """At most so many rounds count on a CPU, and none goes before them, where a call takes long there."""


@dataclass(frozen=True)
class Growth:
    """Cost over sizes: `build(size, device)` gives the call that is measured."""

    name: str
    build: Callable[[int, torch.device], Call]
    sizes: tuple[int, ...] = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Suite:
    """What a module of benchmarks offers."""

    cases: tuple[Case, ...]
    growth: tuple[Growth, ...] = ()

    @classmethod
    def join(cls, suites: Iterable[Suite]) -> Suite:
        suites = tuple(suites)
        return cls(
            tuple(case for suite in suites for case in suite.cases),
            tuple(growth for suite in suites for growth in suite.growth),
        )

    def only(self, pattern: str) -> Suite:
        """Those whose name has `pattern` in it, a part or a glob.

        Raises:
            UnknownName: none.
        """

        def fits(part: Case | Growth) -> bool:
            return fnmatchcase(part.name.lower(), f"*{pattern.lower()}*")

        found = Suite(tuple(filter(fits, self.cases)), tuple(filter(fits, self.growth)))
        if not found.cases and not found.growth:
            names = [part.name for part in (*self.cases, *self.growth)]
            raise UnknownName(f"Nothing in the suite is like {pattern!r}. It has: {'; '.join(names)}.")
        return found


class Result(Protocol):
    """What a run found."""

    def write(self, path: Path) -> None: ...

    def __rich__(self) -> RenderableType: ...


def run_suite(cfg: DictConfig) -> Result:
    """Time and memory of `cfg.suite`, or of what in it is like `cfg.only`; `cfg.quick` only tries it out.

    Raises:
        ConfigError: no such suite or device.
        UnknownName: nothing in it is like `cfg.only`.
        ZooError: a job and its peer do not compute the same.
    """
    if cfg.suite not in SUITES:
        hint = did_you_mean(cfg.suite, SUITES)
        raise ConfigError(f"There is no suite {cfg.suite!r}.{hint} Suites: {', '.join(SUITES)}.")
    device = chosen_device(cfg.device, ("cpu", "cuda"))
    found: Suite | Callable[[DictConfig, torch.device], Result] = load_object(SUITES[cfg.suite])
    with pinned(cfg.threads):
        torch.manual_seed(cfg.seed)
        if not isinstance(found, Suite):
            return found(cfg, device)
        suite = found.only(cfg.only or "*")
        repeats = 1 if cfg.quick else cfg.repeats
        rows = tuple(
            dataclasses.replace(
                compared(case, repeats, device),
                name=case.name,
                target=case.target,
                items=case.items,
            )
            for case in suite.cases
            if case.device in (None, device.type)
        )
        curves = tuple(
            scaling(
                growth.name,
                lambda size, growth=growth: growth.build(size, device),
                growth.sizes[:2] if cfg.quick else growth.sizes,
                repeats=repeats,
                device=device,
            )
            for growth in suite.growth
        )
    settings = {key: cfg[key] for key in ("suite", "only", "quick", "repeats")}
    return Report(f"suite {cfg.suite}", settings, machine(device), rows, curves)


def output_path(cfg: DictConfig) -> Path:
    """Where the record of a suite is stored."""
    return Path(cfg.output or f"runs/bench-{cfg.suite}{'-quick' if cfg.quick else ''}.json")


def compared(case: Case, repeats: int, device: torch.device) -> Row:
    """The case on a device, in as many rounds as it and `repeats` allow."""
    long = case.rounds is not None and device.type == "cpu"
    return compare(
        case.build(device),
        tolerance=case.tolerance,
        repeats=min(repeats, case.rounds or repeats) if long else repeats,
        warmup=0 if long else 1,
        device=device,
    )
