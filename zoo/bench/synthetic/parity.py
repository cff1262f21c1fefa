"""Parity: the smallest state that has to be tracked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator

from zoo.bench.synthetic.base import IGNORED, Examples, Task


@dataclass(frozen=True)
class Parity(Task):
    """Bits; at each place, whether the number of ones so far is odd (as in Grazzi et al. 2024, section 5.1).

    Args:
        length: N.
        lengths: that it is tested at; asked there are only the places beyond the trained length, if any.
        first: the first place that is asked.
    """

    name: ClassVar[str] = "parity"
    about: ClassVar[str] = "whether the ones so far are odd"
    length: int = 40
    lengths: tuple[int, ...] = (40, 80, 160, 256)
    first: int = 0

    @property
    def vocab(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 0.5

    def draw(self, count: int, generator: Generator) -> Examples:
        tokens = torch.randint(2, (count, self.length), generator=generator)
        labels = tokens.cumsum(1) % 2
        labels[:, : self.first] = IGNORED
        return Examples(tokens, labels)

    def tests(self) -> Mapping[str, Task]:
        return {
            f"{n:,}": dataclasses.replace(self, length=n, first=self.length if n > self.length else 0)
            for n in self.lengths
        }
