"""Third-order attention against its definition, triple by triple."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.layers.simplicial import SimplicialAttention
from zoo.bench.memory import peak_memory

B, N, C, H, HK = 2, 7, 16, 4, 2
D = C // H


def build(**options: Any) -> SimplicialAttention:
    return SimplicialAttention(C, H, **{"num_kv_heads": HK, **options}).double().eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def sees(i: int, j: int, window: int | None, causal: bool) -> bool:
    if causal:
        return j <= i and (window is None or i - j < window)
    return window is None or abs(i - j) <= window // 2


def defined(layer: SimplicialAttention, x: Tensor, source: Tensor, real: Tensor | None = None) -> Tensor:
    """`real` is bool `(M,)`, of every row."""
    q = layer.q_proj(x).unflatten(-1, (H, D))
    k, v, k2, v2 = (
        proj(source).unflatten(-1, (-1, D)).repeat_interleave(H // (proj.out_features // D), 2)
        for proj in (layer.k_proj, layer.v_proj, layer.second_k_proj, layer.second_v_proj)
    )
    w1, w2 = layer.windows or (None, None)
    out = torch.zeros_like(q)
    exist = [t for t in range(source.shape[1]) if real is None or real[t]]
    for i in range(x.shape[1]):
        pairs = [
            (j, m)
            for j in exist
            if sees(i, j, w1, layer.causal)
            for m in exist
            if sees(i, m, w2, layer.causal)
        ]
        scores = torch.stack([(q[:, i] * k[:, j] * k2[:, m]).sum(-1) * D**-0.5 for j, m in pairs], -1)
        values = torch.stack([v[:, j] * v2[:, m] for j, m in pairs], 2)
        out[:, i] = torch.einsum("bhp,bhpd->bhd", scores.softmax(-1), values)
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize("windows", [None, (3, 5), (5, 1), (99, 99)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_its_definition(causal: bool, windows: tuple[int, int] | None) -> None:
    layer, x = build(causal=causal, windows=windows, qkv_bias=True), tokens()
    torch.testing.assert_close(layer(x), defined(layer, x, x), atol=1e-12, rtol=1e-10)


def test_a_context() -> None:
    layer, x, context = build(num_kv_heads=1), tokens(3), tokens(5)
    torch.testing.assert_close(layer(x, context), defined(layer, x, context), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("windows", [None, (3, 5)])
def test_padding_between_tokens(windows: tuple[int, int] | None) -> None:
    layer, x = build(windows=windows), tokens()
    real = torch.tensor([True, True, False, True, True, False, True])
    out = layer(x, mask=real.expand(B, -1))
    torch.testing.assert_close(out, defined(layer, x, x, real), atol=1e-12, rtol=1e-10)


def test_documents_in_windows() -> None:
    layer, x = build(windows=(3, 5)), tokens()
    ids = torch.tensor([[0] * 3 + [1] * 4] * B)
    torch.testing.assert_close(layer(x, mask=ids)[:, 3:], layer(x[:, 3:]), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("windows", [None, (99, 1), (99, 5)])
def test_second_tokens_of_ones_leave_softmax_attention(causal: bool, windows: tuple[int, int] | None) -> None:
    layer, x = build(causal=causal, windows=windows), tokens()
    for name in ("second_k_proj", "second_v_proj"):
        ones = nn.Linear(C, HK * D).double()
        nn.init.zeros_(ones.weight)
        nn.init.ones_(ones.bias)
        layer.set_submodule(name, ones)
    plain = MultiHead(C, H, num_kv_heads=HK, causal=causal).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "second" not in n})
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("windows", [None, (4, 2), (2, 4)])
def test_steps_equal_the_full_pass(windows: tuple[int, int] | None) -> None:
    layer, x = build(causal=True, windows=windows), tokens()
    cache = layer.init_cache(B)
    parts = [layer.step(part, cache) for part in x.split([3, 1, 2, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x), atol=1e-12, rtol=1e-10)
    kept = N if windows is None else 3
    assert cache.nbytes() == B * kept * (8 * 4 * HK * D + 1)


@pytest.mark.parametrize("windows", [None, (3, 3)])
def test_gradients_in_double_precision(windows: tuple[int, int] | None) -> None:
    layer = build(windows=windows, causal=True)
    x = torch.randn(1, 4, C, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[False, True, True, True]])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), (x,), fast_mode=True)


def test_memory_is_linear_in_the_tokens_within_windows() -> None:
    layer = SimplicialAttention(4, 1, windows=(16, 3), causal=True)
    x = torch.randn(1, 2**14, 4)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 100 * 2**20  # all pairs of one head: 1 GiB


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="odd unless causal"):
        build(windows=(4, 3))
    with pytest.raises(AttentionError, match="two numbers"):
        build(windows=(4,), causal=True)
    with pytest.raises(AttentionError, match="context needs windows=None"):
        build(windows=(3, 3))(tokens(), tokens())
    with pytest.raises(AttentionError, match="takes no context"):
        build(causal=True)(tokens(), tokens())
