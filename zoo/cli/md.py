"""`zoo md`"""

from __future__ import annotations

import typer

from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import run_part

app = typer.Typer()


@app.command()
def md(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Molecular dynamics: how atoms move at a temperature, with a trajectory, a log and a picture of it.

    Examples:

      zoo md run=RUN input=molecule.xyz temperature=300 timestep=0.5 steps=2000

      zoo md run=RUN input=POSCAR ensemble=nvt temperature=1200 steps=20000 every=50 output=melt

      zoo md run=RUN input=melt/final.extxyz velocities=keep ensemble=npt temperature=1200 pressure=1
    """
    run_part("md", overrides, show=cfg)
