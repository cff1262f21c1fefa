"""`zoo relax`"""

from __future__ import annotations

import typer

from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import run_part

app = typer.Typer()


@app.command()
def relax(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Move the atoms of structures, and their cells if asked for, to where the forces vanish.

    Exit status 2 if a structure did not get there in the steps allowed.

    Examples:

      zoo relax run=RUN input=POSCAR

      zoo relax run=RUN input=candidates.extxyz fmax=0.01 steps=1000 output=relaxed

      zoo relax checkpoint=model.safetensors input=crystal.cif cell=free pressure=5
    """
    run_part("relax", overrides, show=cfg)
