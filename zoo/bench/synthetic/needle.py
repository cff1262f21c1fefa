"""A passkey in filler text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from zoo.bench.synthetic.base import IGNORED, Examples, Task, check


@dataclass(frozen=True)
class Needle(Task):
    """Filler with a marked key at some depth, asked at the end (passkey of Mohtashami and Jaggi 2023).

    `filler MARK k1 .. kn filler ASK k1 .. k(n-1)`: digit i is asked at the place before it stands again, so
    that an exact match of all digits is what greedy decoding would give.

    Args:
        length: N.
        digits: n, each 0 .. 9.
        fillers: different tokens of the filler.
        depth: 0 = the key comes first, 1 = right before it is asked; None = anywhere.
        lengths, depths: of the grid that it is tested on.
    """

    name: ClassVar[str] = "needle"
    about: ClassVar[str] = "a key somewhere in filler"
    length: int = 256
    digits: int = 2
    fillers: int = 16
    depth: float | None = None
    lengths: tuple[int, ...] = (128, 256, 512, 1024)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        check(
            self.digits > 0 and self.length > 2 * self.digits,
            f"a key of {self.digits} digits does not fit twice into {self.length} tokens",
        )
        check(self.depth is None or 0 <= self.depth <= 1, f"a depth is 0 to 1, not {self.depth}")

    @property
    def vocab(self) -> int:
        return 12 + self.fillers

    @property
    def chance(self) -> float:
        return 0.1**self.digits

    @property
    def mark(self) -> int:
        return 10

    @property
    def ask(self) -> int:
        return 11

    def draw(self, count: int, generator: Generator) -> Examples:
        filler = (count, self.length)
        tokens = torch.randint(12, 12 + self.fillers, filler, generator=generator)
        key = torch.randint(10, (count, self.digits), generator=generator)
        places = self._places(count, generator) + torch.arange(self.digits + 1)
        marked = torch.cat([torch.full((count, 1), self.mark), key], dim=1)
        tokens.scatter_(1, places, marked)
        tokens[:, -self.digits] = self.ask
        if self.digits > 1:
            tokens[:, 1 - self.digits :] = key[:, :-1]
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -self.digits :] = key
        return Examples(tokens, labels)

    def _places(self, count: int, generator: Generator) -> Tensor:
        """Of the mark, `(B, 1)`."""
        last = self.length - 2 * self.digits - 1
        if self.depth is None:
            return torch.randint(last + 1, (count, 1), generator=generator)
        return torch.full((count, 1), round(self.depth * last))

    def score(self, predicted: Tensor, labels: Tensor) -> float:
        """Share of the rows whose digits are all right."""
        right = (predicted == labels) | (labels == IGNORED)
        return float(right.all(1).double().mean())

    def tests(self) -> Mapping[str, Task]:
        return {
            f"{n:,} at {depth:.2f}": dataclasses.replace(self, length=n, depth=depth)
            for n in self.lengths
            for depth in self.depths
        }
