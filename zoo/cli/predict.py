"""`zoo predict`"""

from __future__ import annotations

import typer

from zoo.cli.console import console, show_config
from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import config_for_weights

app = typer.Typer()


@app.command()
def predict(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Predict with trained weights: forecasts from recent readings, labels of images, larger pictures.

    The model comes from the weights alone; for official weights, from its name. What else may be set depends
    on its domain: add --cfg to see it.

    Examples:

      zoo predict run=RUN input=recent.csv output=forecast.csv plots=plots

      zoo predict run=RUN input=week.csv 'at=2012-03-07 08:00' sensors=[773869,767541]

      zoo predict run=RUN input=photos output=labels.csv plots=plots

      zoo predict model=chronos2 checkpoint=DIR data=sales.csv horizon=24 target=sales known=[price]

      zoo predict model=biformer_tiny checkpoint=official.pth input=photo.jpg classes=imagenet.txt

      zoo predict domain=superres model=catanet_x4 checkpoint=x4.pth input=photos output=large

      zoo predict run=RUN input=frames.extxyz output=labelled.extxyz plots=plots
    """
    config = config_for_weights("predict", [_input_for_data(text) for text in overrides or []])
    if cfg:
        show_config(config)
        return
    from zoo.training.run import domain_for, load_trained

    model, facts = load_trained(config, "predict")
    for path in domain_for(model).load("predict")(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)


def _input_for_data(text: str) -> str:
    return f"input={text.removeprefix('data=')}" if text.startswith("data=") else text
