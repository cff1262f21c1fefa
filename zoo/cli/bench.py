"""`zoo bench`: time and memory beside a plain peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from omegaconf import DictConfig

from zoo.bench.suite import SUITES, output_path, run_suite
from zoo.cli.console import console, show_config
from zoo.config import compose
from zoo.registry import Domain, get_domain

app = typer.Typer()


@app.command()
def bench(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the resolved config and stop.")] = False,
) -> None:
    """Time a model, or the primitives of attention, beside a plain layout of the same function: equal
    outputs first, then interleaved medians.

    Examples:

      zoo bench suite=primitives

      zoo bench suite=primitives only=window threads=1

      zoo bench suite=attention threads=1 quick=true

      zoo bench suite=attention threads=1 only=[multihead,linear] tasks=[mqar,cost]

      zoo bench suite=image_attention threads=1

      zoo bench domain=vision threads=1

      zoo bench domain=traffic

      zoo bench domain=traffic model=gman_paper repeats=25 curve=null output=gman.json
    """
    overrides = [_of_domain(text) for text in overrides or []]
    of_suite = any(text.startswith("suite=") for text in overrides)
    config = compose("suite" if of_suite else "bench", overrides)
    if cfg:
        show_config(config)
        return
    report = run_suite(config) if of_suite else _domain(config).load("bench")(config)
    console.print(report)
    path = output_path(config) if of_suite else Path(config.output or f"runs/bench-{config.model.name}.json")
    report.write(path)
    console.print(f"Every round and the machine: {path}", soft_wrap=True)


def _domain(config: DictConfig) -> Domain:
    return get_domain(config.domain.name, config.model.name)


def _of_domain(override: str) -> str:
    """A domain whose models are compared in a suite means that suite."""
    domain = override.removeprefix("domain=")
    return f"suite={domain}" if domain != override and domain in SUITES else override
