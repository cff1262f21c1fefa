"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights and a plain copy of the buffers.

    Validation and checkpoints see the average; training goes on with the current weights. The decay rises as
    (1 + n) / (10 + n) over the first updates n, so that a short run is not held back by its random start.

    Args:
        decay: weight of the old average in each step, below 1.
    """

    def __init__(self, decay: float = 0.999) -> None:
        self.decay = decay
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    @torch.no_grad()
    def _average(self, averages: Any, current: Any, updates: Tensor | int) -> None:
        decay = min(self.decay, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averages, current, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
