"""Which model an official file belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from domains.superres.weights.catanet import CATANetOfficial
from domains.superres.weights.dlgsanet import DLGSANetOfficial
from zoo.errors import CheckpointError
from zoo.registry import list_models, model_signature
from zoo.weights.official import OfficialLayout

FAMILIES: dict[str, Any] = {"catanet": CATANetOfficial, "dlgsanet": DLGSANetOfficial}


def detect(state: dict[str, Tensor]) -> str | None:
    """The registered model whose widths, depth and scale are those of the file.

    None where the file is of another architecture, or of sizes that no model has.
    """
    for family, layout in FAMILIES.items():
        if layout.matches(state):
            told = _told(layout, state)
            names = list_models(f"superres/{family}_*") if told else []
            return next((name for name in names if _has(name, told)), None)
    return None


def _told(layout: type[OfficialLayout], state: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that the file tells; nothing where a part of the architecture is missing."""
    try:
        return layout.config(layout.canonical(state))
    except (CheckpointError, KeyError):
        return {}


def _has(name: str, told: dict[str, Any]) -> bool:
    """Whether a model has these arguments by default."""
    defaults = {key: parameter.default for key, parameter in model_signature(name).items()}
    return all(_plain(defaults.get(key)) == _plain(value) for key, value in told.items())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
