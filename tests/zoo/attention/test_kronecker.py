"""Kronecker attention against attention to explicit means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.kronecker import KroneckerAttention
from zoo.bench.memory import peak_memory

B, ROWS, COLUMNS, C, H = 2, 3, 5, 8, 2


def build(**options: Any) -> KroneckerAttention:
    return KroneckerAttention(C, H, **{"shape": (ROWS, COLUMNS), "bias": True, **options}).double().eval()


def tokens() -> Tensor:
    return torch.randn(B, ROWS * COLUMNS, C, dtype=torch.double)


def seen(layer: KroneckerAttention, queries: Tensor, means: Tensor) -> Tensor:
    """`(B, n, C)`: what queries `(B, n, C)` find among the means, before the last projection."""
    q, k, v = (
        proj(rows).unflatten(-1, (H, -1)).transpose(1, 2)
        for proj, rows in ((layer.q_proj, queries), (layer.k_proj, means), (layer.v_proj, means))
    )
    out = (q @ k.mT * (C // H) ** -0.5).softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def means_of(x: Tensor, keep: Tensor) -> list[Tensor]:
    """Means of the rows and columns that hold a token of `keep` `(h, w)`."""
    grid = x.unflatten(1, (ROWS, COLUMNS))
    rows = [grid[:, i, keep[i]].mean(1) for i in range(ROWS) if keep[i].any()]
    return rows + [grid[:, keep[:, j], j].mean(1) for j in range(COLUMNS) if keep[:, j].any()]


def test_tokens_look_at_rows_and_columns() -> None:
    layer, x = build(), tokens()
    means = torch.stack(means_of(x, torch.ones(ROWS, COLUMNS, dtype=torch.bool)), 1)
    torch.testing.assert_close(layer(x), layer.o_proj(seen(layer, x, means)), atol=1e-12, rtol=1e-10)


def test_means_look_at_means_and_a_token_gets_the_sum() -> None:
    layer, x = build(queries="means"), tokens()
    means = torch.stack(means_of(x, torch.ones(ROWS, COLUMNS, dtype=torch.bool)), 1)
    found = seen(layer, means, means)
    places = [(i, ROWS + j) for i in range(ROWS) for j in range(COLUMNS)]
    expected = torch.stack([found[:, i] + found[:, j] for i, j in places], 1)
    torch.testing.assert_close(layer(x), layer.o_proj(expected), atol=1e-12, rtol=1e-10)


def test_padding_is_in_no_mean() -> None:
    layer, x = build(), tokens()
    keep = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    keep[2], keep[0, 1] = False, False
    means = torch.stack(means_of(x, keep), 1)
    out = layer(x.masked_fill(~keep.flatten()[:, None], 9.0), mask=keep.flatten().expand(B, -1))
    expected = layer.o_proj(seen(layer, x, means))
    at = keep.flatten()
    torch.testing.assert_close(out[:, at], expected[:, at], atol=1e-12, rtol=1e-10)


def test_padding_is_in_no_mean_that_looks() -> None:
    layer, small = build(queries="means"), build(queries="means", shape=(2, 4))
    small.load_state_dict(layer.state_dict())
    x, keep = tokens(), torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    keep[:2, :4] = True
    out = layer(x, mask=keep.flatten().expand(B, -1))
    at = keep.flatten()
    torch.testing.assert_close(out[:, at], small(x[:, at]), atol=1e-12, rtol=1e-10)


def test_rows_of_one_token_are_the_tokens() -> None:
    """A map of one column: its rows are the tokens; the column's mean joins them."""
    layer, x = build(shape=(ROWS * COLUMNS, 1)), tokens()
    means = torch.cat([x, x.mean(1, keepdim=True)], 1)
    torch.testing.assert_close(layer(x), layer.o_proj(seen(layer, x, means)), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("queries", ["tokens", "means"])
def test_gradients_in_double_precision(queries: str) -> None:
    layer = build(shape=(2, 3), queries=queries)
    x = torch.randn(1, 6, C, dtype=torch.double, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True, False]])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), (x,), fast_mode=True)


def test_memory_of_a_large_map() -> None:
    layer, x = build(shape=(128, 128)).float(), torch.randn(1, 2**14, C)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 40 * 2**20  # all pairs of one head: 1 GiB


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="'tokens' or the 'means'"):
        build(queries="rows")
    with pytest.raises(AttentionError, match="one or two axes"):
        build(shape=(2, 2, 2))
    with pytest.raises(AttentionError, match="do not fill a grid"):
        build(shape=(4, 4))(tokens())
    with pytest.raises(AttentionError, match="no cache"):
        build().init_cache(1)
