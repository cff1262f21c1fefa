"""What a synthetic task is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from zoo.errors import ConfigError

IGNORED = -100
"""The label of places where nothing is asked."""


@dataclass(frozen=True)
class Examples:
    """Sequences, and what is to be read at the places that ask."""

    tokens: Tensor
    """Integers `(B, N)`."""
    labels: Tensor
    """Integers `(B, N)`: the answer at the place that asks, `IGNORED` elsewhere. The rest of a row up to that
    place tells the answer, so that causal layers can learn the task as well."""


class Task:
    """A kind of sequences with a question; a subclass is a frozen dataclass of its sizes."""

    name: ClassVar[str]
    about: ClassVar[str]
    """What is asked, in a few words."""
    counts_places: ClassVar[bool] = False
    """Whether the answer depends on the number of a place, so that the model needs to be told it."""
    length: int

    @property
    def vocab(self) -> int:
        """Number of different tokens; the answers are tokens, too."""
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The score of the best guess that does not look at the tokens."""
        raise NotImplementedError

    def draw(self, count: int, generator: Generator) -> Examples:
        """So many examples; the same ones for a generator in the same state."""
        raise NotImplementedError

    def score(self, predicted: Tensor, labels: Tensor) -> float:
        """Share of the asked places that are answered right; both `(B, N)`."""
        asked = labels != IGNORED
        return float((predicted == labels)[asked].double().mean())

    def tests(self) -> Mapping[str, Task]:
        """Beside the task as it is trained, what else a model of it is tested on, by name."""
        return {}


def check(holds: bool, message: str) -> None:
    """A ConfigError where the sizes of a task make no sense."""
    if not holds:
        raise ConfigError(message)
