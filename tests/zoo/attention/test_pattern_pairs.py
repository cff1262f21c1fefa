"""`a & b` of any two patterns sees what both see, in whichever tiles it is computed."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from zoo.attention import (
    Causal,
    Dense,
    EqualGroups,
    Groups,
    Neighbours,
    OrderedGroups,
    Padding,
    Pattern,
    ShiftedGroups,
    Window,
    attend,
    backend,
)
from zoo.attention.halo import Halo, Near
from zoo.attention.layers.window import BeforeGroup, Reach
from zoo.attention.neighbourhood import Neighbourhood, ShiftedWindows
from zoo.attention.patterns import Rule

BATCH, HEADS, SHAPE, WIDTH = 2, 2, (3, 4), 4
TOKENS = SHAPE[0] * SHAPE[1]
GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.rand(BATCH, TOKENS, generator=GENERATOR) < 0.7

PATTERNS: dict[str, Pattern] = {
    "dense": Dense(),
    "causal": Causal(),
    "padding": Padding(REAL),
    "window": Window(5),
    "causal_window": Window(4, causal=True),
    "reach": Reach(2 * TOKENS - 1),
    "equal_groups": EqualGroups(4),
    "groups": Groups(torch.randint(3, (BATCH, TOKENS), generator=GENERATOR)),
    "ordered_groups": OrderedGroups(torch.randperm(TOKENS, generator=GENERATOR), 5),
    "shifted_groups": ShiftedGroups(TOKENS, 5, 2),
    "before_group": BeforeGroup(3, 1),
    "neighbours": Neighbours(torch.rand(TOKENS, TOKENS, generator=GENERATOR).argsort(-1)[:, :5]),
    "neighbourhood": Neighbourhood(SHAPE, 3, causal=(True, False)),
    "shifted_windows": ShiftedWindows(SHAPE, 2, shift=1),
    "halo": Halo(SHAPE, (2, 3), 1),
    "near": Near(SHAPE, 1),
}

PAIRS = list(product(PATTERNS, PATTERNS))


def results(pattern: Pattern) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=generator, dtype=torch.double, requires_grad=True)
        for _ in range(3)
    )
    out = attend(q, k, v, pattern=pattern)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


class Listed(Pattern):
    """The pairs of a dense mask `(B or 1, 1, N, N)`."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen.expand(BATCH, -1, TOKENS, TOKENS)

    def rule(self, nq: int, nk: int) -> Rule:
        return lambda b, h, i, j: self.seen[b, 0, i, j]


def seen(pattern: Pattern) -> Tensor:
    mask = pattern.mask(BATCH, TOKENS, TOKENS, torch.device("cpu"))
    return torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool) if mask is None else mask


@pytest.mark.parametrize("name", ["sdpa", "blocked", "reference"])
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_both_see_what_each_sees(first: str, second: str, name: str) -> None:
    pair = PATTERNS[first], PATTERNS[second]
    with backend("reference"):
        expected = results(Listed(seen(pair[0]) & seen(pair[1])))
    with backend(name):
        found = results(pair[0] & pair[1])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_three_see_what_each_sees(first: str, second: str) -> None:
    triple = PATTERNS[first], PATTERNS[second] & PATTERNS["padding"]
    with backend("reference"):
        expected = results(Listed(seen(triple[0]) & seen(triple[1])))
    torch.testing.assert_close(results(triple[0] & triple[1]), expected)
