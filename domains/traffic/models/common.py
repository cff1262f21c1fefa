"""What several traffic models do with their input."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from zoo.errors import DataError


class Forecaster(Protocol):
    num_nodes: int
    history: int
    horizon: int


def check_window(model: Forecaster, x: Tensor, time: Tensor) -> None:
    """See that readings `[B, P, N, C]` and times `[B, P+Q, 2]` have the sizes the model was built for.

    Raises:
        DataError: they do not.
    """
    steps = model.history + model.horizon
    if x.shape[1:3] != (model.history, model.num_nodes) or time.shape[1:] != (steps, 2):
        raise DataError(
            f"{type(model).__name__} was built for {model.history} + {model.horizon} steps of "
            f"{model.num_nodes} sensors; got readings {list(x.shape[:3])} and times {list(time.shape)}."
        )


def features_of_time(time: Tensor, steps_per_day: int) -> Tensor:
    """int64 `[..., 2]` (weekday, slot) to float32 (fraction of the day, day of the week)."""
    weekday, slot = time.unbind(-1)
    return torch.stack([slot / steps_per_day, weekday.float()], -1)
