"""Decoupled heads, and their fusion from pretrained ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers import auxiliary_loss
from zoo.attention.layers.decoupled import DecoupledHeads, FusedProjection, fuse_heads, settled
from zoo.attention.layers.multihead import MultiHead, gqa_from_mha

B, N, C, H = 2, 7, 16, 4
D = C // H


def build(**options: Any) -> DecoupledHeads:
    return DecoupledHeads(C, H, **options).double().eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def source(**options: Any) -> MultiHead:
    return MultiHead(C, H, **{"causal": True, "qkv_bias": True, "rope_theta": 100.0} | options).double()


def test_each_query_head_reads_by_both_maps() -> None:
    keys, values = [1, 0, 1, 1], [0, 2, 1, 2]
    layer, x = build(key_heads=keys, value_heads=values), tokens()
    q, k, v = (proj(x).unflatten(-1, (-1, D)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    assert (k.shape[2], v.shape[2]) == (2, 3)
    outs = []
    for h in range(H):
        scores = q[:, :, h] @ k[:, :, keys[h]].mT * D**-0.5
        outs.append(scores.softmax(-1) @ v[:, :, values[h]])
    torch.testing.assert_close(layer(x), layer.o_proj(torch.cat(outs, -1)), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_equal_maps_are_grouped_query_attention(heads: int) -> None:
    options = {"causal": True, "rope_theta": 100.0, "qk_norm": True}
    grouped = MultiHead(C, H, num_kv_heads=heads, **options).double()
    layer = build(key_heads=heads, value_heads=heads, **options)
    layer.load_state_dict(grouped.state_dict())
    x = tokens()
    torch.testing.assert_close(layer(x), grouped(x), atol=1e-12, rtol=1e-10)


def test_the_cache_holds_the_heads_of_keys_and_of_values() -> None:
    layer = build(key_heads=2, value_heads=1, causal=True)
    cache = layer.init_cache(B)
    layer.step(tokens(), cache)
    assert cache.nbytes() == B * N * (8 * D * (2 + 1) + 1)


def test_fusion_starts_at_the_means_of_heads() -> None:
    layer, x = source(), tokens()
    expected = gqa_from_mha(layer, 2)(x)
    torch.testing.assert_close(fuse_heads(layer, 2, 2)(x), expected, atol=1e-12, rtol=1e-10)


def test_fusing_every_head_by_itself_changes_nothing() -> None:
    layer, x = source(qk_norm=True, window=3), tokens()
    torch.testing.assert_close(fuse_heads(layer, H, H)(x), layer(x), atol=1e-12, rtol=1e-10)


def test_training_pulls_the_heads_of_a_group_together() -> None:
    torch.manual_seed(1)
    fused = fuse_heads(source().train(), [0, 1, 0, 1], 1, penalty=2.0)
    parts = [m for m in fused.modules() if isinstance(m, FusedProjection)]
    before = [part.weight.detach().clone() for part in parts]
    optimiser = torch.optim.Adam(fused.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        fused(tokens())
        loss = auxiliary_loss(fused)
        assert isinstance(loss, Tensor)
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.05 * losses[0]
    assert all(p.weight.detach().norm() > 0.5 * w.norm() for p, w in zip(parts, before, strict=True))
    assert auxiliary_loss(fused.eval()) == 0
    x, plain = tokens(), settled(fused)
    assert not any(isinstance(module, FusedProjection) for module in plain.modules())
    torch.testing.assert_close(plain(x), fused(x), atol=1e-12, rtol=1e-10)
    assert plain.k_proj.weight.shape == (2 * D, C)
    assert plain.v_proj.weight.shape == (D, C)


def test_the_distance_is_that_of_heads_to_their_group() -> None:
    linear = torch.nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0] * 3, [3.0] * 3, [5.0] * 3, [2.0] * 3]))
    fused = FusedProjection(linear, torch.tensor([0, 0, 1, 1]), 1.0)
    squares = 3 * (1 + 1 + 1.5**2 + 1.5**2)
    assert fused.distance().item() == pytest.approx(squares / (3 * (1 + 9 + 25 + 4)))


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="in place of num_kv_heads"):
        build(num_kv_heads=2)
    with pytest.raises(AttentionError, match="not divisible"):
        build(key_heads=3)
    for bad in ([0, 1], [0, 2, 2, 0], [0, -1, 0, 1]):
        with pytest.raises(AttentionError, match="a map of value heads"):
            build(value_heads=bad)
    with pytest.raises(AttentionError, match="num_kv_heads = num_heads"):
        fuse_heads(source(num_kv_heads=2), 1, 1)
    with pytest.raises(AttentionError, match="from a DecoupledHeads"):
        fuse_heads(build(), 1, 1)
