"""`zoo predict`"""

from __future__ import annotations

import typer
from omegaconf import DictConfig

from zoo.cli.console import console, show_config
from zoo.cli.train import Overrides, ShowConfig
from zoo.cli.trained import check_domain, without_domain
from zoo.config import compose
from zoo.errors import ConfigError

app = typer.Typer()

WEIGHTS = ("run", "checkpoint", "model")


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
    config = _config(overrides or [])
    if cfg:
        show_config(config)
        return
    from zoo.training.run import domain_for, load_trained

    model, facts = load_trained(config, "predict")
    for path in domain_for(model).load("predict")(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)


def _config(overrides: list[str]) -> DictConfig:
    """The config with the options of the domain that the weights named belong to."""
    overrides, wanted = without_domain(overrides)
    overrides = [_input_for_data(text) for text in overrides]
    named = [text for text in overrides if text.startswith(tuple(f"{name}=" for name in WEIGHTS))]
    if not named:
        try:
            return compose("predict", overrides)
        except ConfigError as error:
            raise ConfigError(
                f"{error} Options of a domain are known once run=RUN or checkpoint=FILE names weights."
            ) from None
    from zoo.training.run import domain_of

    domain = domain_of(compose("predict", named), "predict")
    check_domain(wanted, domain)
    chosen = domain or wanted
    return compose("predict", [f"predict={chosen}", *overrides] if chosen else overrides)


def _input_for_data(text: str) -> str:
    return f"input={text.removeprefix('data=')}" if text.startswith("data=") else text
