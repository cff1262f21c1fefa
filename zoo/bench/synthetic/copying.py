"""Selective copying."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from zoo.bench.synthetic.base import IGNORED, Examples, Task, check


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """Data tokens at random places among noise, then as many markers, at which the data are asked in order
    (Gu and Dao 2023, Mamba, section 4.1.1).

    Args:
        symbols: different data tokens.
        context: places of data and noise.
        data: how many hold data.
    """

    name: ClassVar[str] = "selective_copy"
    about: ClassVar[str] = "tokens scattered in noise, in order"
    counts_places: ClassVar[bool] = True
    symbols: int = 16
    context: int = 256
    data: int = 16

    def __post_init__(self) -> None:
        check(
            0 < self.data <= self.context,
            f"{self.data} data tokens do not fit into {self.context} places",
        )

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.context + self.data

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, count: int, generator: Generator) -> Examples:
        noise, marker = self.symbols, self.symbols + 1
        order = torch.rand(count, self.context, generator=generator).argsort(1)
        places = order[:, : self.data].sort(1).values
        data = torch.randint(self.symbols, (count, self.data), generator=generator)
        tokens = torch.full((count, self.length), noise).scatter_(1, places, data)
        tokens[:, self.context :] = marker
        labels = torch.full_like(tokens, IGNORED)
        labels[:, self.context :] = data
        return Examples(tokens, labels)
