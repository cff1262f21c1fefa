"""`zoo train`"""

from __future__ import annotations

from typing import Annotated

import typer

from zoo.cli.console import show_config
from zoo.config import compose

app = typer.Typer()

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, group=option (Hydra's grammar)")]
ShowConfig = Annotated[bool, typer.Option("--cfg", help="Print the resolved config and stop.")]


@app.command()
def train(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Train a model, test it against simple baselines, and keep everything in a run folder.

    Examples:

      zoo train domain=traffic

      zoo train domain=traffic model=st_llm data=metr_la data.path=metr-la.h5 trainer.max_epochs=20

      zoo train domain=vision

      zoo train domain=superres

      zoo train domain=vision model=efficientvit_m0 data=imagefolder data.path=photos aug=imagenet

      zoo train domain=traffic trainer.devices=2 trainer.strategy=ddp ema.decay=0.999

      zoo train resume=runs/traffic/gman/2026-01-31_12-00-00 trainer.max_epochs=40
    """
    given = overrides or []
    run = next((text.removeprefix("resume=") for text in given if text.startswith("resume=")), "null")
    if run == "null":
        config = compose("train", given)
    else:
        from zoo.training.run import resumed_config

        config = resumed_config(run, [text for text in given if not text.startswith("resume=")])
    if cfg:
        show_config(config)
        return
    from zoo.training import run as runs

    runs.train(config)
