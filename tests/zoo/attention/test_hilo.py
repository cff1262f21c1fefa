"""HiLo: high frequencies within windows, low ones among the means of windows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.hilo import HiLo

B, C, H = 2, 16, 4


def attention(q: Tensor, kv: Tensor, heads: int) -> Tensor:
    """Dense softmax attention of `(B, N, C)` to `(B, M, 2 C)`."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, *kv.chunk(2, -1)))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def build(**options) -> HiLo:
    torch.manual_seed(0)
    return HiLo(C, H, **options)


def test_windows_at_the_border_hold_what_there_is() -> None:
    layer = build(shape=(5, 7), window=3, alpha=0.0)
    x = torch.randn(B, 5, 7, C)
    out = layer(x.flatten(1, 2)).unflatten(1, (5, 7))
    for rows, columns in ((slice(0, 3), slice(0, 3)), (slice(3, 5), slice(6, 7))):
        inside = x[:, rows, columns]
        q, kv = layer.h_qkv(inside.flatten(1, 2)).tensor_split([C], -1)
        expected = layer.h_proj(attention(q, kv, H)).view(inside.shape)
        torch.testing.assert_close(out[:, rows, columns], expected, atol=1e-5, rtol=1e-4)


def test_low_frequencies_see_the_means_of_real_tokens() -> None:
    layer = build(shape=(3, 3), window=2, alpha=1.0)
    x = torch.randn(B, 3, 3, C)
    cells = [x[:, i : i + 2, j : j + 2].flatten(1, 2).mean(1) for i in (0, 2) for j in (0, 2)]
    kv = layer.l_kv(torch.stack(cells, 1))
    expected = layer.l_proj(attention(layer.l_q(x.flatten(1, 2)), kv, H))
    torch.testing.assert_close(layer(x.flatten(1, 2)), expected, atol=1e-5, rtol=1e-4)


def test_windows_of_one_token_are_full_attention() -> None:
    layer, x = build(window=1), torch.randn(B, 6, C)
    assert layer.high_heads == 0
    expected = layer.l_proj(attention(layer.l_q(x), layer.l_kv(x), H))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_padding_on_a_map_is_not_seen() -> None:
    layer, x = build(shape=(4, 6), window=2), torch.randn(B, 4, 6, C)
    mask = torch.zeros(B, 4, 6, dtype=torch.bool)
    mask[:, :3, :5] = True
    small = build(shape=(3, 5), window=2)
    out = layer(x.flatten(1, 2), mask=mask.flatten(1)).unflatten(1, (4, 6))[:, :3, :5]
    expected = small(x[:, :3, :5].flatten(1, 2)).unflatten(1, (3, 5))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "at least 1"),
        ({"alpha": 1.5}, r"alpha in \[0, 1\]"),
        ({"shape": (2, 3, 4)}, "one or two axes"),
        ({"shape": (2, 3)}, "7 tokens do not fill a grid"),
    ],
)
def test_impossible_options_are_told(options: dict, message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        build(**options)(torch.randn(B, 7, C))
