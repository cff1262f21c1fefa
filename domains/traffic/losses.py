"""Training losses over forecasts, by sums and counts so that they add up over processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.traffic.metrics import valid_targets
from zoo.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Loss:
    """A mean error per target.

    Attributes:
        error: elementwise error of (prediction, target), both in original units.
        masked: leave out targets that are missing; without it, only NaN is left out, as in programs that know
            no missing readings.
        null_value: the target that stands for a missing reading; None if none does.
    """

    error: Callable[[Tensor, Tensor], Tensor]
    masked: bool
    null_value: float | None = 0.0

    def sums(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum of the errors and number of targets that count, both 0-dimensional.

        `prediction`, `target` and the optional boolean `mask` (False = missing) share one shape.
        """
        valid = valid_targets(target, self.null_value, mask) if self.masked else ~torch.isnan(target)
        error = self.error(prediction, target.masked_fill(~valid, 0.0)).masked_fill(~valid, 0.0)
        return error.sum(), valid.sum()

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean error; 0 where every target is missing."""
        total, count = self.sums(prediction, target, mask)
        return total / count.clamp(min=1)


def _absolute(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).abs()


def _squared(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square()


def _huber(delta: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda prediction, target: F.huber_loss(prediction, target, reduction="none", delta=delta)


LOSSES = ("masked_mae", "masked_mse", "masked_huber", "mae", "mse", "huber")


def build_loss(name: str, *, null_value: float | None = 0.0, delta: float = 1.0) -> Loss:
    """The loss called `name`, one of `LOSSES`; `delta` is where Huber's turns linear, in original units.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in LOSSES:
        raise ConfigError(
            f"There is no loss.name={name}.{did_you_mean(name, LOSSES)} Losses: {', '.join(LOSSES)}."
        )
    errors: dict[str, Any] = {"mae": _absolute, "mse": _squared, "huber": _huber(delta)}
    return Loss(errors[name.removeprefix("masked_")], name.startswith("masked_"), null_value)
