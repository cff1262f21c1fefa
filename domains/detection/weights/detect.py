"""Which model an official file belongs to, told by the names and shapes of its tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from domains.detection.weights.group_detr import GroupDETROfficial
from domains.detection.weights.group_pose import GroupPoseOfficial
from zoo.errors import CheckpointError
from zoo.registry import list_models, model_signature

FAMILIES: dict[tuple[str, ...], Any] = {
    ("conditional_detr", "group_detr"): GroupDETROfficial,
    ("group_pose",): GroupPoseOfficial,
}
"""Beginnings of the names of models, and their layout."""
FREE = ("num_classes", "num_keypoints")
"""Sizes of what is predicted, which a file may have otherwise than the model of its name."""


def detect(state: dict[str, Tensor]) -> str | None:
    """The registered model whose sizes are those of the file; classes and keypoints may be others.

    None where the file is of another architecture, or of sizes that no model has. Dilation is not in a file:
    the plain variant is named.
    """
    for names, layout in FAMILIES.items():
        if layout.matches(layout.canonical(state)):
            return _of_sizes(names, _told(layout, state))
    return None


def _of_sizes(families: tuple[str, ...], told: dict[str, Any]) -> str | None:
    models = [name for family in families for name in list_models(f"detection/{family}_*")] if told else []
    return next((name for name in models if _has(name, told)), None)


def _told(layout: Any, state: dict[str, Tensor]) -> dict[str, Any]:
    """The constructor arguments that the file tells; nothing where a part of the architecture is missing."""
    try:
        told = layout.config(layout.canonical(state))
    except (CheckpointError, KeyError):
        return {}
    return {key: value for key, value in told.items() if key not in FREE}


def _has(name: str, told: dict[str, Any]) -> bool:
    """Whether a model has these arguments by default."""
    defaults = {key: parameter.default for key, parameter in model_signature(name).items()}
    return all(defaults.get(key) == value for key, value in told.items())
