"""The device that a setting names."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zoo.errors import ConfigError


def chosen_device(name: str, kinds: Sequence[str] = ("cpu", "cuda", "mps")) -> torch.device:
    """A device of one of these kinds, also one of several (`cuda:1`); `auto`: a GPU where there is one.

    Raises:
        ConfigError: another name, or no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = str(name).partition(":")[0]
    try:
        device = torch.device(name) if kind in kinds else None
    except RuntimeError:
        device = None
    if device is None:
        raise ConfigError(f"device={name} is not known. Options: auto, {', '.join(kinds)}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but torch finds no GPU here. Options: auto, cpu.")
    return device
