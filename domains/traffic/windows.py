"""From rows of a series to windows of history and horizon.

Letters in shapes: B samples, P history steps, Q horizon steps, N sensors, C input channels, T rows of the
series.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from zoo.errors import ConfigError

PARTS = ("train", "val", "test")


def split_rows(
    num_rows: int, history: int, horizon: int, split: Sequence[float], windows: str
) -> dict[str, tuple[int, int]]:
    """Row ranges of the three parts; the windows of a part are all those inside its range.

    Args:
        split: shares of train, val and test, in any unit (`0.7, 0.1, 0.2` or `34, 5, 5` days).
        windows: `inside` divides the rows first, so that no window crosses a border (GMAN): train is the
            first `round(0.7 T)` rows, test the last `round(0.2 T)`. `across` divides the list of all windows
            in the same way (DCRNN, Graph WaveNet, BasicTS), so that windows look back over the border.

    Raises:
        ConfigError: not three shares, or another word for `windows`.
    """
    if len(split) != 3 or min(split) <= 0:
        raise ConfigError(
            f"data.split={list(split)}: three positive shares for train, val and test are expected."
        )
    if windows not in ("inside", "across"):
        raise ConfigError(f"data.split_windows={windows} is not one of inside, across.")
    overlap = 0 if windows == "inside" else history + horizon - 1
    count = num_rows - overlap
    train, test = round(split[0] / sum(split) * count), round(split[2] / sum(split) * count)
    borders = (0, train, count - test, count)
    return {part: (borders[i], borders[i + 1] + overlap) for i, part in enumerate(PARTS)}


def window_starts(rows: tuple[int, int], length: int, jumps: np.ndarray) -> np.ndarray:
    """First rows of the windows of `length` inside a range of rows that hold no jump of the clock."""
    starts = np.arange(rows[0], rows[1] - length + 1)
    jumps_before = np.searchsorted(jumps, [starts, starts + length - 1], side="right")
    return starts[jumps_before[0] == jumps_before[1]]


def history_counts(starts: np.ndarray, history: int, num_rows: int) -> np.ndarray:
    """`[T]`: in how many windows each row is part of the history."""
    change = (
        np.bincount(starts, minlength=num_rows + 1)
        - np.bincount(starts + history, minlength=num_rows + 1)[: num_rows + 1]
    )
    return change.cumsum()[:num_rows]


class Windows(Dataset):
    """Windows as views on the tensors of a series; a batch is one gather from each.

    Args:
        inputs: `[T, N]` or `[T, N, C]` scaled.
        targets: `[T, N]` in the units of the file, 0 where missing.
        observed: `[T, N]` True where the target is real.
        time: `[T, 2]` day of week and slot of day.
        starts: `[S]` first row of each window.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        observed: Tensor,
        time: Tensor,
        starts: Tensor,
        history: int,
        horizon: int,
    ) -> None:
        self.inputs, self.targets, self.observed, self.time, self.starts = (
            inputs,
            targets,
            observed,
            time,
            starts,
        )
        self.history, self.horizon = history, horizon
        self._steps = torch.arange(history + horizon)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        now, end = start + self.history, start + self.history + self.horizon
        return {
            "x": self.inputs[start:now],
            "y": self.targets[now:end],
            "y_mask": self.observed[now:end],
            "time": self.time[start:end],
        }

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these windows: x `[B, P, N(, C)]`, y and y_mask `[B, Q, N]`, time `[B, P+Q, 2]`."""
        rows = self.starts[torch.as_tensor(indices)][:, None] + self._steps
        past, future = rows[:, : self.history], rows[:, self.history :]
        return {
            "x": self.inputs[past],
            "y": self.targets[future],
            "y_mask": self.observed[future],
            "time": self.time[rows],
        }
