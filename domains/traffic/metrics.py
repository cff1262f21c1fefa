"""Masked errors per horizon, as tables of the field report them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.training.task import SUM_DTYPE

NAMES = ("mae", "rmse", "mape", "wape")


def valid_targets(
    target: Tensor, null_value: float | None = 0.0, mask: Tensor | None = None, min_abs: float = 0.0
) -> Tensor:
    """Where a target counts: not NaN, not `null_value`, of magnitude `min_abs` or more, True in `mask`."""
    valid = ~torch.isnan(target)
    if null_value is not None:
        valid &= target != null_value
    if min_abs > 0:
        valid &= target.abs() >= min_abs
    return valid if mask is None else valid & mask


class HorizonErrors(Metric):
    """MAE, RMSE, MAPE and WAPE of forecasts for each horizon step alone, and pooled over all.

    With valid targets y and forecasts p: MAE = mean |p-y|, RMSE = sqrt(mean (p-y)^2),
    MAPE = 100 mean |p-y|/y, WAPE = 100 sum |p-y| / sum |y|. Sums and counts are kept, so the result depends
    neither on the batch size nor on the number of processes. Where nothing counts, the error is 0.

    Args:
        horizon: number of forecast steps Q.
        null_value: the target that stands for a missing reading, None if all do count; NaN never does.
        min_abs: targets of smaller magnitude count as missing, as tables of traffic flow often have it.
    """

    full_state_update = False
    higher_is_better = False
    absolute: Tensor
    squared: Tensor
    relative: Tensor
    level: Tensor
    count: Tensor

    def __init__(
        self, horizon: int, *, null_value: float | None = 0.0, min_abs: float = 0.0, **options: Any
    ) -> None:
        super().__init__(**options)
        self.null_value, self.min_abs = null_value, min_abs
        for name in ("absolute", "squared", "relative", "level", "count"):
            self.add_state(name, torch.zeros(horizon, dtype=SUM_DTYPE), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch; all `[B, Q, N]` in original units, `mask` False where the target is missing."""
        valid = valid_targets(target, self.null_value, mask, self.min_abs)
        target = target.masked_fill(~valid, 0.0).to(SUM_DTYPE)
        error = (prediction.to(SUM_DTYPE) - target).abs().masked_fill(~valid, 0.0)
        relative = torch.where(target != 0, error / target, 0.0)
        for state, term in (
            (self.absolute, error),
            (self.squared, error.square()),
            (self.relative, relative),
            (self.level, target.abs()),
            (self.count, valid),
        ):
            state += term.sum(dim=(0, 2), dtype=SUM_DTYPE)

    def compute(self) -> dict[str, Tensor]:
        """`mae`, `rmse`, `mape`, `wape`, each `[Q]`; over all steps together as `average_mae` and so on."""
        sums = torch.stack([self.absolute, self.squared, self.relative, self.level, self.count])
        pooled = self._errors(sums.sum(dim=1))
        return self._errors(sums) | {f"average_{name}": value for name, value in pooled.items()}

    @staticmethod
    def _errors(sums: Tensor) -> dict[str, Tensor]:
        absolute, squared, relative, level, count = sums
        count = count.clamp(min=1)
        wape = torch.where(level > 0, absolute / level, 0.0)
        values = (absolute / count, (squared / count).sqrt(), 100 * relative / count, 100 * wape)
        return dict(zip(NAMES, values, strict=True))
