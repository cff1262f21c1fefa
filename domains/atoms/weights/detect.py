"""Which model an official file belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from domains.atoms.weights.allscaip import AllScAIPOfficial
from domains.atoms.weights.escaip import EScAIPOfficial
from domains.atoms.weights.first_version import refuse_first_version
from zoo.errors import CheckpointError
from zoo.registry import list_models, model_signature
from zoo.weights.official import OfficialLayout

FAMILIES: dict[str, Any] = {"escaip": EScAIPOfficial, "allscaip": AllScAIPOfficial}
SIZES = ("hidden_size", "num_layers")
"""What tells the models of a family apart; all the rest is read from the file."""


def detect(state: dict[str, Tensor]) -> str | None:
    """The registered model whose width and depth are those of the file.

    None where the file is of another architecture, or of sizes that no model has.

    Raises:
        CheckpointError: it is of the first version of EScAIP.
    """
    refuse_first_version(state)
    for family, layout in FAMILIES.items():
        official = layout.canonical(dict(state))
        if layout.matches(official):
            sizes = _sizes(layout, official)
            names = list_models(f"atoms/{family}_*") if sizes else []
            return next((name for name in names if _has(name, sizes)), None)
    return None


def _sizes(layout: type[OfficialLayout], state: dict[str, Tensor]) -> dict[str, Any]:
    """Nothing where a part of the architecture is missing."""
    try:
        told = layout.config(state)
    except (CheckpointError, KeyError):
        return {}
    return {name: told[name] for name in SIZES}


def _has(name: str, sizes: dict[str, Any]) -> bool:
    signature = model_signature(name)
    return all(signature[key].default == value for key, value in sizes.items())
