"""Starting a model from the weights of another scale, as the published x3 and x4 start from x2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from zoo.cli.console import console
from zoo.create import create_model
from zoo.errors import CheckpointError
from zoo.registry import list_models
from zoo.weights.checkpoint import check_fit, load_state, read_checkpoint


def transfer(path: Path, scale: int | None) -> nn.Module:
    """The model of a checkpoint; for another scale a new up-sampler, and everything else taken over.

    Says what was loaded, and what of the up-sampler was skipped and is left at init.

    Args:
        path: a checkpoint of ours, with its config.
        scale: of the model to make; None: that of the checkpoint.

    Raises:
        CheckpointError: the file does not fit its own config.
        ConfigError: there is no such model of this scale.
    """
    state, meta = read_checkpoint(path)
    built: Any = meta["model"]
    name = f"{built['domain']}/{built['name']}"
    with torch.device("meta"):
        old: Any = create_model(name, **built["config"])
    check_fit(state, old.state_dict(), source=str(path), target=f"model {built['name']!r}")
    if scale in (None, old.scale):
        model = create_model(name, **built["config"])
        console.print(load_state(model, state, source=str(path)))
        return model
    model = create_model(_of_scale(name, scale), **(built["config"] | {"scale": scale}))
    own = model.state_dict()
    differing = [key for key in state.keys() | own.keys() if _shape(state, key) != _shape(own, key)]
    upsamplers = sorted({key.partition(".")[0] for key in differing})
    report = load_state(model, state, skip=[f"{name}.*" for name in upsamplers], source=str(path))
    if not report.loaded:
        raise CheckpointError(f"{path} shares no tensor with {_of_scale(name, scale)}.")
    console.print(f"From x{old.scale} to x{scale}: {', '.join(upsamplers)} starts anew.", highlight=False)
    console.print(report)
    return model


def rescaled(cfg: DictConfig, scale: int | None) -> DictConfig:
    """The config of a run that goes on from weights of another scale: the model as `transfer` made it."""
    if scale is None:
        return cfg
    name = _of_scale(f"superres/{cfg.model.name}", scale).rpartition("/")[2]
    return cast(DictConfig, OmegaConf.merge(cfg, {"model": {"name": name, "scale": scale}}))


def _of_scale(name: str, scale: int) -> str:
    """The same variant for another scale: `superres/catanet_x2` -> `superres/catanet_x4`."""
    other = re.sub(r"_x\d$", f"_x{scale}", name)
    return other if other.rpartition("/")[2] in list_models("superres/*") else name


def _shape(state: Any, key: str) -> torch.Size | None:
    return state[key].shape if key in state else None
