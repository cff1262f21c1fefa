"""Recall of what stood beside a token: many pairs (MQAR), or one (induction)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from zoo.bench.synthetic.base import IGNORED, Examples, Task, check


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, Zoology, section 4): key, value pairs, then keys
    whose values are asked.

    Keys are `1 .. V/2 - 1`, distinct within a row, values `V/2 .. V - 1`. Key i is asked at place
    `2 K + 2 g`, where the gaps g are drawn without replacement with `p(g) ~ (g + 1)^(a - 1)`; the label
    stands at the key itself.

    Args:
        vocabulary: V.
        length: N.
        pairs: K.
        power: a.
        random_fill: random tokens between the questions, otherwise 0.
    """

    name: ClassVar[str] = "mqar"
    about: ClassVar[str] = "the values of many keys"
    vocabulary: int = 128
    length: int = 64
    pairs: int = 8
    power: float = 0.01
    random_fill: bool = True

    def __post_init__(self) -> None:
        check(
            self.length >= 4 * self.pairs > 0 and self.length % 2 == 0,
            f"MQAR asks {self.pairs} keys after their values in an even length of at least "
            f"{4 * self.pairs}, not {self.length}",
        )
        check(
            self.vocabulary % 2 == 0 and self.vocabulary // 2 > self.pairs,
            f"{self.pairs} distinct keys need an even vocabulary over {2 * self.pairs}, "
            f"not {self.vocabulary}",
        )

    @property
    def vocab(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 2 / self.vocabulary

    def draw(self, count: int, generator: Generator) -> Examples:
        half, asking = self.vocabulary // 2, 2 * self.pairs
        keys = torch.rand(count, half - 1, generator=generator).argsort(1)[:, : self.pairs] + 1
        values = torch.randint(half, self.vocabulary, (count, self.pairs), generator=generator)
        places = asking + 2 * torch.multinomial(
            self.gap_weights().expand(count, -1), self.pairs, generator=generator
        )
        if self.random_fill:
            tokens = torch.randint(self.vocabulary, (count, self.length), generator=generator)
        else:
            tokens = torch.zeros(count, self.length, dtype=torch.long)
        tokens[:, :asking] = torch.stack([keys, values], dim=-1).flatten(1)
        tokens.scatter_(1, places, keys)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
        return Examples(tokens, labels)

    def gap_weights(self) -> Tensor:
        """How often a gap is drawn, `(N / 2 - K,)`, up to a factor."""
        gaps = torch.arange(1, self.length // 2 - self.pairs + 1, dtype=torch.double)
        return gaps ** (self.power - 1)


def recalled(tokens: Tensor, pairs: int) -> Tensor:
    """The value of each key behind the pairs of an MQAR row, `IGNORED` at what is no key of it: `(B, N)`.

    Args:
        tokens: `(B, N)`, the first `2 * pairs` of each row key, value, key, value, ...
    """
    keys, values = tokens[:, : 2 * pairs].unflatten(1, (pairs, 2)).unbind(-1)
    same = tokens[:, :, None] == keys[:, None]
    found = torch.where(same, values[:, None], IGNORED).amax(-1)
    found[:, : 2 * pairs] = IGNORED
    return found


@dataclass(frozen=True)
class Induction(Task):
    """Induction heads (Olsson et al. 2022; as in Gu and Dao 2023, Mamba, section 4.1.2): a special token
    stands once in random ones and again at the end; asked is what followed it.

    Args:
        symbols: random tokens.
        length: N, the last special token included.
        lengths: that it is tested at.
    """

    name: ClassVar[str] = "induction"
    about: ClassVar[str] = "what followed the special token"
    symbols: int = 16
    length: int = 256
    lengths: tuple[int, ...] = (64, 256, 512, 1024, 2048, 4096)

    def __post_init__(self) -> None:
        check(self.length >= 3, f"induction needs at least 3 tokens, not {self.length}")

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    def draw(self, count: int, generator: Generator) -> Examples:
        tokens = torch.randint(self.symbols, (count, self.length), generator=generator)
        places = torch.randint(self.length - 2, (count, 1), generator=generator)
        tokens.scatter_(1, places, self.symbols)
        tokens[:, -1] = self.symbols
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -1:] = tokens.gather(1, places + 1)
        return Examples(tokens, labels)

    def tests(self) -> Mapping[str, Task]:
        return {f"{n:,}": dataclasses.replace(self, length=n) for n in self.lengths}
