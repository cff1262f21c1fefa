"""`zoo convert`"""

from __future__ import annotations

import typer
from omegaconf import OmegaConf

from zoo.cli.console import show_config
from zoo.cli.train import Overrides, ShowConfig
from zoo.config import compose
from zoo.errors import ConfigError

app = typer.Typer()


@app.command()
def convert(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Convert the attention of a trained model to another kind, as near to it as can be.

    Prints the error that each layer makes, what it saves, and the test before and after; writes a run folder
    that evaluate, predict and finetune take. To close the error, fine-tune it.

    Conversions: gqa (num_kv_heads), mqa, mla (kv_rank), linear (features), lolcats (window), moh
    (shared_heads, routed_heads).

    Examples:

      zoo convert run=RUN to=gqa to.num_kv_heads=2 output=runs/gqa

      zoo convert run=RUN to=mla to.kv_rank=64 calibration.tokens=32768

      zoo convert checkpoint=model.safetensors data=metr_la data.path=metr-la.h5 to=linear

      zoo convert run=RUN to=moh to.shared_heads=2 to.routed_heads=4

      zoo finetune checkpoint=runs/gqa data=synthetic optimizer.lr=1e-3
    """
    given = overrides or []
    if chosen := [text for text in given if text.startswith(("model.", "domain="))]:
        raise ConfigError(
            f"zoo convert takes model and domain from the weights; leave out {' '.join(chosen)}."
        )
    named = [f"name={text.removeprefix('to=')}" for text in given if text.startswith("to=")]
    options = [text.removeprefix("to.") for text in given if text.startswith("to.")]
    config = compose("convert", [text for text in given if not text.startswith(("to=", "to."))])
    config.to = OmegaConf.from_dotlist([*named, *options])
    if cfg:
        show_config(config)
        return
    from zoo.training import convert

    convert.convert(config)
