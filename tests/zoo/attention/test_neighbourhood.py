"""Neighbourhoods, shifted windows and shifted groups: their definition said a second time; their limits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attention import AttentionError, Causal, Padding, Pattern, Window, attend, backend, capture
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.layers.neighbourhood import NeighbourhoodAttention, ShiftedWindowAttention
from zoo.attention.layers.window import LocalAttention, ShiftedSparse
from zoo.attention.merge import merge
from zoo.attention.neighbourhood import Neighbourhood, ShiftedWindows


def seen_on_axis(axis: tuple[int, int, int, int, bool], i: int) -> set[int]:
    """The keys of query i, by plain Python: within its residue class, the window of its group's leader."""
    n, w, d, s, causal = axis
    members = list(range(i % d, n, d))
    place = members.index(i)
    group = list(range(len(members)))[place - place % s :][:s]
    if causal:
        return {members[p] for p in range(max(group[-1] - w + 1, 0), place + 1)}
    leader = min(group[0] + s // 2, len(members) - 1)
    start = max(0, min(leader - w // 2, len(members) - w))
    return set(members[start : start + w])


@st.composite
def neighbourhoods(draw: st.DrawFn) -> Neighbourhood:
    axes = draw(st.integers(1, 3))
    shape, options = [], []
    for _ in range(axes):
        n = draw(st.integers(1, {1: 140, 2: 20, 3: 6}[axes]))
        d = draw(st.integers(1, min(n, 3)))
        w = draw(st.integers(1, n // d))
        shape.append(n)
        options.append((w, d, draw(st.integers(1, w)), draw(st.booleans())))
    w, d, s, causal = zip(*options, strict=True)
    return Neighbourhood(shape, w, dilation=d, stride=s, causal=causal)


def dense(pattern: Pattern, tokens: int) -> Tensor:
    mask = pattern.mask(1, tokens, tokens, torch.device("cpu"))
    assert mask is not None
    return mask[0, 0]


def leaves(
    tokens: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, 6), (2, kv_heads, tokens, 6), (2, kv_heads, tokens, 5)]
    return [torch.randn(*shape, generator=g, dtype=dtype).requires_grad_() for shape in shapes]


def outputs(name: str, pattern: Pattern, inputs: list[Tensor]) -> list[Tensor]:
    with backend(name):
        out = attend(*inputs, pattern=pattern)
    return [out, *torch.autograd.grad(out.square().sum(), inputs)]


@settings(max_examples=30, deadline=None)
@given(neighbourhoods())
def test_neighbourhood_equals_plain_python(pattern: Neighbourhood) -> None:
    options = [pattern.options[name] for name in ("kernel", "dilation", "stride", "causal")]
    axes = list(zip(pattern.shape, *options, strict=True))
    cells = list(product(*(range(n) for n in pattern.shape)))
    place = {cell: i for i, cell in enumerate(cells)}
    expected = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for cell in cells:
        on_axes = [seen_on_axis(axis, i) for axis, i in zip(axes, cell, strict=True)]
        for key in product(*on_axes):
            expected[place[cell], place[key]] = True
    assert torch.equal(dense(pattern, len(cells)), expected)


@settings(max_examples=30, deadline=None)
@given(neighbourhoods(), st.sampled_from(["sdpa", "blocked"]))
def test_tiles_equal_the_dense_mask(pattern: Neighbourhood, name: str) -> None:
    inputs = leaves(pattern.tokens)
    for ours, theirs in zip(
        outputs(name, pattern, inputs), outputs("reference", pattern, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from(["sdpa", "blocked"]))
def test_shifted_windows_equal_plain_python(data: st.DataObject, axes: int, name: str) -> None:
    shape = [data.draw(st.integers(1, {1: 40, 2: 9, 3: 5}[axes])) for _ in range(axes)]
    size = [data.draw(st.integers(1, 5)) for _ in range(axes)]
    shift = [data.draw(st.integers(0, m - 1)) for m in size]
    pattern = ShiftedWindows(shape, size, shift=shift)
    # A window starts at the border, and wherever `shift` plus a multiple of its size falls.
    cells = [
        tuple(
            sum(x >= c for c in range(s, n + 1, m))
            for x, n, m, s in zip(cell, shape, size, shift, strict=True)
        )
        for cell in product(*(range(n) for n in shape))
    ]
    assert dense(pattern, len(cells)).tolist() == [[a == b for b in cells] for a in cells]
    inputs = leaves(len(cells))
    for ours, theirs in zip(
        outputs(name, pattern, inputs), outputs("reference", pattern, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


PATTERNS = {
    "2d": Neighbourhood((9, 11), (3, 4), dilation=(2, 1), stride=(2, 1)),
    "causal": Neighbourhood((9, 11), 3, causal=(True, False)),
    "windows": ShiftedWindows((9, 11), 4, shift=(2, 1)),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_block_mask_of_flex_is_the_mask(name: str) -> None:
    pattern = PATTERNS[name]
    rule = pattern.rule(99, 99)
    mask = create_block_mask(rule, 1, None, 99, 99, device="cpu", BLOCK_SIZE=1)
    assert torch.equal(mask.to_dense()[0, 0].bool(), dense(pattern, 99))


@pytest.mark.parametrize("name", PATTERNS)
def test_joins_with_padding(name: str) -> None:
    real = torch.rand(2, 99, generator=torch.Generator().manual_seed(0)) > 0.4
    real[1] = False
    pattern, inputs = Padding(real) & PATTERNS[name], leaves(99)
    found = outputs("sdpa", pattern, inputs)
    for ours, theirs in zip(found, outputs("reference", pattern, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not found[0][1].any()


@pytest.mark.parametrize("name", PATTERNS)
def test_captured_map_is_the_softmax_of_what_is_seen(name: str) -> None:
    q, k, v = leaves(99, kv_heads=4)
    with capture() as maps:
        _Module()(q, k, v, PATTERNS[name])
    (found,) = maps.values()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~dense(PATTERNS[name], 99), -torch.inf)
    torch.testing.assert_close(found.weights, scores.softmax(-1))


class _Module(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Tensor:
        return attend(q, k, v, pattern=pattern)


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
@pytest.mark.parametrize("case", PATTERNS)
def test_gradcheck(case: str, name: str) -> None:
    inputs = [x.detach()[:1, :1].requires_grad_() for x in leaves(99, 1, 1, torch.float64)]
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda q, k, v: attend(q, k, v, pattern=PATTERNS[case]), inputs, fast_mode=True
        )


def test_reductions() -> None:
    inputs = leaves(30)

    def same(first: Pattern | None, second: Pattern | None) -> None:
        torch.testing.assert_close(attend(*inputs, pattern=first), attend(*inputs, pattern=second))

    same(Neighbourhood((5, 6), (5, 6)), None)
    same(Neighbourhood(30, 30, causal=True), Causal())
    same(Neighbourhood(30, 7, causal=True), Window(7, causal=True))
    same(Neighbourhood((5, 6), (5, 3), stride=(5, 3)), ShiftedWindows((5, 6), (5, 3)))
    same(Neighbourhood((5, 6), (1, 3)), Neighbourhood((5, 6, 1), (1, 3, 1)))


def test_further_keys_join_by_their_log_sum_exp() -> None:
    """Tokens that all queries see beside their neighbourhood (the additional keys of NATTEN)."""
    q, k, v = leaves(30, kv_heads=4)
    more_k, more_v = torch.randn(2, 4, 3, 6), torch.randn(2, 4, 3, 5)
    pattern = Neighbourhood((5, 6), 3)
    near, far = attend(q, k, v, pattern=pattern, return_lse=True), attend(q, more_k, more_v, return_lse=True)
    found = merge(near, far)[0]
    mask = torch.cat([dense(pattern, 30), torch.ones(30, 3, dtype=torch.bool)], 1)
    keys, values = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2)
    torch.testing.assert_close(found, scaled_dot_product_attention(q, keys, values, attn_mask=mask))


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, tuple | list) else [result]
        self.bytes = max(
            [self.bytes, *(x.untyped_storage().nbytes() for x in found if isinstance(x, Tensor))]
        )
        return result


@pytest.mark.parametrize(
    "made",
    [
        lambda n: Neighbourhood((n, 32), 7),
        lambda n: Neighbourhood((n, 32), 3, dilation=4, stride=2),
        lambda n: Neighbourhood((n // 4, 16, 8), (3, 3, 5), causal=(True, False, False)),
        lambda n: Neighbourhood(32 * n, 65),
        lambda n: ShiftedWindows((n, 32), 7, shift=3),
    ],
    ids=["2d", "dilated", "3d", "1d", "windows"],
)
def test_memory_is_linear_in_the_tokens(made: Callable[[int], Pattern]) -> None:
    """Forward and backward, from 2k to 8k tokens: no tensor grows by more than the factor of four."""
    sizes = []
    for n in (64, 256):
        q, k, v = (torch.randn(1, 1, 32 * n, 8, requires_grad=True) for _ in range(3))
        with Largest() as largest:
            attend(q, k, v, pattern=made(n)).sum().backward()
        sizes.append(largest.bytes)
    assert 2 * sizes[0] < sizes[1] < 4.4 * sizes[0]


LAYERS: dict[str, Callable[[], AttentionLayer]] = {
    "local": lambda: LocalAttention(16, 4, window=5),
    "local_causal": lambda: LocalAttention(16, 4, num_kv_heads=2, window=4, causal=True),
    "s2": lambda: ShiftedSparse(16, 4, num_kv_heads=2, rope_theta=1e4),
    "s2_mqa": lambda: ShiftedSparse(18, 3, num_kv_heads=1, num_groups=3),
    "neighbourhood": lambda: NeighbourhoodAttention(16, 4, kernel=3, shape=(3, 4)),
    "neighbourhood_causal": lambda: NeighbourhoodAttention(16, 4, kernel=3, dilation=2, causal=True),
    "shifted_window": lambda: ShiftedWindowAttention(16, 4, window=2, shift=1, shape=(3, 4)),
}


def made(name: str) -> tuple[AttentionLayer, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    return layer, torch.randn(2, 12, layer.dim)


@pytest.mark.parametrize("name", [name for name in LAYERS if "causal" in name or "s2" in name])
@pytest.mark.parametrize("training", [True, False])
def test_layers_are_causal(name: str, training: bool) -> None:
    layer, x = made(name)
    layer.train(training)
    later = x.clone()
    later[:, 7:] += 1
    torch.testing.assert_close(layer(x)[:, :7], layer(later)[:, :7])
    assert not torch.allclose(layer(x)[:, 7:], layer(later)[:, 7:])


@pytest.mark.parametrize("name", [name for name in LAYERS if "causal" in name or "s2" in name])
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 1, 6), (12,)])
def test_steps_equal_the_full_forward(name: str, chunks: tuple[int, ...]) -> None:
    layer, x = made(name)
    layer.eval()
    cache = layer.init_cache(2)
    steps = [layer.step(part, cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))


def test_the_cache_of_a_neighbourhood_keeps_its_reach_only() -> None:
    layer = NeighbourhoodAttention(8, 2, kernel=3, dilation=2, causal=True)
    cache = layer.init_cache(1)
    sizes = [(layer.step(torch.randn(1, 1, 8), cache), cache.nbytes())[1] for _ in range(9)]
    assert sizes[-1] == sizes[5] == 4 * 8 * 2 * 4  # 4 keys and 4 values of 8 channels


@pytest.mark.parametrize("name", ["local", "local_causal"])
def test_padding_and_packing_equal_the_rows_alone(name: str) -> None:
    layer, x = made(name)
    real = torch.arange(12) < torch.tensor([[12], [5]])
    torch.testing.assert_close(layer(x, mask=real)[1, :5], layer(x[1:, :5])[0])
    packed = layer(x, mask=torch.tensor([[0] * 5 + [1] * 7] * 2))
    torch.testing.assert_close(packed[:, :5], layer(x[:, :5]))
    torch.testing.assert_close(packed[:, 5:], layer(x[:, 5:]))


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_a_window_longer_than_the_row_sees_what_is_there(tokens: int, causal: bool) -> None:
    layer = LocalAttention(8, 2, window=5, causal=causal)
    x = torch.randn(1, tokens, 8)
    q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    apart = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (apart >= 0 if causal else apart.abs() <= 2) & (apart < 5)
    scores = (q @ k.mT / 2).masked_fill(~seen, -torch.inf)
    expected = layer.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_s2_groups() -> None:
    """Without the shift it would be groups; each head is seen through the tokens that its output follows."""
    layer, x = made("s2")
    x.requires_grad_()
    with capture() as maps:
        layer(x)
    still, moved = (m.weights[0].sum(0) > 0 for m in maps.values())
    groups = [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    shifted = [0] + [1] * 3 + [2] * 3 + [3] * 3 + [4] * 2
    for found, ids in ((still, groups), (moved, shifted)):
        assert found.tolist() == [[a == b and j <= i for j, b in enumerate(ids)] for i, a in enumerate(ids)]


def test_s2_in_evaluation_is_full_causal_attention() -> None:
    layer, x = made("s2")
    full = MultiHead(16, 4, num_kv_heads=2, rope_theta=1e4, causal=True)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), full(x))
    one_group = ShiftedSparse(16, 4, num_kv_heads=2, rope_theta=1e4, num_groups=1, wrap=True)
    one_group.load_state_dict(layer.state_dict())
    assert not torch.allclose(one_group(x), full(x))  # the future comes in


@pytest.mark.parametrize("sinks", [1, 4, 12, 20])
def test_s2_groups_see_the_sinks(sinks: int) -> None:
    """By the definition: one softmax over a query's group, and the first tokens, up to itself."""
    layer = ShiftedSparse(16, 4, num_kv_heads=2, sinks=sinks).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.rand(2, 12) < 0.7
    q, k, v = (
        p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k, v = (y.repeat_interleave(2, 1) for y in (k, v))
    place = torch.arange(12)
    groups = torch.stack([place // 3] * 2 + [(place - 1) // 3] * 2)
    seen = (groups[:, :, None] == groups[:, None]) | (place < sinks)
    seen = seen & (place <= place[:, None]) & mask[:, None, None]
    weights = (q @ k.mT / 2).masked_fill(~seen, -1e30).softmax(-1) * seen
    expected = layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, mask=mask), expected)
    gradients = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(g.isfinite().all() for g in gradients)


def test_s2_of_sinks_only_is_full_causal_attention() -> None:
    layer, x = ShiftedSparse(16, 4, rope_theta=1e4, sinks=12), torch.randn(2, 12, 16)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_one_matrix_gives_queries_keys_and_values_head_by_head() -> None:
    layer, x = made("neighbourhood")
    assert isinstance(layer, NeighbourhoodAttention)
    weight, bias = layer.qkv.weight.view(3, 4, 4, 16), layer.qkv.bias.view(3, 4, 4)
    q, k, v = torch.einsum("bnc,thdc->tbhnd", x, weight) + bias[:, None, :, None]
    out = attend(q, k, v, pattern=Neighbourhood((3, 4), 3))
    torch.testing.assert_close(layer(x), layer.proj(out.transpose(1, 2).reshape(2, 12, 16)))


def test_shifted_window_padding_equals_the_row_alone() -> None:
    layer = ShiftedWindowAttention(8, 2, window=4, shift=1)
    x = torch.randn(2, 13, 8)
    real = torch.arange(13) < torch.tensor([[13], [6]])
    torch.testing.assert_close(layer(x, mask=real)[1, :6], layer(x[1:, :6])[0])


@pytest.mark.parametrize("name", ["s2", "neighbourhood", "shifted_window"])
def test_training_compiles_without_graph_break(name: str) -> None:
    torch.compiler.reset()
    layer, x = made(name)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_bf16_autocast_is_close_to_float32(name: str) -> None:
    layer, x = made(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = layer(x)
    torch.testing.assert_close(half.float(), layer(x), atol=2e-2, rtol=5e-2)


X = torch.zeros(1, 10, 8)


def bad(message: str, call: Callable[[], object]) -> object:
    return pytest.param(message, call, id=message)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        bad("kernel 5 x dilation 2 is larger", lambda: Neighbourhood((9, 12), 5, dilation=2)),
        bad("stride 4 is larger than the kernel 3", lambda: Neighbourhood(9, 3, stride=4)),
        bad("positive, not 3, 0, 1", lambda: Neighbourhood(9, 3, dilation=0)),
        bad("1 to 3 axes", lambda: Neighbourhood((2, 2, 2, 2), 1)),
        bad("kernel (3, 3) does not give one value", lambda: Neighbourhood((4, 4, 4), (3, 3))),
        bad("cannot be shifted by 4", lambda: ShiftedWindows(12, 4, shift=4)),
        bad("do not fit Nq = 10", lambda: attend(*[X[:, None]] * 3, pattern=Neighbourhood((3, 4), 3))),
        bad("do not fill a grid", lambda: NeighbourhoodAttention(8, 2, shape=(3, 4), kernel=3)(X)),
        bad("kernel 11 x dilation 1", lambda: NeighbourhoodAttention(8, 2, kernel=11)(X)),
        bad("not divisible by 3 heads", lambda: ShiftedWindowAttention(8, 3)),
        bad("one axis, causal", lambda: NeighbourhoodAttention(8, 2).init_cache(1)),
        bad("odd unless causal", lambda: LocalAttention(8, 2, window=4)),
        bad("not divisible into 4 groups", lambda: ShiftedSparse(8, 2)(X)),
        bad("at least one group and two heads", lambda: ShiftedSparse(8, 1)),
        bad("causal=True, window=None", lambda: ShiftedSparse(8, 2, causal=False)),
        bad("go with wrap=False", lambda: ShiftedSparse(8, 2, wrap=True, sinks=1)),
        bad(
            "sinks=0",
            lambda: ShiftedSparse(8, 2, num_groups=2, sinks=1)(X, mask=torch.zeros(X.shape[:2]).long()),
        ),
        bad("takes full rows only", lambda: ShiftedSparse(8, 2, wrap=True)(X, mask=X[..., 0] == 0)),
        bad("call eval()", lambda: _decoded_in_training()),
    ],
)
def test_mistakes_are_told(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(AttentionError) as error:
        call()
    assert message in str(error.value)


def _decoded_in_training() -> None:
    layer = ShiftedSparse(8, 2)
    cache = layer.init_cache(1)
    layer.step(X[:, :4], cache)
    layer.step(X[:, :4], cache)
