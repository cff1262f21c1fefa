"""Relative convolutional attention against its definition, pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError
from zoo.attention.layers import convolved_relative
from zoo.attention.layers.convolved_relative import ConvolvedRelative
from zoo.attention.layers.multihead import MultiHead
from zoo.bench.memory import peak_memory

B, N, C, H = 2, 9, 8, 2
D = C // H


def build(**options: Any) -> ConvolvedRelative:
    layer = ConvolvedRelative(C, H, **{"max_length": 16, **options}).double().eval()
    for table in (layer.key_pos_embeddings, layer.key_pos_bias, layer.query_pos_bias):
        nn.init.normal_(table)
    return layer


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def convolved(x: Tensor, linear: nn.Linear, conv: nn.Conv1d) -> Tensor:
    """`(B, N, C)` to `(B, N, H, D)`, tap by tap."""
    rows, kernel = linear(x).unflatten(-1, (H, D)), conv.weight.shape[-1]
    assert conv.bias is not None
    out = torch.zeros_like(rows) + conv.bias
    for t in range(rows.shape[1]):
        for tap in range(kernel):
            if (source := t - (kernel - 1) + tap) >= 0:
                out[:, t] = out[:, t] + conv.weight[:, 0, tap] * rows[:, source]
    return out


def defined(layer: ConvolvedRelative, x: Tensor, source: Tensor) -> Tensor:
    q, k, v = (
        convolved(rows, linear, conv)
        for rows, linear, conv in (
            (x, layer.q_proj, layer.q_conv),
            (source, layer.k_proj, layer.k_conv),
            (source, layer.v_proj, layer.v_conv),
        )
    )
    first, middle = source.shape[1] - x.shape[1], layer.max_length
    out = torch.zeros_like(q)
    for i in range(x.shape[1]):
        logits = torch.full((B, H, source.shape[1]), -torch.inf, dtype=torch.double)
        for j in range(i + first + 1 if layer.causal else source.shape[1]):
            row = middle + j - (i + first)
            content = ((q[:, i] + layer.query_pos_bias) * k[:, j]).sum(-1)
            place = (q[:, i] * layer.key_pos_embeddings[row]).sum(-1) + layer.key_pos_bias[row]
            logits[:, :, j] = (content + place) * D**-0.5
        out[:, i] = torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), v)
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"kernel": 1}, {"kernel": 4}], ids=repr)
def test_equals_its_definition(options: dict[str, Any]) -> None:
    layer, x = build(**options), tokens()
    torch.testing.assert_close(layer(x), defined(layer, x, x), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_tokens_come_first(causal: bool) -> None:
    layer, x, memory = build(causal=causal), tokens(5), tokens(4)
    context = torch.cat([memory, x], 1)
    torch.testing.assert_close(layer(x, context), defined(layer, x, context), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_at_a_time_give_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, context = build(causal=causal), tokens(7).requires_grad_(), tokens(12)
    mask = torch.arange(12) >= torch.tensor([[0], [3]])
    results = []
    for rows in (256, 3):
        monkeypatch.setattr(convolved_relative, "_ROWS", rows)
        out = layer(x, context, mask=mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, layer.key_pos_embeddings))))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, atol=1e-12, rtol=1e-10)


def test_zero_tables_and_one_tap_are_multi_head_attention() -> None:
    layer, x = build(kernel=1), tokens()
    with torch.no_grad():
        for table in (layer.key_pos_embeddings, layer.key_pos_bias, layer.query_pos_bias):
            table.zero_()
        for conv in (layer.q_conv, layer.k_conv, layer.v_conv):
            conv.weight.fill_(1.0)
            assert conv.bias is not None
            conv.bias.zero_()
    plain = MultiHead(C, H, causal=True, qkv_bias=True, out_bias=True).double()
    zeros = {f"{name}_proj.bias": torch.zeros(C) for name in "qk"}
    plain.load_state_dict(zeros | {n: p for n, p in layer.state_dict().items() if "proj" in n})
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-10)


def test_padding_is_as_if_it_were_not_there() -> None:
    layer, x = build(), tokens()
    for kept in (slice(0, 6), slice(4, None)):
        mask = torch.ones(B, N, dtype=torch.bool)
        mask[1] = False
        mask[1, kept] = True
        out = layer(x.masked_fill(~mask[..., None], 9.0), mask=mask)
        torch.testing.assert_close(out[1:, kept], layer(x[1:, kept]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kernel", [1, 3])
def test_steps_after_a_padded_prompt_equal_the_full_pass(kernel: int) -> None:
    layer, x = build(kernel=kernel), tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, :3] = False
    whole = layer(x, mask=mask)
    cache = layer.init_cache(B)
    parts = [layer(x[:, :5], mask=mask[:, :5], cache=cache)]
    parts += [layer.step(token, cache) for token in x[:, 5:].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-12, rtol=1e-10)
    assert cache.nbytes() == B * (N * (8 * 2 * C + 1) + 8 * 3 * (kernel - 1) * C)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_in_double_precision(causal: bool) -> None:
    x = torch.randn(1, 4, C, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(build(causal=causal), (x,), fast_mode=True)


def test_logits_of_all_pairs_are_never_in_memory() -> None:
    layer, x = ConvolvedRelative(8, 1, max_length=4096), torch.randn(1, 4096, 8)

    def both_ways() -> None:
        layer(x).sum().backward()

    assert peak_memory(both_ways, x.device) < 48 * 2**20  # each tensor of all pairs: 64 MiB


def test_mistakes_are_told() -> None:
    layer = build(max_length=6)
    with pytest.raises(AttentionError, match="reach 6 tokens, not 9"):
        layer(tokens())
    cache = layer.init_cache(B)
    layer.step(tokens(6), cache)
    with pytest.raises(AttentionError, match="larger max_length"):
        layer.step(tokens(1), cache)
    with pytest.raises(AttentionError, match="cat"):
        layer(tokens(5), tokens(4))
    with pytest.raises(AttentionError, match="at least 1"):
        build(kernel=0)
    with pytest.raises(AttentionError, match="causal=True"):
        build(causal=False).init_cache(1)
