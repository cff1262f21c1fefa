"""`zoo explain`"""

from __future__ import annotations

import typer
from omegaconf import OmegaConf

from zoo.cli.console import console
from zoo.cli.train import Overrides, ShowConfig
from zoo.config import compose

app = typer.Typer()


@app.command()
def explain(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Draw what the attention of a trained model looks at, with statistics of its heads.

    Examples:

      zoo explain run=RUN input=photo.jpg output=explanation

      zoo explain checkpoint=model.safetensors input=photos layer=stages.2 'query=[0.3,0.7]'

      zoo explain model=biformer_tiny checkpoint=biformer_tiny_best.pth input=photo.jpg target=281
    """
    config = compose("explain", overrides or [])
    if cfg:
        console.print(OmegaConf.to_yaml(config), markup=False, highlight=False, soft_wrap=True)
        return
    from zoo.training.run import domain_for, load_trained

    model, facts = load_trained(config, "explain")
    for path in domain_for(model).load("explain")(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)
