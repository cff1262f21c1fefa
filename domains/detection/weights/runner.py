"""Checkpoints that a runner of mmengine writes in training, read without mmengine.

Beside the weights they hold a history of losses as pickled objects. These become empty objects here; nothing
that a file names is imported or called. Those of a `ZooDetector` also tell how its model is built, so that
they are checkpoints of the zoo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.detection.weights.openmmlab import facts_of
from zoo.weights.formats import HISTORY, TOLD, load_torch, unwrapped

INSIDE = "model."
"""What a `ZooDetector` puts before the names of its model."""


class Nothing:
    """Stands for any object that is not wanted."""

    def __new__(cls, *_: Any, **__: Any) -> Nothing:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        """Its content is not wanted either."""


CORES, ARRAYS = ("core", "_core"), ("_reconstruct", "scalar")
"""Where numpy has, or had, what makes its arrays and numbers."""
STAND_INS: dict[str, Any] = dict.fromkeys(
    (
        HISTORY,
        "builtins.getattr",
        "numpy.ndarray",
        "numpy.dtype",
        *(f"numpy.{core}.multiarray.{name}" for core in CORES for name in ARRAYS),
    ),
    Nothing,
)
"""Everything that a file may name beside tensors and plain values."""


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights, and what is told beside them, as `zoo.weights.formats.unwrapped` gives it.

    Raises:
        CheckpointError: the file names anything else than such a file needs, or is damaged.
    """
    path = Path(path)
    return unwrapped(load_torch(path, STAND_INS), path)


def telling(built: Mapping[str, Any]) -> Tensor:
    """How a model is built, as a tensor that is kept with the weights: JSON, uint8."""
    return torch.tensor(list(json.dumps({"format": 1, "model": dict(built)}).encode()), dtype=torch.uint8)


def told(
    state: Mapping[str, Tensor], classes: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a `ZooDetector` under the names of its model, and the metadata of a checkpoint of ours.

    Args:
        classes: their names, where the file tells them.
    """
    meta = json.loads(bytes(state[TOLD].tolist()))
    meta["extra"] = facts_of(classes) if classes else {}
    own = {name.removeprefix(INSIDE): value for name, value in state.items() if name.startswith(INSIDE)}
    return own, {"zoo": json.dumps(meta)}
