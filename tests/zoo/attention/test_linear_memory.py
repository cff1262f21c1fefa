"""Layers whose explicit weights would fill N x N: memory linear in the tokens, forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import capture
from zoo.attention.layers import AttentionLayer, create_attention
from zoo.bench.memory import peak_memory

backends = importlib.import_module("zoo.attention.backends")
HEADS: dict[str, Any] = {"shared_heads": 1, "routed_heads": 1}
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "landmark": ("landmark", {"block_size": 7}),
    "moh_aggregated": ("moh_aggregated", HEADS),
    "moh_cosine": ("moh_cosine", HEADS),
    "s2": ("s2", {"num_groups": 2}),
    "s2_rolled": ("s2", {"num_groups": 2, "wrap": True}),
    "s2_with_sinks": ("s2", {"num_groups": 2, "sinks": 3}),
    "ssa": ("ssa", {}),
    "ssa_causal": ("ssa", {"causal": True}),
    "stick_breaking": ("stick_breaking", {}),
}
BY_ROWS = ["landmark", "moh_aggregated", "moh_cosine", "stick_breaking"]

PADDED: dict[str, dict[str, Any]] = {
    "cascaded": {"num_heads": 2},
    "cca": {"num_heads": 2, "head_dim": 8},
    "mla": {"num_heads": 2, "kv_rank": 8, "nope_dim": 8, "rope_dim": 4, "value_dim": 8},
    "multihead": {"num_heads": 2},
    "s2": {"num_heads": 2, "num_groups": 2},
    "sinks": {"num_heads": 2},
    "ssa": {"num_heads": 2, "share": 0.5},
}
"""Fused softmax, which would take a mask of N x N."""


def made(case: str) -> AttentionLayer:
    torch.manual_seed(0)
    name, options = LAYERS[case]
    return create_attention(name, 16, num_heads=2, **options).train()


@pytest.mark.parametrize("case", LAYERS)
def test_twice_the_tokens_take_twice_the_memory(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SCORES", 2**14)
    layer = made(case)

    def peak(length: int) -> int:
        x = torch.randn(1, length, 16, requires_grad=True)
        return peak_memory(lambda: layer(x).sum().backward(), x.device)

    peak(64)
    assert peak(1024) < 2.4 * peak(512)


@pytest.mark.parametrize("name", PADDED)
def test_twice_the_padded_causal_tokens_take_twice_the_memory(name: str) -> None:
    layer = create_attention(name, 16, causal=True, **PADDED[name])

    def peak(length: int) -> int:
        x = torch.randn(1, length, 16, requires_grad=True)
        mask = torch.arange(length)[None] < length - 9
        return peak_memory(lambda: layer(x, mask=mask).sum().backward(), x.device)

    assert peak(2048) < 2.4 * peak(1024)


def results(layer: AttentionLayer, mask: Tensor | None) -> list[Tensor]:
    x = torch.randn(2, 80, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    y = layer(x, mask=mask)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], allow_unused=True)]


@pytest.mark.parametrize("masked", ["full", "padded", "packed"])
@pytest.mark.parametrize("case", BY_ROWS)
def test_parts_of_rows_change_nothing(case: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(case).double()
    can = layer.supports
    if not {"full": True, "padded": can.padding, "packed": can.packed}[masked]:
        pytest.skip(f"{case} takes no {masked} rows")
    places = torch.arange(80).expand(2, -1)
    mask = {"full": None, "padded": places < torch.tensor([[80], [61]]), "packed": places // 47}[masked]
    whole = results(layer, mask)
    monkeypatch.setattr(backends, "SCORES", 0)  # rows by the 32
    for ours, theirs in zip(results(layer, mask), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", BY_ROWS)
def test_a_capture_has_whole_maps(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "SCORES", 0)
    layer, x = made(case).eval(), torch.randn(2, 80, 16)
    with capture(layer) as maps:
        torch.testing.assert_close(layer(x), layer(x))
    assert all(found.sizes[2] == 80 for found in maps.values())


@pytest.mark.parametrize("case", ["landmark", "moh_aggregated", "moh_cosine"])  # the other: test_attend
def test_parts_of_rows_compile(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(backends, "SCORES", 0)
    layer, x = made(case).eval(), torch.randn(2, 80, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
