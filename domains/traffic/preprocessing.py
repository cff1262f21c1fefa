"""From readings in the units of a file to inputs and targets.

Letters in shapes: N sensors, C input channels, T rows of the series.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from domains.traffic.series import time_features
from zoo.errors import ConfigError, DataError, did_you_mean

MISSING = ("zero", "nan", "mask")


@dataclass
class Preprocessing:
    """How readings in the units of the file become inputs and targets; stored in checkpoints.

    Attributes:
        channels: names of the input channels; the first is the target.
        missing: `zero` writes missing readings as 0, which then enters the input like any value (the
            published programs); `nan` writes the mean of the training data; `mask` does, too, and adds a last
            channel that is 1 where a reading is real.
        fill: `forward` carries the last real reading of a sensor over missing inputs; `none` does not.
        null_value: a reading of this value is missing, as NaN always is; None when every number is real.
        mean: of each input channel over the training windows, in the units of the file.
        std: its population standard deviation.
        weekdays: for each day of the week the one that stands for it, see `stand_ins`.
    """

    channels: list[str]
    missing: str = "zero"
    fill: str = "none"
    null_value: float | None = 0.0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    weekdays: list[int] = field(default_factory=lambda: list(range(7)))

    def __post_init__(self) -> None:
        for name, options in (("missing", MISSING), ("fill", ("none", "forward"))):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(
                    f"data.{name}={value} is not one of {', '.join(options)}.{did_you_mean(value, options)}"
                )

    @property
    def in_channels(self) -> int:
        """Channels of the input, the mask included."""
        return len(self.channels) + (self.missing == "mask")

    def observed(self, values: np.ndarray) -> np.ndarray:
        """True where `values` holds a real reading."""
        real = ~np.isnan(values)
        return real if self.null_value is None else real & (values != np.float32(self.null_value))

    def fit(self, values: np.ndarray, weights: np.ndarray, source: str) -> None:
        """Set mean and standard deviation of the inputs.

        Args:
            values: `[T, N, C]` in the order of `channels`.
            weights: `[T]` how many training windows hold the row in their history.

        Raises:
            DataError: there is no real reading, or all are alike.
        """
        filled = self._filled(values)
        counted = np.ones_like(filled, dtype=bool) if self.missing == "zero" else self.observed(filled)
        for c, channel in enumerate(self.channels):
            weight = weights[:, None] * counted[:, :, c]
            total = weight.sum()
            if total == 0:
                raise DataError(f"{source}: channel {channel!r} has no readings in the training part.")
            readings = np.where(counted[:, :, c], filled[:, :, c], 0).astype(np.float64)
            mean = (weight * readings).sum() / total
            std = np.sqrt((weight * np.square(readings - mean)).sum() / total)
            if std <= 1e-6 * abs(mean):
                raise DataError(
                    f"{source}: every reading of channel {channel!r} in the training part is {mean:g}, so "
                    "it cannot be scaled (standard deviation 0)."
                )
            self.mean.append(float(mean))
            self.std.append(float(std))

    def inputs(self, values: np.ndarray) -> Tensor:
        """`[T, N, C]` readings to scaled inputs: float32 `[T, N]` of one channel, else `[T, N, C]`."""
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        filled = self._filled(values)
        if self.missing != "zero":
            filled = np.where(self.observed(filled), filled, mean)
        scaled = (filled - mean) / std
        if self.missing == "mask":
            real = self.observed(values[:, :, :1]).astype(np.float32)
            scaled = np.concatenate([scaled, real], axis=2)
        return torch.from_numpy(np.ascontiguousarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled))

    def time(self, timestamps: np.ndarray, interval_minutes: int) -> Tensor:
        """`[T, 2]` int64: day of week (or the one that stands for it) and slot of the day."""
        features = time_features(timestamps, interval_minutes)
        features[:, 0] = np.asarray(self.weekdays)[features[:, 0]]
        return torch.from_numpy(features)

    def _filled(self, values: np.ndarray) -> np.ndarray:
        if self.fill == "forward":
            rows = np.arange(len(values))[:, None, None]
            last = np.maximum.accumulate(np.where(self.observed(values), rows, 0), axis=0)
            values = np.take_along_axis(values, last, axis=0)
        return np.nan_to_num(values) if self.missing == "zero" else values


def stand_ins(seen: Collection[int]) -> list[int]:
    """For each day of the week (Monday = 0) the latest `seen` one up to it, of its kind (working day or
    weekend) if there is any: what a model was never trained on would mean nothing to it."""

    def apart(day: int, other: int) -> tuple[bool, int]:
        return (day > 4) != (other > 4), (day - other) % 7

    return [min(seen, key=lambda other, day=day: apart(day, other)) for day in range(7)]
