"""`zoo explain`"""

from __future__ import annotations

import typer

from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import run_part

app = typer.Typer()


@app.command()
def explain(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Draw what the attention of a trained model looks at, with statistics of its heads.

    Examples:

      zoo explain run=RUN input=photo.jpg output=explanation

      zoo explain checkpoint=model.safetensors input=photos layer=stages.2 'query=[0.3,0.7]'

      zoo explain model=biformer_tiny checkpoint=biformer_tiny_best.pth input=photo.jpg target=281
    """
    run_part("explain", overrides, show=cfg)
