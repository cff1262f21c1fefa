"""`zoo bench`: time and memory beside a plain peer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from omegaconf import OmegaConf

from zoo.cli.console import console
from zoo.config import compose
from zoo.registry import get_domain

app = typer.Typer()


@app.command()
def bench(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    cfg: Annotated[bool, typer.Option("--cfg", help="Print the resolved config and stop.")] = False,
) -> None:
    """Time a model beside a plain layout of the same function: equal outputs first, then interleaved medians.

    Examples:

      zoo bench domain=traffic

      zoo bench domain=traffic model=gman_paper repeats=25 curve=null output=gman.json
    """
    config = compose("bench", overrides or [])
    if cfg:
        console.print(OmegaConf.to_yaml(config), highlight=False)
        return
    report = get_domain(config.domain.name).load("bench")(config)
    console.print(report)
    path = Path(config.output or f"runs/bench-{config.model.name}.json")
    report.write(path)
    console.print(f"Every round and the machine: {path}", soft_wrap=True)
