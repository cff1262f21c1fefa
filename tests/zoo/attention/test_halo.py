"""Blocked local attention: its definition said a second time, with border, stride and relative logits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attention import AttentionError, attend, backend, capture
from zoo.attention.halo import Halo, Near, with_offsets
from zoo.attention.layers.halo import HaloAttention


@st.composite
def halos(draw: st.DrawFn) -> Halo:
    axes = draw(st.integers(1, 3))
    shape = [draw(st.integers(1, {1: 40, 2: 11, 3: 5}[axes])) for _ in range(axes)]
    stride = [draw(st.integers(1, 3)) for _ in range(axes)]
    block = [s * draw(st.integers(1, 3)) for s in stride]
    halo = [draw(st.integers(0, 3)) for _ in range(axes)]
    return Halo(shape, block, halo, stride=stride, bordered=draw(st.booleans()))


def inputs(pattern: Halo, width: int = 4) -> list[Tensor]:
    """Queries and keys `(2, 2, N, D)`, values of another width, the border included."""
    draw = torch.Generator().manual_seed(0)
    (q,) = torch.randn(1, 2, 2, _count(pattern.queries), width, generator=draw)
    k, v = (torch.randn(2, 2, _count(pattern.keys), d, generator=draw) for d in (width, 3))
    return [x.requires_grad_() for x in (q, k, v)]


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


@settings(max_examples=30, deadline=None)
@given(halos())
def test_halo_equals_plain_python(pattern: Halo) -> None:
    queries = list(product(*(range(n) for n in pattern.queries)))
    keys = list(product(*(range(n) for n in pattern.keys)))
    block, halo, stride = (pattern.options[name] for name in ("block", "halo", "stride"))

    def sees(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
        for place, key, size, beyond, step in zip(q, k, block, halo, stride, strict=True):
            first = place * step // size * size
            key = key - beyond if pattern.bordered else key
            if not first - beyond <= key < first + size + beyond:
                return False
        return True

    expected = torch.tensor([[sees(q, k) for k in keys] for q in queries])
    mask = pattern.mask(1, len(queries), len(keys), torch.device("cpu"))
    assert mask is not None
    assert torch.equal(mask[0, 0], expected)


@settings(max_examples=20, deadline=None)
@given(halos())
def test_tiles_equal_the_definition_forward_and_backward(pattern: Halo) -> None:
    leaves = inputs(pattern)
    results = []
    for name in ("reference", "blocked", "sdpa"):
        with backend(name):
            out = attend(*leaves, pattern=pattern)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[2], results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "reach"), [((20,), 3), ((9, 13), 1), ((3, 17), 2), ((4, 2, 5), 1)])
def test_near_tokens_are_those_within_reach_on_each_axis(shape: tuple[int, ...], reach: int) -> None:
    pattern, tokens = Near(shape, reach), _count(shape)
    cells = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(tokens, -1)
    expected = ((cells[:, None] - cells).abs() <= reach).all(-1)
    mask = pattern.mask(1, tokens, tokens, torch.device("cpu"))
    assert mask is not None
    assert torch.equal(mask[0, 0], expected)
    q, k, v = torch.randn(3, 2, 2, tokens, 4)
    with backend("reference"):
        wanted = attend(q, k, v, pattern=pattern)
    torch.testing.assert_close(attend(q, k, v, pattern=pattern), wanted)


@pytest.mark.parametrize("bordered", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_add_the_product_with_the_vector_of_the_distance(bordered: bool, stride: int) -> None:
    pattern = Halo((5, 7), 4, (1, 2), stride=stride, bordered=bordered)
    q, k, v = inputs(pattern)
    tables = [torch.randn(2 * axis.window - 1, 4) for axis in pattern.axes]
    out = attend(*with_offsets(q, k, tables, pattern), v, pattern=pattern, scale=1.0)
    bias = torch.zeros(2, 2, q.shape[2], k.shape[2])
    cells = [list(product(*(range(n) for n in shape))) for shape in (pattern.queries, pattern.keys)]
    for (i, query), (j, key) in product(enumerate(cells[0]), enumerate(cells[1])):
        for axis, table, y, x in zip(pattern.axes, tables, query, key, strict=True):
            window_begins = y // axis.rows * 4 - (0 if bordered else axis.halo)
            distance = x - window_begins - y % axis.rows
            if 0 <= x - window_begins < axis.window:
                bias[:, :, i, j] += q[:, :, i] @ table[distance + axis.window - 1]
    torch.testing.assert_close(out, attend(q, k, v, pattern=pattern, bias=bias, scale=1.0))


def test_border_puts_zeros_around_the_grid_of_full_blocks() -> None:
    pattern = Halo((3, 5), 2, 1, bordered=True)
    x = torch.randn(1, 1, 15, 2)
    y = pattern.border(x).unflatten(2, pattern.keys)
    assert y.shape == (1, 1, 6, 8, 2)
    assert torch.equal(y[:, :, 1:4, 1:6], x.unflatten(2, (3, 5)))
    assert y.abs().sum() == x.abs().sum()


class _Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_memory_is_linear_in_the_tokens() -> None:
    layer = HaloAttention(16, 2, shape=(32, 32))
    found = []
    for side in (32, 64):
        layer.shape = (side, side)
        with _Largest() as largest:
            layer(torch.randn(1, side * side, 16)).sum().backward()
        found.append(largest.entries)
    assert found[1] == 4 * found[0] < 32**4


def test_captured_maps_are_of_tokens() -> None:
    layer = HaloAttention(8, 2, shape=(6, 6), block=3, halo=1).eval()
    with capture(layer) as maps:
        layer(torch.randn(1, 36, 8))
    weights = maps["HaloAttention"].weights
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 36))
    assert (weights[0, :, 0].unflatten(-1, (6, 6))[:, 4:] == 0).all()


def test_mistakes_are_told() -> None:
    with pytest.raises(AttentionError, match="a block of 8 is not divisible by a stride of 3"):
        Halo((16, 16), 8, 3, stride=3)
    with pytest.raises(AttentionError, match="at least one token"):
        Halo(16, 8, -1)
    with pytest.raises(AttentionError, match="1 to 3 axes"):
        Halo((2, 2, 2, 2), 1, 0)
    with pytest.raises(AttentionError, match="do not fill grids"):
        attend(*torch.randn(3, 1, 1, 15, 4), pattern=Halo((4, 4), 2, 1))
    with pytest.raises(AttentionError, match="7 tokens do not fill a grid"):
        HaloAttention(8, 2, shape=(3, 3))(torch.zeros(1, 7, 8))
