"""Bounded memory (ABC) against its definition, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.multihead import split_heads
from zoo.attention.layers.slots import BoundedMemory
from zoo.bench.memory import peak_memory

B, N, C, H, M = 2, 9, 8, 2, 3


def build(**options: Any) -> BoundedMemory:
    return BoundedMemory(C, H, **{"slots": M, **options}).double().eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def defined(layer: BoundedMemory, x: Tensor, source: Tensor, seen: Tensor) -> Tensor:
    """What each query reads of the slots of the tokens that it sees, `seen` bool `(B, N, M)`."""
    q, k, v = (
        split_heads(proj(rows), H)
        for proj, rows in ((layer.q_proj, x), (layer.k_proj, source), (layer.v_proj, source))
    )
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            at = seen[b, i].nonzero()[:, 0]
            for h in range(H):
                keys, values = k[b, h, at], v[b, h, at]
                slot_k = (keys @ layer.compress_k).softmax(0).T @ keys
                slot_v = (values @ layer.compress_v).softmax(0).T @ values
                out[b, h, i] = (slot_k @ q[b, h, i] * layer.head_dim**-0.5).softmax(0) @ slot_v
    return layer.project(out)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_its_definition(causal: bool) -> None:
    layer, x = build(causal=causal), tokens()
    seen = torch.ones(B, N, N, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    torch.testing.assert_close(layer(x), defined(layer, x, x, seen), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_as_if_it_were_not_there(causal: bool) -> None:
    layer, x = build(causal=causal), tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, [0, 1, 5]] = False
    mask[1, 7:] = False
    seen = mask[:, None].expand(-1, N, -1)
    seen = seen.tril() if causal else seen
    out = layer(x.masked_fill(~mask[..., None], 50.0), mask=mask)
    expected = defined(layer, x, x, seen | ~mask[:, :, None])  # queries of padding are not compared
    torch.testing.assert_close(out[mask], expected[mask], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_context_is_read_whole(causal: bool) -> None:
    layer, x, context = build(causal=causal), tokens(4), tokens(7)
    seen = torch.ones(B, 4, 7, dtype=torch.bool)
    torch.testing.assert_close(layer(x, context), defined(layer, x, context, seen), atol=1e-12, rtol=1e-10)


def test_the_published_causal_form_holds_the_current_token_only() -> None:
    layer, x = build(causal=True, accumulate=False), tokens()
    q, k, v = (split_heads(proj(x), H) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    share_k, share_v = (
        (rows @ places - (rows @ places).logcumsumexp(2)).exp()
        for rows, places in ((k, layer.compress_k), (v, layer.compress_v))
    )
    keys, values = share_k[..., None] * k[..., None, :], share_v[..., None] * v[..., None, :]
    weights = (keys @ q[..., None] * layer.head_dim**-0.5).softmax(-2)
    expected = layer.project((weights * values).sum(-2))
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-10)
    right = build(causal=True)
    right.load_state_dict(layer.state_dict())
    assert (right(x) - layer(x)).abs().max() > 0.1
    torch.testing.assert_close(right(x)[:, :1], layer(x)[:, :1])  # one token is all that there is


@pytest.mark.parametrize("accumulate", [True, False])
def test_steps_after_a_padded_prompt_equal_the_full_pass(accumulate: bool) -> None:
    layer, x = build(causal=True, accumulate=accumulate), tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, :3] = False
    whole = layer(x, mask=mask)
    cache = layer.init_cache(B)
    parts = [layer(x[:, :5], mask=mask[:, :5], cache=cache)]
    parts += [layer.step(token, cache) for token in x[:, 5:].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-12, rtol=1e-10)


def test_the_cache_does_not_grow() -> None:
    layer = build(causal=True)
    cache = layer.init_cache(B)
    sizes = []
    for token in tokens().split(1, 1):
        layer.step(token, cache)
        sizes.append(cache.nbytes())
    assert set(sizes) == {8 * B * 2 * H * M * (C // H + 1)}


def test_one_slot_gives_every_query_the_same() -> None:
    out = build(slots=1)(tokens())
    torch.testing.assert_close(out, out[:, :1].expand_as(out))


def test_large_logits_stay_exact() -> None:
    """A token may outweigh all before it by more than the least decay of the scan."""
    layer, x = build(causal=True), tokens(40)
    with torch.no_grad():
        layer.compress_k.mul_(60)
        layer.compress_v.mul_(60)
    seen = torch.ones(B, 40, 40, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x), defined(layer, x, x, seen), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(layer.float()(x.float()).double(), layer.double()(x), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_double_precision(causal: bool) -> None:
    layer = build(causal=causal, slots=2)
    x = torch.randn(1, 4, C, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[False, True, True, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), (x,), fast_mode=True)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_tokens(causal: bool) -> None:
    layer, x = build(causal=causal).float(), torch.randn(1, 2**14, C)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 40 * 2**20  # all pairs of one head: 1 GiB


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="at least one slot"):
        build(slots=0)
    with pytest.raises(AttentionError, match="causal=True"):
        build().init_cache(1)
