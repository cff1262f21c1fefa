"""Agent attention: a few tokens gather from the keys, and the queries read from them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.attention import AttentionError, capture
from zoo.attention.layers.agent import AgentAttention, resized
from zoo.bench.memory import peak_memory

B, C, H, D = 2, 12, 3, 4


def build(**options) -> AgentAttention:
    torch.manual_seed(0)
    layer = AgentAttention(C, H, **options).eval()
    for name, table in layer.named_parameters():
        if name.endswith("_bias"):
            nn.init.normal_(table)
    return layer


def test_equals_its_formula_on_a_map() -> None:
    layer, x = build(shape=(4, 6), agents=4, bias_size=3), torch.randn(B, 24, C)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    agents = q.unflatten(2, (2, 2, 2, 3)).mean((3, 5)).flatten(2, 3)
    assert layer.ah_bias is not None
    assert layer.ha_bias is not None
    b1 = F.interpolate(layer.an_bias, (4, 6), mode="bilinear") + layer.ah_bias + layer.aw_bias
    b2 = F.interpolate(layer.na_bias, (4, 6), mode="bilinear").flatten(2).mT
    b2 = b2 + (layer.ha_bias + layer.wa_bias).flatten(2, 3)
    gathered = (agents @ k.mT / D**0.5 + b1.flatten(3)).softmax(-1) @ v
    out = ((q @ agents.mT / D**0.5 + b2).softmax(-1) @ gathered).transpose(1, 2).flatten(2)
    local = layer.dwc(v.transpose(1, 2).flatten(2).mT.unflatten(2, (4, 6))).flatten(2).mT
    torch.testing.assert_close(layer(x), layer.proj(out + local), atol=1e-5, rtol=1e-4)


def test_class_token_is_read_and_written_but_outside_of_agents_and_convolution() -> None:
    layer, x = build(shape=(3, 3), agents=4, class_token=True), torch.randn(B, 10, C)
    with capture(layer) as maps:
        before = layer(x)
    gathering, reading = (found.weights for found in maps.values())
    assert gathering.shape == (B, H, 4, 10)
    assert reading.shape == (B, H, 10, 4)
    changed = x.clone()
    changed[:, 0] += 1
    after = layer(changed)
    assert (after - before).abs().amin((0, 2)).min() > 0
    with capture(layer) as maps:
        layer(changed)
    torch.testing.assert_close(list(maps.values())[1].weights[:, :, 1:], reading[:, :, 1:])


def test_tables_are_resized_linearly_to_other_maps() -> None:
    layer = build(shape=(4, 4), agents=4)
    layer.shape = (4, 8)
    x = torch.randn(B, 32, C)
    larger = AgentAttention(C, H, shape=(4, 8), agents=4).eval()
    state = layer.state_dict()
    state["aw_bias"], state["wa_bias"] = resized(state["aw_bias"], 4, 8), resized(state["wa_bias"], 3, 8)
    larger.load_state_dict(state)
    torch.testing.assert_close(layer(x), larger(x))


def test_keys_of_reduced_maps() -> None:
    layer, x = build(shape=(5, 7), agents=4, reduction=2), torch.randn(B, 35, C)
    with capture(layer) as maps:
        assert layer(x).shape == x.shape
    assert next(iter(maps.values())).weights.shape == (B, H, 4, 2 * 3)
    layer.shape = (1, 1)
    assert layer(x[:, :1]).isfinite().all()


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = build(shape=(128, 128), agents=16), torch.randn(1, 128 * 128, C)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 60 * 2**20  # all pairs: 3 GiB


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (4, 4), "agents": 8}, "square number"),
        ({"agents": 0}, "at least 1"),
        ({"reduction": 0}, "reduction is at least 1"),
        ({"reduction": 2, "class_token": True}, "1 beside a class token"),
    ],
)
def test_impossible_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        build(**options)
