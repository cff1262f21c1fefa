"""Weights for modules of mmdet, from files of any of the programs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.detection.weights.runner import ARRAYS, CORES
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.cards import list_cards, weight_card
from zoo.weights.checkpoint import read_state_dict, summarise


def read_weights(init_cfg: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors that an `init_cfg` of type `Pretrained` names.

    Its `checkpoint` is a file; a name of `zoo weights list`, which is fetched; or an address that mmengine
    knows, as `torchvision://resnet50`. With a `prefix` only what is below it is taken, and it is taken off.

    Raises:
        ConfigError: another type.
        CheckpointError: the file cannot be used, or has nothing below the prefix.
    """
    if init_cfg.get("type") != "Pretrained" or "checkpoint" not in init_cfg:
        raise ConfigError(f"init_cfg is dict(type='Pretrained', checkpoint=...), not {dict(init_cfg)}.")
    checkpoint, prefix = str(init_cfg["checkpoint"]), init_cfg.get("prefix") or ""
    if "://" in checkpoint:
        loader: Any = import_module("mmengine.runner.checkpoint").CheckpointLoader
        content: Mapping[str, Any] = loader.load_checkpoint(checkpoint, "cpu")
        state: Mapping[str, Tensor] = content.get("state_dict", content)
    elif checkpoint in list_cards():
        from zoo.weights.download import fetch

        state = read_state_dict(fetch(weight_card(checkpoint)))
    else:
        state = read_state_dict(checkpoint)
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        raise CheckpointError(
            f"{checkpoint} has no tensor below {prefix!r}; its names are {summarise(state)}."
        )
    return found


def allow_histories() -> None:
    """Let `torch.load` read the history of losses that a runner keeps, so that it can resume its own files.

    Only the classes of a history are allowed, and `getattr` only for its methods.
    """
    history: Any = import_module("mmengine.logging.history_buffer").HistoryBuffer

    def method(owner: Any, name: str) -> Any:
        if owner is not history:
            raise CheckpointError(f"A checkpoint asks for {name!r} of {owner!r}; it was not opened.")
        return getattr(history, name)

    core: Any = import_module("numpy._core.multiarray")
    names = [(getattr(core, name), f"numpy.{part}.multiarray.{name}") for part in CORES for name in ARRAYS]
    kinds = {type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")}
    torch.serialization.add_safe_globals(
        [history, (method, "builtins.getattr"), np.ndarray, np.dtype, *names, *kinds]
    )
