"""Routed regions: the definition by plain Python, the cheap ways, memory, messages."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch import Tensor

import zoo.attention.routed as routed
from zoo.attention import AttentionError, attend, backend, capture
from zoo.attention.layers.regions import BiLevelRouting
from zoo.attention.routed import Routed, attend_regions, route
from zoo.bench.memory import peak_memory

GRIDS = [
    pytest.param((6, 8), (2, 4), 2, id="wide"),
    pytest.param((8, 6), (4, 2), 1, id="one region"),
    pytest.param((8, 8), (2, 2), 7, id="small regions, in one product"),
    pytest.param((6, 6), (1, 1), 36, id="all tokens"),
    pytest.param((12, 12), (6, 3), 8, id="all regions"),
]


def problem(
    shape: tuple[int, int], size: tuple[int, int], chosen: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, regions = shape[0] * shape[1], shape[0] * shape[1] // (size[0] * size[1])
    q, k = (torch.randn(2, 2, tokens, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 2, tokens, 5, dtype=dtype, requires_grad=True)
    return q, k, v, torch.rand(2, regions, regions).topk(chosen).indices


def region(token: int, shape: tuple[int, int], size: tuple[int, int]) -> int:
    row, column = divmod(token, shape[1])
    return row // size[0] * (shape[1] // size[1]) + column // size[1]


@pytest.mark.parametrize(("shape", "size", "chosen"), GRIDS)
def test_a_token_sees_the_tokens_of_the_regions_of_its_region(
    shape: tuple[int, int], size: tuple[int, int], chosen: int
) -> None:
    q, _, _, index = problem(shape, size, chosen)
    tokens = q.shape[2]
    expected = [
        [
            [region(j, shape, size) in index[b, region(i, shape, size)].tolist() for j in range(tokens)]
            for i in range(tokens)
        ]
        for b in range(2)
    ]
    pattern = Routed(index, shape, size)
    assert torch.equal(pattern.mask(2, tokens, tokens, q.device)[:, 0], torch.tensor(expected))
    rule = pattern.rule(tokens, tokens)
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    by_rule = [rule(torch.tensor(b), torch.tensor(0), i, j) for b in range(2)]
    assert torch.equal(torch.stack(by_rule), torch.tensor(expected))


@pytest.mark.parametrize(("shape", "size", "chosen"), GRIDS)
@pytest.mark.parametrize("name", ["blocked", "sdpa"])
def test_every_backend_is_the_definition(
    name: str, shape: tuple[int, int], size: tuple[int, int], chosen: int
) -> None:
    q, k, v, index = problem(shape, size, chosen)
    pattern = Routed(index, shape, size)
    results = []
    for which in ("reference", name):
        with backend(which):
            out, lse = attend(q, k, v, pattern=pattern, return_lse=True)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(results[1], results[0])


def test_strips_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, size = (12, 8), (2, 4)
    q, k, v, index = problem(shape, size, 3)
    results = []
    for gathered in (routed.GATHERED, 1, 2 * 3 * 2 * 8 * 2 * 8):
        monkeypatch.setattr(routed, "GATHERED", gathered)
        out = attend_regions(q, k, v, index, shape, size, scale=0.3)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        with torch.no_grad():
            torch.testing.assert_close(attend_regions(q, k, v, index, shape, size, scale=0.3), out)
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_captured_weights_are_those_of_the_definition() -> None:
    shape, size = (6, 8), (2, 4)
    q, k, v, index = problem(shape, size, 2)
    with torch.no_grad(), capture() as maps:
        attend_regions(q, k, v, index, shape, size)
    with torch.no_grad(), capture() as expected, backend("reference"):
        attend(q, k, v, pattern=Routed(index, shape, size))
    torch.testing.assert_close(maps["attend"].weights, expected["attend"].weights)


def test_memory_does_not_grow_with_the_regions_chosen() -> None:
    """Keys and values of 16 regions each would be 16 copies of them: 128 MiB."""
    shape, size = (112, 112), (16, 16)
    q = torch.randn(1, 2, 112 * 112, 40)
    index = torch.rand(1, 49, 49).topk(16).indices
    with torch.no_grad():
        few = peak_memory(lambda: attend_regions(q, q, q, index[..., :4], shape, size), q.device)
        many = peak_memory(lambda: attend_regions(q, q, q, index, shape, size), q.device)
    assert many < 1.5 * few
    assert many < 48 * 2**20


def test_route_finds_the_best_regions_first() -> None:
    queries, keys = torch.randn(2, 9, 4), torch.randn(2, 9, 4)
    products, index = route(queries, keys, 3)
    expected = (queries[:, :, None] * keys[:, None]).sum(-1).sort(-1, descending=True)
    torch.testing.assert_close(products, expected.values[..., :3])
    assert torch.equal(index, expected.indices[..., :3])
    with pytest.raises(AttentionError, match="10 regions to choose, but the grid has 9"):
        route(queries, keys, 10)


def test_what_does_not_fit_is_told() -> None:
    q, k, v, index = problem((6, 8), (2, 4), 2)
    with pytest.raises(AttentionError, match="not divisible into regions"):
        Routed(index, (6, 8), (4, 4))
    with pytest.raises(AttentionError, match="int64"):
        Routed(index.float(), (6, 8), (2, 4))
    with pytest.raises(AttentionError, match="does not fit B = 2, Nq = 48"):
        attend(q, k, v, pattern=Routed(index[:1], (6, 8), (2, 4)))
    with pytest.raises(AttentionError, match=r"keys do not fill a grid of \(12, 8\)"):
        attend(q, k, v, pattern=Routed(index, (12, 8), (2, 4)))


@pytest.mark.parametrize(("shape", "regions"), [((12,), 4), ((4, 6), 2), ((5, 7), 3), ((11,), 3)])
def test_layer_with_all_regions_is_full_attention(shape: tuple[int, ...], regions: int) -> None:
    x = torch.randn(2, prod(shape), 16, requires_grad=True)
    layer = BiLevelRouting(16, 2, regions=regions, topk=regions**2, shape=shape)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in layer.qkv(x).chunk(3, -1))
    expected = layer.proj(attend(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_layer_looks_at_the_best_regions_alone() -> None:
    layer = BiLevelRouting(16, 2, regions=3, topk=1)
    x = torch.randn(1, 9, 16)
    with torch.no_grad(), capture() as maps:
        layer(x)
        q, k = layer.qkv(x)[..., :32].unflatten(1, (3, 3)).mean(2).chunk(2, -1)
    seen = maps["BiLevelRouting"].weights[0, 0] > 0
    best = (q @ k.transpose(1, 2)).argmax(-1)[0]
    expected = torch.arange(9) // 3 == best.repeat_interleave(3)[:, None]
    assert torch.equal(seen, expected)
    with pytest.raises(AttentionError, match="one or two axes"):
        BiLevelRouting(16, 2, shape=(2, 2, 2))
