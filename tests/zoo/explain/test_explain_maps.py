"""Rows, sums, statistics and rollout of captured maps, tile by tile, against dense weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zoo.attention import attend, capture
from zoo.attention.capture import AttentionMap
from zoo.attention.neighbourhood import ShiftedWindows
from zoo.attention.routed import Routed
from zoo.explain import find_places, head_statistics, received, rollout, seen_from, token_mixing

PATTERNS: dict[str, Any] = {
    "dense": None,
    "routed": Routed(torch.tensor([[[0, 3], [1, 0], [2, 1], [3, 2]]] * 2), (8, 12), (4, 6)),
    "windows": ShiftedWindows((8, 12), 4, shift=2),
}
EACH = pytest.mark.parametrize("name", PATTERNS)


def captured(name: str, batch: int = 2) -> AttentionMap:
    torch.manual_seed(0)
    q, k = torch.randn(batch, 3, 96, 4), torch.randn(batch, 3, 96, 4)
    with capture() as maps:
        attend(q, k, k, pattern=PATTERNS[name])
    return maps["attend"]


@EACH
def test_rows_and_sums_are_those_of_the_dense_map(name: str) -> None:
    found = captured(name)
    torch.testing.assert_close(seen_from(found, 1, 17), found.weights[1, :, 17])
    torch.testing.assert_close(received(found), found.weights.sum(2))
    squares = [tile.weights.square() for tile in found.tiles]
    torch.testing.assert_close(received(found, squares), found.weights.square().sum(2))


@EACH
def test_statistics_are_those_of_the_dense_map(name: str) -> None:
    found = captured(name)
    places = find_places(found, 2, (7, 12))  # the last row is padding
    if name == "dense":
        places = find_places(found, 2, (8, 12))
    assert places is not None
    real = int(places[0].real[0]) * 12
    values = head_statistics(found, places, (7.0 if name != "dense" else 8.0, 12.0))
    weights = found.weights[:, :, :real].double()
    entropy = torch.special.entr(weights).sum(-1)
    torch.testing.assert_close(values.entropy, entropy.mean((0, 2)))
    torch.testing.assert_close(values.effective_keys, entropy.exp().mean((0, 2)))
    torch.testing.assert_close(values.largest, weights.amax(-1).mean((0, 2)))
    at = torch.cartesian_prod(torch.arange(8.0), torch.arange(12.0)).double()
    seen = weights[..., :real]
    far = (seen * torch.cdist(at[:real], at[:real])).sum(-1) / seen.sum(-1)
    torch.testing.assert_close(values.distance, far.nanmean((0, 2)), atol=1e-5, rtol=1e-5)
    assert head_statistics(found).distance.isnan().all()


def test_uniform_attention_looks_everywhere() -> None:
    zeros = torch.zeros(1, 1, 16, 4)
    with capture() as maps:
        attend(zeros, zeros, zeros)
    values = head_statistics(maps["attend"])
    assert float(values.entropy) == pytest.approx(math.log(16))
    assert float(values.effective_keys) == pytest.approx(16)


@EACH
def test_mixing_is_the_mean_of_the_heads_on_the_grid(name: str) -> None:
    found = captured(name)
    places = find_places(found, 2, (8, 12))
    assert places is not None
    torch.testing.assert_close(token_mixing([found], [places[0]]), found.weights.mean(1))


def test_mixing_puts_windows_together_and_averages_their_heads() -> None:
    torch.manual_seed(0)
    q = torch.randn(4, 1, 4, 4)
    with capture() as maps:
        attend(q, q, q)
        attend(2 * q, q, q)
    found = list(maps.values())
    places = [find_places(one, 1, (4, 4)) for one in found]
    mixed = token_mixing(found, [both[0] for both in places if both is not None])
    assert mixed.shape == (1, 16, 16)
    torch.testing.assert_close(mixed.sum(-1), torch.ones(1, 16))
    both = (found[0].weights + found[1].weights)[1, 0] / 2  # the second window: columns 2 and 3
    members = torch.tensor([2, 3, 6, 7])
    torch.testing.assert_close(mixed[0][members][:, members], both)
    assert mixed[0, 0, 2] == 0


def test_rollout_is_the_product_of_attention_with_its_shortcut() -> None:
    layers = [torch.rand(2, 5, 5).softmax(-1) for _ in range(3)]
    steps = [0.5 * torch.eye(5) + 0.5 * layer for layer in layers]
    torch.testing.assert_close(rollout(layers), steps[2] @ steps[1] @ steps[0])
    torch.testing.assert_close(rollout(layers, residual=0.0), layers[2] @ layers[1] @ layers[0])
    torch.testing.assert_close(rollout(layers).sum(-1), torch.ones(2, 5))
