"""How scores become weights."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo.attention import TopKSoftmax, softmax

SCORE = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 3.0])
ROW = st.lists(SCORE, min_size=1, max_size=12)


@given(row=ROW)
def test_softmax_equals_its_formula(row: list[float]) -> None:
    weights, lse = softmax(torch.tensor(row, dtype=torch.float64))
    total = sum(math.exp(s) for s in row)
    expected = [math.exp(s) / total if total else 0.0 for s in row]
    torch.testing.assert_close(weights.tolist(), expected, atol=1e-12, rtol=1e-12)
    assert math.isclose(lse.item(), math.log(total) if total else -math.inf, abs_tol=1e-12)


@given(row=ROW, k=st.integers(1, 12))
def test_top_k_keeps_the_largest_and_of_equals_the_first(row: list[float], k: int) -> None:
    weights, lse = TopKSoftmax(k)(torch.tensor(row, dtype=torch.float64))
    ranked = sorted((j for j in range(len(row)) if row[j] > -math.inf), key=lambda j: (-row[j], j))[:k]
    only = torch.full((len(row),), -math.inf, dtype=torch.float64)
    only[ranked] = torch.tensor(row, dtype=torch.float64)[ranked]
    assert set(weights.nonzero()[:, 0].tolist()) == set(ranked)
    torch.testing.assert_close((weights, lse), softmax(only))


def test_softmax_of_large_scores_does_not_overflow() -> None:
    weights, lse = softmax(torch.tensor([1e4, 1e4 - math.log(3)], dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.25], dtype=torch.float64))
    torch.testing.assert_close(lse, torch.tensor(1e4 + math.log(4 / 3), dtype=torch.float64))


def test_gradients_of_weights_and_lse() -> None:
    scores = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def masked(kernel, x: Tensor) -> tuple[Tensor, Tensor]:
        return kernel(x.masked_fill(torch.tensor([False, False, True, False, False]), -math.inf))

    for kernel in (softmax, TopKSoftmax(2)):
        assert torch.autograd.gradcheck(lambda x, kernel=kernel: masked(kernel, x), scores)
