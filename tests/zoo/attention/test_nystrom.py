"""Nystrom attention against its definition, in our form and in the published one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.layers.nystrom import NystromAttention, segment_members
from zoo.bench.memory import peak_memory

B, N, C, H, M = 3, 11, 8, 2, 4


def build(**options: Any) -> NystromAttention:
    return NystromAttention(C, H, **{"landmarks": M, **options}).double().eval()


def tokens(n: int = N) -> Tensor:
    return torch.randn(B, n, C, dtype=torch.double)


def segments(n: int) -> list[slice]:
    size = n // M
    short = (size + 1) * M - n
    edges = [min(s, short) * size + max(s - short, 0) * (size + 1) for s in range(M + 1)]
    return [slice(a, b) for a, b in pairwise(edges)]


def parts(q: Tensor, k: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three matrices of one head `(N, D)`."""
    width, cuts = q.shape[-1], segments(len(q))
    marks_q, marks_k = (torch.stack([rows[cut].mean(0) for cut in cuts]) for rows in (q, k))
    last = (marks_q @ k.T / width).masked_fill(~keep, -torch.inf)
    return (q @ marks_k.T / width).softmax(1), (marks_q @ marks_k.T / width).softmax(1), last.softmax(1)


def inverse(x: Tensor, largest: Tensor) -> Tensor:
    found, identity = x.T / largest, torch.eye(M, dtype=x.dtype)
    for _ in range(6):
        y = x @ found
        found = found @ (13 * identity - y @ (15 * identity - y @ (7 * identity - y))) / 4
    return found


def heads(layer: NystromAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (split_heads(proj(x), H) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    return q, k, v


@pytest.mark.parametrize("n", [5, 8, 11])
def test_equals_its_definition(n: int) -> None:
    layer, x = build(), tokens(n)
    q, k, v = heads(layer, x)
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            first, middle, last = parts(q[b, h], k[b, h], torch.ones(n, dtype=torch.bool))
            out[b, h] = first @ inverse(middle, middle.sum(0).max()) @ (last @ v[b, h])
    torch.testing.assert_close(layer(x), layer.project(out), atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_the_published_form(padded: bool) -> None:
    layer, x = build(published=True), tokens()
    mask = torch.arange(N) < torch.tensor([[N], [7], [9]])
    q, k, v = heads(layer, x)
    rows = []
    for b in range(B):
        for h in range(H):
            keep = mask[(b * H + h) % B] if padded else torch.ones(N, dtype=torch.bool)
            key, value = k[b, h] * keep[:, None], v[b, h] * keep[:, None]
            rows.append((*parts(q[b, h], key, keep), value))
    largest = torch.stack([middle.sum(0).max() for _, middle, _, _ in rows]).max()
    out = [first @ inverse(middle, largest) @ (last @ value) for first, middle, last, value in rows]
    expected = layer.project(torch.stack(out).unflatten(0, (B, H)))
    found = layer(x, mask=mask if padded else None)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)
    if not padded:
        assert not torch.allclose(layer(x[:1]), found[:1], atol=1e-6)  # it depends on the batch


def test_few_tokens_are_softmax_attention() -> None:
    for published in (False, True):
        layer, x = build(published=published), tokens(M)
        plain = MultiHead(C, H, qkv_bias=True, out_bias=True).double()
        plain.load_state_dict(layer.state_dict())
        with torch.no_grad():  # scores are divided by D instead of sqrt(D)
            plain.q_proj.weight *= layer.head_dim**-0.5
            plain.q_proj.bias *= layer.head_dim**-0.5
        torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-10)


def test_a_padded_row_equals_the_row_alone() -> None:
    """Also where the padding stands first or between, and where no more tokens are left than landmarks."""
    layer, x = build(), tokens()
    for kept in ([0, 1, 2, 3, 4, 5], [3, 4, 5, 8, 9, 10], [2, 5, 9], [10]):
        mask = torch.ones(B, N, dtype=torch.bool)
        mask[1] = False
        mask[1, kept] = True
        out = layer(x.masked_fill(~mask[..., None], 9.0), mask=mask)
        torch.testing.assert_close(out[1:2, kept], layer(x[1:2, kept]), atol=1e-11, rtol=1e-9)
        torch.testing.assert_close(out[::2], layer(x[::2]), atol=1e-11, rtol=1e-9)


def test_the_convolution_of_the_values_is_added() -> None:
    layer, x = build(conv_kernel=3), tokens()
    conv = layer.conv
    assert conv is not None
    _, _, v = heads(layer, x)
    padded = torch.nn.functional.pad(v, (0, 0, 1, 1))
    weight = conv.weight[:, 0, :, 0]
    added = sum(weight[None, :, i, None, None] * padded[:, :, i : i + N] for i in range(3))
    assert isinstance(added, Tensor)
    layer.conv = None
    without = layer(x)
    layer.conv = conv
    expected = without + added.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-10)


def test_segments_hold_the_real_tokens() -> None:
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, [0, 4]] = False
    members = segment_members(real, 4)
    assert members[0].sum(1).tolist() == [2, 3, 3, 3]
    assert [row.nonzero()[:, 0].tolist() for row in members[1]] == [[1, 2], [3, 5], [6, 7], [8, 9, 10]]


def test_gradients_in_double_precision() -> None:
    layer = build(landmarks=2)
    x = torch.randn(2, 5, C, dtype=torch.double, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    assert torch.autograd.gradcheck(lambda x: layer(x, mask=mask), (x,), fast_mode=True)


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = build().float(), torch.randn(1, 2**14, C)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 40 * 2**20  # all pairs of one head: 1 GiB


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="at least one landmark"):
        build(landmarks=0)
    with pytest.raises(AttentionError, match="is odd, not 4"):
        build(conv_kernel=4)
    with pytest.raises(AttentionError, match="abc decodes"):
        build().init_cache(1)
