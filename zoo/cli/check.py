"""`zoo check`"""

from __future__ import annotations

import typer

from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import run_part

app = typer.Typer()


@app.command()
def check(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Measure whether a trained model keeps the laws of its field, as symmetries, and forces that are slopes.

    Exit status 2 if one that must hold does not.

    Examples:

      zoo check run=RUN

      zoo check run=RUN input=test.extxyz index=::100 output=checks.csv

      zoo check domain=atoms checkpoint=model.safetensors nve_ps=0
    """
    run_part("check", overrides, show=cfg)
