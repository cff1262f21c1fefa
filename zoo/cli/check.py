"""`zoo check`"""

from __future__ import annotations

import typer

from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import run_part

app = typer.Typer()


@app.command()
def check(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Measure whether a trained model keeps what its field asks for.

    Of interatomic potentials, symmetries and forces that are slopes; of super-resolution, seams of tiles.

    Exit status 2 if one that must hold does not.

    Examples:

      zoo check run=RUN

      zoo check run=RUN input=test.extxyz index=::100 output=checks.csv

      zoo check domain=atoms checkpoint=model.safetensors nve_ps=0

      zoo check run=RUN input=photo.jpg 'tile=[256,160]' output=seams.csv
    """
    run_part("check", overrides, show=cfg)
