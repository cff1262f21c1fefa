"""ListOps: nested operations on digits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import ClassVar

import torch
from torch import Generator

from zoo.bench.synthetic.base import IGNORED, Examples, Task, check


def _median(values: list[int]) -> int:
    """Of an even number of values, the mean of the middle two, rounded down."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}
WORDS = (*map(str, range(10)), *OPERATORS, "]", "_")
"""Digits, operators, the closing bracket and what fills a short row, by token."""
_CODES = {word: code for code, word in enumerate(WORDS)}


@dataclass(frozen=True)
class ListOps(Task):
    """Expressions such as `[MAX 4 [SM 7 5 ] 0 ]` in prefix form, whose value is asked at the last bracket
    (Nangia and Bowman 2018; as in the Long Range Arena, Tay et al. 2020, section 2.1, with `shortest=500,
    longest=2000, depth=10, arguments=10`).

    The root is an operator, with 2 to `arguments` arguments; each is with probability `nesting`, where the
    depth allows, an operator again, otherwise a digit. Expressions outside of the lengths are drawn again.
    Rows are filled up at the end.
    """

    name: ClassVar[str] = "listops"
    about: ClassVar[str] = "the value of a nested expression"
    shortest: int = 8
    longest: int = 64
    depth: int = 3
    arguments: int = 5
    nesting: float = 0.25

    def __post_init__(self) -> None:
        check(
            4 <= self.shortest <= self.longest and self.depth >= 1 and self.arguments >= 2,
            f"ListOps has {self.shortest} to {self.longest} tokens (at least 4), depth {self.depth} "
            f"(at least 1), up to {self.arguments} arguments (at least 2)",
        )
        fullest = 2 + self.arguments if self.depth == 1 else self.shortest
        check(fullest >= self.shortest, f"depth 1 has at most {fullest} tokens, not {self.shortest}")

    @property
    def length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.longest

    @property
    def vocab(self) -> int:
        return len(WORDS)

    @cached_property
    def chance(self) -> float:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the most frequent value, which is no tenth: minima are small and maxima large."""
        values = [self._expression(Random(seed))[1] for seed in range(2000)]
        return Counter(values).most_common(1)[0][1] / len(values)

    def draw(self, count: int, generator: Generator) -> Examples:
        random = Random(int(torch.randint(2**62, (), generator=generator)))
        tokens = torch.full((count, self.longest), _CODES["_"])
        labels = torch.full_like(tokens, IGNORED)
        for i in range(count):
            words, value = self._expression(random)
            tokens[i, : len(words)] = torch.tensor([_CODES[word] for word in words])
            labels[i, len(words) - 1] = value
        return Examples(tokens, labels)

    def _expression(self, random: Random) -> tuple[list[str], int]:
        """The words of one expression of an allowed length, and its value."""
        while True:
            words: list[str] = []
            value = self._operation(random, self.depth, words)
            if value is not None and len(words) >= self.shortest:
                return words, value

    def _operation(self, random: Random, depth: int, words: list[str]) -> int | None:
        """Append an operation to `words`; its value, or None where it grows too long."""
        operator = random.choice(tuple(OPERATORS))
        words.append(operator)
        values = []
        for _ in range(random.randint(2, self.arguments)):
            if depth > 1 and random.random() < self.nesting:
                value = self._operation(random, depth - 1, words)
            else:
                value = random.randrange(10)
                words.append(str(value))
            if value is None or len(words) >= self.longest:
                return None
            values.append(value)
        words.append("]")
        return OPERATORS[operator](values)
