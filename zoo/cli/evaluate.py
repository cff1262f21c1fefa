"""`zoo evaluate`"""

from __future__ import annotations

import typer

from zoo.cli.console import show_config
from zoo.cli.train import Overrides, ShowConfig
from zoo.config import compose
from zoo.errors import ConfigError

app = typer.Typer()


@app.command()
def evaluate(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Test trained weights on the test part of their data, or on other data of the same sensors or classes.

    Classes are matched by name. For official weights, name the model. With results=FILE, judge what another
    program found: detections or poses in COCO's format.

    Examples:

      zoo evaluate run=runs/traffic/gman/2026-01-31_12-00-00

      zoo evaluate checkpoint=model.safetensors data=metr_la data.path=metr-la.h5

      zoo evaluate run=RUN data=imagefolder data.path=photos

      zoo evaluate model=efficientvit_m4 checkpoint=official.pth data=imagefolder data.path=imagenet/val

      zoo evaluate domain=detection results=found.json data=coco data.test=annotations.json
    """
    given = overrides or []
    judged = any(text.startswith("results=") for text in given)
    refused = ("model.",) if judged else ("model.", "domain=")
    if chosen := [text for text in given if text.startswith(refused)]:
        raise ConfigError(
            f"zoo evaluate takes model and domain from the weights; leave out {' '.join(chosen)}."
        )
    config = compose("evaluate", given)
    if cfg:
        show_config(config)
        return
    from zoo.training import run

    run.evaluate(config)
