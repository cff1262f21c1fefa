"""Magnitude-aware linear attention against its definition; tokens of heads."""

from __future__ import annotations

import pytest
import torch

from zoo.attention import AttentionError
from zoo.attention.layers.head_tokens import HeadTokens
from zoo.attention.layers.magnitude import MagnitudeAware
from zoo.attention.linear import elu_features, magnitude_aware
from zoo.attention.rotary import axial_rotary_tables, rotary


def heads(batch: int = 2, tokens: int = 10, width: int = 4) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 3, tokens, width, generator=draw).double() for _ in range(3))
    return [elu_features(q), elu_features(k), v]


def test_equals_its_weights() -> None:
    q, k, v = heads()
    products = q @ k.mT * q.shape[-1] ** -0.5 / k.shape[2]
    z = products.sum(-1, keepdim=True)
    weights = (1 + 1 / z) * products - z / k.shape[2]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(z[..., 0]))
    torch.testing.assert_close(magnitude_aware(q, k, v, eps=0.0), weights @ v)


def test_a_larger_query_makes_weights_sharper() -> None:
    q, k, _ = heads(1)
    picks = torch.eye(k.shape[2], dtype=q.dtype).expand(1, 3, -1, -1)
    spread = [magnitude_aware(size * q, k, picks).std(-1) for size in (1, 2, 4)]
    assert (spread[0] < spread[1]).all()
    assert (spread[1] < spread[2]).all()


def test_padding_is_as_if_it_were_not_there() -> None:
    q, k, v = heads()
    keep = torch.arange(10).expand(2, 10) < torch.tensor([[10], [6]])
    out = magnitude_aware(q, k, v, keep=keep)
    torch.testing.assert_close(out[:1], magnitude_aware(q[:1], k[:1], v[:1]))
    torch.testing.assert_close(out[1:], magnitude_aware(q[1:], k[1:, :, :6], v[1:, :, :6]))


def test_nothing_of_all_pairs_is_formed() -> None:
    layer, x = MagnitudeAware(8, 2, shape=(256, 256)), torch.randn(1, 2**16, 8, requires_grad=True)
    layer(x).square().mean().backward()  # 2^32 pairs per head would take 17 GB
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_products_of_turned_heads_depend_on_the_displacement_on_the_grid() -> None:
    q, k = torch.randn(2, 1, 1, 3, 8)
    at = torch.tensor([[0, 3, 5], [1, 2, 9]])  # rows, columns
    results = []
    for places in (at, at + torch.tensor([[7], [4]])):
        tables = axial_rotary_tables(list(places), 8)
        results.append(rotary(q, *tables, interleaved=True) @ rotary(k, *tables, interleaved=True).mT)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(results[0], q @ k.mT, atol=1e-2)
    only_rows = axial_rotary_tables([at[0], torch.zeros(3)], 8)
    assert (only_rows[1][:, 2:] == 0).all()  # the second half of the channels turns with columns alone


def test_a_map_as_rows_and_columns_is_not_one_sequence() -> None:
    x = torch.randn(1, 12, 8)
    layer = MagnitudeAware(8, 2, shape=(3, 4)).eval()
    by_shape = layer(x)
    layer.shape = (4, 3)
    assert not torch.allclose(layer(x), by_shape, atol=1e-3)
    layer.shape = (3, 5)
    with pytest.raises(AttentionError, match=r"12 tokens do not fill a grid of \(3, 5\)"):
        layer(x)


def test_arguments_that_do_not_fit_are_told() -> None:
    with pytest.raises(AttentionError, match="heads of a multiple of 4 channels, not 6"):
        MagnitudeAware(12, 2, shape=(3, 4))
    with pytest.raises(AttentionError, match="kernel_size is odd"):
        MagnitudeAware(16, 2, kernel_size=4)
    with pytest.raises(AttentionError, match="1 to 3 axes, not on 4"):
        MagnitudeAware(16, 2, shape=(2, 2, 2, 2))
    with pytest.raises(AttentionError, match="not a multiple of 4"):
        axial_rotary_tables([torch.arange(3), torch.arange(3)], 6)
    with pytest.raises(AttentionError, match="class_tokens is a number"):
        HeadTokens(16, 2, class_tokens=-1)


def test_only_class_tokens_get_the_head_tokens() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 12)
    plain, classes = HeadTokens(12, 3), HeadTokens(12, 3, class_tokens=2)
    classes.load_state_dict(plain.state_dict())
    gained = classes(x) - plain(x)
    assert (gained[:, 2:] == 0).all()
    torch.testing.assert_close(gained[:, 0], gained[:, 1])
    assert gained[:, 0].abs().min() > 1e-4
