"""Pools with weights: their formulas, extremes, and messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.attention import capture
from zoo.errors import ConfigError
from zoo.layers.pool import AttentivePool, GGeM, create_pool


def test_ggem_is_a_power_mean_of_each_group() -> None:
    pool = GGeM(12, groups=3)
    with torch.no_grad():
        pool.p.copy_(torch.tensor([1.0, 3.0, -2.0]))
    x = torch.rand(2, 7, 12) + 0.1
    for part, found, p in zip(x.split(4, 2), pool(x).split(4, 1), pool.p, strict=True):
        torch.testing.assert_close(found, part.pow(p).mean(1).pow(1 / p))


def test_ggem_stays_in_range_where_powers_do_not() -> None:
    pool = GGeM(4, groups=1, p=40.0)
    x = torch.tensor([[[1e-5, 1e4, -3.0, 1e-7], [1e-6, 1.0, -1.0, 0.0]]], requires_grad=True)
    out = pool(x)
    torch.testing.assert_close(
        out[0], torch.tensor([1e-5, 1e4, 1e-6, 1e-6]) * 2 ** (-1 / 40 * torch.tensor([1.0, 1, 0, 0]))
    )
    out.sum().backward()
    assert x.grad is not None
    assert pool.p.grad is not None
    assert x.grad.isfinite().all()
    assert pool.p.grad.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(pool(x), out)


@pytest.mark.parametrize(
    "options",
    [{"num_queries": 3}, {"num_queries": 2, "num_heads": 3, "d_out": 2}, {"num_queries": 1, "num_heads": 4}],
)
@pytest.mark.parametrize("key_projection", [False, True])
def test_attentive_pool_is_attention_of_each_query_to_its_share(options: dict, key_projection: bool) -> None:
    pool = AttentivePool(24, key_projection=key_projection, bias=True, **options)
    nn.init.normal_(pool.queries)
    x = torch.randn(2, 9, 24)
    heads, width = pool.num_heads, 24 // pool.num_heads
    keys = (x if pool.k is None else pool.k(x)).view(2, 9, heads, width)
    q = pool.queries.view(-1, heads, width)
    weights = (torch.einsum("mhd,bnhd->bmhn", q, keys) * width**-0.5).softmax(-1)
    values = pool.v(x).view(2, 9, pool.num_queries, heads, -1)
    expected = torch.einsum("bmhn,bnmhd->bmhd", weights, values).flatten(1)
    torch.testing.assert_close(pool(x), expected)
    with capture() as maps:
        pool(x)
    (found,) = maps.values()
    torch.testing.assert_close(found.weights, weights.transpose(1, 2))


def test_half_precision_compiling_and_export() -> None:
    for pool in (GGeM(16), AttentivePool(16, num_queries=4)):
        x = torch.rand(2, 5, 16)
        expected = pool(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(pool(x).float(), expected, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(torch.compile(pool, fullgraph=True, backend="eager")(x), expected)
        sizes = {
            "x": {0: torch.export.Dim("batch", min=1, max=9), 1: torch.export.Dim("tokens", min=2, max=99)}
        }
        other = torch.rand(3, 7, 16)
        exported = torch.export.export(pool, (x,), dynamic_shapes=sizes).module()
        torch.testing.assert_close(exported(other), pool(other))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ("gem", r"no pool 'gem'. Did you mean 'ggem'"),
        ({"name": "ggem", "group": 2}, r"no argument 'group'. Did you mean 'groups'"),
        ({"name": "ggem", "groups": 5}, "16 channels cannot be shared out evenly to 5 groups"),
        ({"name": "ggem", "p": 0}, "exponent is not 0"),
        (
            {"name": "attentive", "num_queries": 5},
            r"multiple of d_out \* num_queries \* num_heads = 1 \* 5 \* 1",
        ),
        ({"name": "attentive", "num_heads": 0}, "at least 1"),
    ],
)
def test_what_a_pool_cannot_be_is_told(pool: str | dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_pool(pool, 16)
