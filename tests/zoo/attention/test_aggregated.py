"""MoH on maps: the published sums, written plainly, for maps of any shape."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention import AttentionError, capture
from zoo.attention.layers.aggregated import AggregatedMixtureOfHeads, CosineMixtureOfHeads

DIM, HEADS = 24, 4
GATES: dict[str, Any] = {"shared_heads": 1, "routed_heads": 1}
Layer = TypeVar("Layer", bound=torch.nn.Module)
SHAPES = [(4, 4), (8, 8), (5, 9), (1, 6), (11, 7)]


def moved(layer: Layer) -> Layer:
    """With parameters that are not those of a fresh layer."""
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def distances(shape: tuple[int, int], pools: tuple[int, int]) -> Tensor:
    """Logarithmic distances `(h w, P1 P2, 2)`, from adaptive average pooling of the places themselves."""
    places = [torch.arange(n, dtype=torch.float) for n in shape]
    middles = [F.adaptive_avg_pool1d(x[None], m)[0] for x, m in zip(places, pools, strict=True)]
    cells = [torch.cartesian_prod(*axes).view(-1, 2) for axes in (places, middles)]
    scale = torch.tensor([max(n - 1, 1) for n in shape])
    d = (cells[0][:, None] - cells[1]) / scale * 8
    return d.sign() * (d.abs() + 1).log2() / 3


def bias(layer: CosineMixtureOfHeads | AggregatedMixtureOfHeads, table: Tensor) -> Tensor:
    return layer.cpb_fc2(F.relu(layer.cpb_fc1(table))).permute(2, 0, 1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_attention_with_gates(shape: tuple[int, int]) -> None:
    layer = moved(CosineMixtureOfHeads(DIM, HEADS, shared_heads=1, routed_heads=2, shape=shape))
    n = math.prod(shape)
    x = torch.randn(2, n, DIM)
    q, k, v = (heads(part) for part in layer.qkv(x).chunk(3, -1))
    q = (F.normalize(q, dim=-1) + layer.query_embedding) * F.softplus(layer.temperature) * math.log(n)
    weights = (q @ F.normalize(k, dim=-1).mT + bias(layer, distances(shape, shape))).softmax(-1)
    out = (weights @ v).transpose(1, 2) * layer.gates(x)[..., None]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(2)))


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_aggregated_attention_with_gates(shape: tuple[int, int], window: int) -> None:
    layer = moved(
        AggregatedMixtureOfHeads(
            DIM, HEADS, shared_heads=2, routed_heads=1, window=window, sr_ratio=3, shape=shape
        )
    )
    x = torch.randn(2, math.prod(shape), DIM)
    pools = (max(1, shape[0] // 3), max(1, shape[1] // 3))

    def windows(y: Tensor) -> Tensor:
        """`(B, H, N, D, W)`"""
        grid = y.mT.reshape(-1, y.shape[-1], *shape)
        rows = F.unfold(grid, window, padding=window // 2).view(*y.shape[:2], y.shape[3], -1, y.shape[2])
        return rows.permute(0, 1, 4, 2, 3)

    k, v = layer.kv(x).chunk(2, -1)
    k, v = windows(F.normalize(heads(k), dim=-1)), windows(heads(v))
    real = windows(torch.ones(1, 1, math.prod(shape), 1)) > 0  # (1, 1, N, 1, W)
    real = real[:, :, :, 0]
    pooled = F.adaptive_avg_pool2d(F.gelu(layer.sr(x.mT.unflatten(2, shape))), pools).flatten(2).mT
    far_k, far_v = (heads(part) for part in layer.kv(layer.norm(pooled)).chunk(2, -1))
    direct = F.normalize(heads(layer.q(x)), dim=-1)
    counts = (real.sum(-1, keepdim=True) + math.prod(pools)).log()
    q = (direct + layer.query_embedding) * F.softplus(layer.temperature) * counts
    near = (q[:, :, :, None] @ k).squeeze(3) + layer.relative_pos_bias_local[:, None]
    far = q @ F.normalize(far_k, dim=-1).mT + bias(layer, distances(shape, pools))
    weights = torch.cat([near.masked_fill(~real, -torch.inf), far], -1).softmax(-1)
    local = weights[..., : window**2] + direct @ layer.learnable_tokens + layer.learnable_bias
    out = (v @ local[..., None]).squeeze(-1) + weights[..., window**2 :] @ far_v
    out = out.transpose(1, 2) * layer.gates(x)[..., None]
    torch.testing.assert_close(layer(x), layer.proj(out.flatten(2)), atol=1e-5, rtol=1e-5)


def test_distances_may_be_measured_by_the_shape_of_training() -> None:
    layer = moved(
        CosineMixtureOfHeads(DIM, HEADS, shared_heads=1, routed_heads=2, shape=(3, 5), trained_shape=(7, 9))
    )
    steps = torch.cartesian_prod(torch.arange(3.0), torch.arange(5.0))
    d = (steps[:, None] - steps) / torch.tensor([6.0, 8.0]) * 8
    table = d.sign() * (d.abs() + 1).log2() / 3
    torch.testing.assert_close(layer.position_bias((3, 5), (3, 5))(torch.arange(15)), bias(layer, table))


def test_captured_windows_and_pools() -> None:
    layer = AggregatedMixtureOfHeads(DIM, HEADS, shared_heads=1, routed_heads=1, sr_ratio=4, shape=(8, 8))
    with capture(layer.eval()) as maps:
        layer(torch.randn(1, 64, DIM))
    far, near = maps["AggregatedMixtureOfHeads"].weights, maps["AggregatedMixtureOfHeads#2"].weights
    assert far.shape == (1, HEADS, 64, 4)
    assert near.shape == (1, HEADS, 64, 64)
    assert (near[0, 0].count_nonzero(-1).unique() == torch.tensor([4, 6, 9])).all()


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="a window is odd"):
        AggregatedMixtureOfHeads(DIM, HEADS, window=4, **GATES)
    with pytest.raises(AttentionError, match="one or two axes"):
        CosineMixtureOfHeads(DIM, HEADS, shape=(2, 2, 2), **GATES)
    with pytest.raises(AttentionError, match="7 tokens do not fill a grid of"):
        CosineMixtureOfHeads(DIM, HEADS, shape=(2, 3), **GATES)(torch.zeros(1, 7, DIM))
