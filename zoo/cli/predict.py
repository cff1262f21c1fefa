"""`zoo predict`"""

from __future__ import annotations

from pathlib import Path

import typer
from omegaconf import OmegaConf

from zoo.cli.console import console
from zoo.cli.train import Overrides, ShowConfig
from zoo.config import compose
from zoo.errors import ConfigError

app = typer.Typer()


@app.command()
def predict(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Forecast from recent readings with trained weights; the model comes from the checkpoint alone.

    Examples:

      zoo predict run=RUN input=recent.csv output=forecast.csv

      zoo predict checkpoint=model.safetensors input=metr-la.h5 output=forecast.parquet plots=plots

      zoo predict run=RUN input=week.csv 'at=2012-03-07 08:00' plots=plots sensors=[773869,767541]
    """
    config = compose("predict", overrides or [])
    if cfg:
        console.print(OmegaConf.to_yaml(config), markup=False, highlight=False, soft_wrap=True)
        return
    if bool(config.run) == bool(config.checkpoint):
        raise ConfigError("zoo predict needs either run=RUN or checkpoint=FILE.safetensors.")
    from zoo.registry import get_domain
    from zoo.weights.checkpoint import load_model

    model, facts = load_model(_weights(config.run) if config.run else config.checkpoint)
    domain = get_domain(model.zoo_config["domain"])  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    for path in domain.load("predict")(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)


def _weights(run: str) -> Path:
    from zoo.training.run import weights_of

    return weights_of(run)
