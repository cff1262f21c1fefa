"""cosFormer against its weights."""

from __future__ import annotations

from math import pi
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.cosformer import CosFormer
from zoo.attention.layers.linear import join, split
from zoo.bench.memory import peak_memory

B, N, C, H = 2, 9, 8, 2


def build(**options: Any) -> CosFormer:
    return CosFormer(C, H, **options).double().eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def defined(layer: CosFormer, x: Tensor, source: Tensor, length: int, seen: Tensor | None = None) -> Tensor:
    """Every weight for itself."""
    q, k, v = (
        split(proj(rows), H)
        for proj, rows in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    distance = torch.arange(x.shape[1])[:, None] - torch.arange(source.shape[1])
    weights = q.relu() @ k.relu().mT * torch.cos(pi / 2 * distance.double() / length)
    weights = weights if seen is None else weights * seen
    return layer.o_proj(join(weights @ v / weights.sum(-1, keepdim=True).clamp(min=layer.eps)))


@pytest.mark.parametrize("max_length", [None, 12])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_its_definition(causal: bool, max_length: int | None) -> None:
    layer, x = build(causal=causal, max_length=max_length), tokens()
    seen = torch.ones(N, N).tril() if causal else None
    expected = defined(layer, x, x, max_length or N, seen)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("keys", [5, 14])
def test_a_context_is_as_long_as_the_longer_of_both(keys: int) -> None:
    layer, x, context = build(causal=False), tokens(), tokens(keys)
    expected = defined(layer, x, context, max(N, keys))
    torch.testing.assert_close(layer(x, context), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_row_has_the_length_of_its_tokens(causal: bool) -> None:
    layer, x = build(causal=causal), tokens()
    mask = torch.arange(N) < torch.tensor([[N], [5]])
    out = layer(x, mask=mask)
    torch.testing.assert_close(out[:1], layer(x[:1]), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(out[1:, :5], layer(x[1:, :5]), atol=1e-12, rtol=1e-10)
    context = tokens(7)
    seen = torch.arange(7) < torch.tensor([[4], [7]])
    layer = build(causal=False)
    cross = layer(x[:, :3], context, mask=seen)
    torch.testing.assert_close(cross[:1], layer(x[:1, :3], context[:1, :4]), atol=1e-12, rtol=1e-10)


def test_documents_and_positions() -> None:
    layer, x = build(max_length=10, causal=False), tokens()
    ids = torch.tensor([[0] * 4 + [1] * 5] * B)
    positions = torch.cat([torch.arange(4), torch.arange(5)])
    out = layer(x, mask=ids, positions=positions)
    torch.testing.assert_close(out[:, 4:], layer(x[:, 4:]), atol=1e-12, rtol=1e-10)
    later = layer(x, positions=torch.arange(1, N + 1))  # only differences count
    torch.testing.assert_close(later, layer(x), atol=1e-12, rtol=1e-10)


def test_a_query_of_zeros_sees_nothing() -> None:
    layer = build(bias=False)
    assert not layer(torch.zeros(B, N, C, dtype=torch.double)).any()


def test_gradients_in_double_precision() -> None:
    for causal in (False, True):
        x = torch.randn(1, 4, C, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(build(causal=causal), (x,), fast_mode=True)


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = build(causal=False).float(), torch.randn(1, 2**14, C)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 40 * 2**20  # all pairs of one head: 1 GiB


def test_mistakes_are_told() -> None:
    x = tokens()
    with pytest.raises(AttentionError, match="at least one token"):
        build(max_length=0)
    with pytest.raises(AttentionError, match="beyond max_length=8"):
        build(max_length=8)(x)
    with pytest.raises(AttentionError, match="documents need max_length"):
        build()(x, mask=torch.zeros(B, N, dtype=torch.long))
    with pytest.raises(AttentionError, match="decoding needs max_length"):
        build().init_cache(1)
    layer = build(max_length=8)
    cache = layer.init_cache(B)
    layer.step(x[:, :8], cache)
    with pytest.raises(AttentionError, match="larger"):
        layer.step(x[:, 8:], cache)
