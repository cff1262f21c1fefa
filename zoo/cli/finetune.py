"""`zoo finetune`"""

from __future__ import annotations

import typer
from omegaconf import OmegaConf

from zoo.cli.console import show_config
from zoo.cli.train import Overrides, ShowConfig
from zoo.config import compose

app = typer.Typer()


@app.command()
def finetune(overrides: Overrides = None, cfg: ShowConfig = False) -> None:
    """Train further from weights of the zoo or of an official program, on the same or on other data.

    Methods: full, head (the output layers alone), probe (fresh output layers on frozen features;
    probe=linear, or probe=attentive: learned queries over the tokens), lora (low-rank updates of linear
    layers and of 1 x 1 convolutions; needs the extra "llm").

    Examples:

      zoo finetune checkpoint=runs/traffic/gman/2026-01-31_12-00-00 data=metr_la data.path=metr-la.h5

      zoo finetune checkpoint=model.safetensors data=simulated method=head optimizer.lr=1e-4

      zoo finetune model=biformer_tiny checkpoint=biformer_tiny_best.pth data=imagefolder data.path=photos

      zoo finetune checkpoint=RUN data=imagefolder data.path=photos method=probe probe=attentive

      zoo finetune domain=atoms checkpoint=RUN model.forces=conservative

      zoo finetune checkpoint=RUN data=simulated finetune.layer_decay=0.8 'finetune.freeze=["embedding.*"]'
    """
    given = overrides or []
    changed = [text.removeprefix("model.") for text in given if text.startswith("model.")]
    given = [text for text in given if not text.startswith("model.")]
    named = [text.removeprefix("model=") for text in given if text.startswith("model=")]
    config = compose("finetune", [text for text in given if not text.startswith("model=")])
    config.finetune.model = named[-1] if named else None
    config.finetune.changes = OmegaConf.from_dotlist(changed)
    if cfg:
        show_config(config)
        return
    from zoo.training import run

    run.finetune(config)
