"""Heads in a cascade."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, attend, capture
from zoo.attention.layers import create_attention
from zoo.attention.layers.cascaded import CascadedGroups, cascade

DIM, HEADS, KEY = 24, 3, 4


def layer(**options) -> CascadedGroups:
    torch.manual_seed(0)
    return CascadedGroups(DIM, options.pop("num_heads", HEADS), key_dim=KEY, **options).eval()


def tokens() -> Tensor:
    return torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(1))


def test_each_head_reads_its_part_and_the_output_before() -> None:
    parts = [torch.tensor(float(i)) for i in (1, 10, 100)]
    found = cascade([lambda x: 2 * x, lambda x: 3 * x, lambda x: -x], parts)
    assert [float(y) for y in found] == [2, 36, -136]


def test_heads_and_parts_are_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        cascade([torch.neg], [torch.ones(1), torch.ones(1)])


def test_equals_its_formula() -> None:
    cascaded, x = layer(), tokens()
    before, outputs = torch.zeros(2, 7, DIM // HEADS), []
    for i, share in enumerate(x.split(DIM // HEADS, -1)):
        q, k, v = cascaded.qkv[i](share + before).split([KEY, KEY, DIM // HEADS], -1)
        before = (q @ k.mT / KEY**0.5).softmax(-1) @ v
        outputs.append(before)
    expected = cascaded.o_proj(torch.cat(outputs, -1).clamp(min=0))
    torch.testing.assert_close(cascaded(x), expected, atol=1e-6, rtol=1e-5)


def test_one_head_is_attention() -> None:
    single, x = layer(num_heads=1), tokens()
    q, k, v = single.qkv[0](x)[:, None].split([KEY, KEY, DIM], -1)
    torch.testing.assert_close(single(x), single.o_proj(attend(q, k, v)[:, 0].relu()))


def test_a_channel_reaches_its_own_head_and_later_ones_only() -> None:
    cascaded, x = layer(), tokens()
    with capture(cascaded) as before:
        cascaded(x)
    changed = x.clone()
    changed[..., DIM // HEADS] += 1  # the first channel of the second share
    with capture(cascaded) as after:
        cascaded(changed)
    same = [torch.equal(a.weights, b.weights) for a, b in zip(before.values(), after.values(), strict=True)]
    assert same == [True, False, False]


def test_uneven_shares_are_a_message() -> None:
    with pytest.raises(AttentionError, match="25 channels cannot be shared out evenly to 3 heads"):
        create_attention("cascaded", 25, num_heads=3)
