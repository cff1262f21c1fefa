"""Every backend computes the definition, forward and backward, on every pattern and kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zoo.attention import (
    AttentionError,
    Causal,
    Dense,
    EqualGroups,
    Groups,
    Neighbours,
    OrderedGroups,
    Padding,
    Pattern,
    ShiftedGroups,
    TopKSoftmax,
    Window,
    attend,
    backend,
    softmax,
)
from zoo.attention import backends as backends_module

BATCH, HEADS, KV_HEADS, TOKENS, WIDTH, VALUE_WIDTH = 2, 4, 2, 12, 6, 5

REAL = [[True] * 5 + [False] * 4 + [True] * 3, [False] * TOKENS]
IDS = [3, 0, 3, 7, 0, 3, 3, 7, 0, 5, 3, 3]
IDS_BY_ENTRY = [IDS, [1, 1, 1, 2, 2, 1, 1, 2, 2, 2, 1, 2]]
ORDER = [7, 3, 11, 0, 5, 2, 9, 1, 10, 4, 6, 8]
NEIGHBOURS = [
    [1, -1, -1],
    [0, 2, 4],
    [-1, -1, -1],
    [3, 2, 11],
    *[[(i * 5) % 12, i - 1, -1] for i in range(4, 12)],
]


@dataclass(frozen=True)
class Case:
    """A pattern, and what a query may see said a second time, by plain Python."""

    pattern: Pattern
    sees: Callable[[int, int, int], bool]


CASES = {
    "dense": Case(Dense(), lambda b, i, j: True),
    "causal": Case(Causal(), lambda b, i, j: j <= i),
    "padding": Case(Padding(torch.tensor(REAL)), lambda b, i, j: REAL[b][j]),
    "causal_padding": Case(Causal() & Padding(torch.tensor(REAL)), lambda b, i, j: j <= i and REAL[b][j]),
    "window": Case(Window(5), lambda b, i, j: abs(i - j) <= 2),
    "causal_window": Case(Window(4, causal=True), lambda b, i, j: 0 <= i - j < 4),
    "window_padding": Case(
        Padding(torch.tensor(REAL)) & Window(3), lambda b, i, j: abs(i - j) <= 1 and REAL[b][j]
    ),
    "equal_groups": Case(EqualGroups(4), lambda b, i, j: i // 4 == j // 4),
    "causal_equal_groups": Case(EqualGroups(4) & Causal(), lambda b, i, j: i // 4 == j // 4 and j <= i),
    "groups": Case(Groups(torch.tensor(IDS)), lambda b, i, j: IDS[i] == IDS[j]),
    "groups_by_entry": Case(
        Groups(torch.tensor(IDS_BY_ENTRY)), lambda b, i, j: IDS_BY_ENTRY[b][i] == IDS_BY_ENTRY[b][j]
    ),
    "groups_padding": Case(
        Groups(torch.tensor(IDS)) & Padding(torch.tensor(REAL)),
        lambda b, i, j: IDS[i] == IDS[j] and REAL[b][j],
    ),
    "ordered_groups": Case(
        OrderedGroups(torch.tensor(ORDER), 5), lambda b, i, j: ORDER.index(i) // 5 == ORDER.index(j) // 5
    ),
    "causal_groups": Case(Groups(torch.tensor(IDS)) & Causal(), lambda b, i, j: IDS[i] == IDS[j] and j <= i),
    "causal_groups_by_entry": Case(
        Causal() & Groups(torch.tensor(IDS_BY_ENTRY)),
        lambda b, i, j: IDS_BY_ENTRY[b][i] == IDS_BY_ENTRY[b][j] and j <= i,
    ),
    "causal_ordered_groups": Case(
        OrderedGroups(torch.tensor(ORDER), 5) & Causal(),
        lambda b, i, j: ORDER.index(i) // 5 == ORDER.index(j) // 5 and j <= i,
    ),
    "shifted_groups": Case(ShiftedGroups(TOKENS, 5, 2), lambda b, i, j: (i - 2) // 5 == (j - 2) // 5),
    "causal_shifted_groups": Case(
        ShiftedGroups(TOKENS, 4, 3) & Causal(), lambda b, i, j: (i - 3) // 4 == (j - 3) // 4 and j <= i
    ),
    "neighbours": Case(Neighbours(torch.tensor(NEIGHBOURS)), lambda b, i, j: j in NEIGHBOURS[i]),
    "neighbours_by_entry": Case(
        Neighbours(torch.tensor([NEIGHBOURS, NEIGHBOURS[::-1]])),
        lambda b, i, j: j in (NEIGHBOURS if b == 0 else NEIGHBOURS[::-1])[i],
    ),
    "windowed_groups": Case(
        Window(5) & Groups(torch.tensor(IDS)), lambda b, i, j: abs(i - j) <= 2 and IDS[i] == IDS[j]
    ),
}

# How padding may stand beside what is causal.
UNMASKED: dict[str, Callable[[Padding], Pattern]] = {
    "causal_first": lambda padding: Causal() & padding,
    "padding_first": lambda padding: padding & Causal(),
    "twice": lambda padding: padding & Causal() & Padding(torch.tensor([REAL[0]])),
    "equal_groups": lambda padding: EqualGroups(4) & (Causal() & padding),
    "groups": lambda padding: CASES["causal_groups"].pattern & padding,
    "groups_by_entry": lambda padding: padding & CASES["causal_groups_by_entry"].pattern,
    "shifted_groups": lambda padding: padding & ShiftedGroups(TOKENS, 4, 3) & Causal(),
    "ordered_groups": lambda padding: OrderedGroups(torch.tensor(ORDER), 5) & padding & Causal(),
}


def tensors(dtype: torch.dtype = torch.float32, *, kv_heads: int = KV_HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the cases, as leaves."""
    sizes = ((HEADS, WIDTH), (kv_heads, WIDTH), (kv_heads, VALUE_WIDTH))
    q, k, v = (torch.randn(BATCH, heads, TOKENS, width).to(dtype).requires_grad_() for heads, width in sizes)
    return q, k, v


def visible(case: Case) -> Tensor:
    """Bool `(B, 1, N, N)` from `sees`."""
    tokens = range(TOKENS)
    return torch.tensor([[[[case.sees(b, i, j) for j in tokens] for i in tokens]] for b in range(BATCH)])


KERNELS = {"softmax": softmax, "top3": TopKSoftmax(3)}
# Rounding of inputs and output by the type, times values and gradients of order one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
CAN = [
    ("sdpa", "softmax"),
    ("blocked", "softmax"),
    ("blocked", "top3"),
    ("reference", "softmax"),
    ("reference", "top3"),
]


def forward_backward(inputs: tuple[Tensor, ...], cotangent: Tensor, **options) -> list[Tensor]:
    """Output and gradients of <output, cotangent>."""
    out = attend(*inputs[:3], **options)
    return [out, *torch.autograd.grad((out.to(cotangent.dtype) * cotangent).sum(), inputs)]


def wide(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("name", "kernel"), CAN)
@pytest.mark.parametrize("case", CASES)
def test_backend_equals_reference(case: str, name: str, kernel: str, dtype: torch.dtype) -> None:
    inputs = tensors(dtype)
    cotangent = torch.randn(BATCH, HEADS, TOKENS, VALUE_WIDTH).double()
    options = {"pattern": CASES[case].pattern, "kernel": KERNELS[kernel]}
    with backend("reference"):
        expected = forward_backward(tuple(map(wide, inputs)), cotangent, **options)
    with backend(name):
        found = forward_backward(inputs, cotangent, **options)
    assert found[0].dtype == dtype
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_sum_of_the_definition(case: str) -> None:
    """Against loops over batch, head and query, in float64."""
    q, k, v = tensors(torch.float64)
    bias = torch.randn(HEADS, TOKENS, TOKENS).double()
    seen = visible(CASES[case])[:, 0]
    expected = torch.zeros(BATCH, HEADS, TOKENS, VALUE_WIDTH).double()
    expected_lse = torch.full((BATCH, HEADS, TOKENS), -math.inf).double()
    for b in range(BATCH):
        for h in range(HEADS):
            for i in range(TOKENS):
                keys = seen[b, i].nonzero()[:, 0]
                if len(keys):
                    g = h // (HEADS // KV_HEADS)
                    scores = 0.3 * k[b, g, keys] @ q[b, h, i] + bias[h, i, keys]
                    expected[b, h, i] = scores.softmax(0) @ v[b, g, keys]
                    expected_lse[b, h, i] = scores.logsumexp(0)
    with backend("reference"):
        out, lse = attend(q, k, v, pattern=CASES[case].pattern, bias=bias, scale=0.3, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (HEADS, 1, TOKENS), (BATCH, 1, TOKENS, TOKENS)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bias_and_its_gradient_equal_reference(case: str, shape: tuple[int, ...], name: str) -> None:
    inputs = (*tensors(), bias := torch.randn(shape, requires_grad=True))
    cotangent = torch.randn(BATCH, HEADS, TOKENS, VALUE_WIDTH)
    with backend("reference"):
        expected = forward_backward(inputs, cotangent, pattern=CASES[case].pattern, bias=bias)
    with backend(name):
        found = forward_backward(inputs, cotangent, pattern=CASES[case].pattern, bias=bias)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
@pytest.mark.parametrize("case", CASES)
def test_lse_and_its_gradient_equal_reference(case: str, name: str) -> None:
    inputs = tensors()
    cotangent = torch.randn(BATCH, HEADS, TOKENS)

    def run(backend_name: str) -> list[Tensor]:
        with backend(backend_name):
            out, lse = attend(*inputs, pattern=CASES[case].pattern, return_lse=True)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (finite * cotangent).sum() + out.square().sum()
        return [out, lse, *torch.autograd.grad(loss, inputs)]

    for ours, theirs in zip(run(name), run("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("keys", [REAL, [REAL[0]], [[True] * TOKENS]], ids=["entries", "shared", "full"])
@pytest.mark.parametrize("case", UNMASKED)
def test_causal_padding_without_a_mask_equals_reference(
    case: str, keys: list[list[bool]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output, log-sum-exp and gradients as long rows get them; rows that see nothing included."""
    monkeypatch.setattr(backends_module, "LONG", 1)
    pattern = UNMASKED[case](Padding(torch.tensor(keys)))
    if dtype != torch.float16:  # it has no number low enough
        monkeypatch.setattr(type(pattern), "tile_mask", None)
    inputs, cotangent = tensors(dtype), torch.randn(BATCH, HEADS, TOKENS, VALUE_WIDTH).double()

    def run(inputs: tuple[Tensor, ...], name: str) -> list[Tensor]:
        with backend(name):
            out, lse = attend(*inputs[:3], pattern=pattern, return_lse=True)
            alone = attend(*inputs[:3], pattern=pattern)
        loss = (out.double() * cotangent).sum() + lse.masked_fill(lse == -torch.inf, 0.0).sum()
        return [out, lse, alone, *torch.autograd.grad(loss + (alone.double() * cotangent).sum(), inputs)]

    for ours, theirs in zip(run(inputs, "sdpa"), run(tuple(map(wide, inputs)), "reference"), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=3 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_causal_padding_without_a_mask_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(backends_module, "LONG", 1)
    q, k, v = tensors()
    pattern = CASES["causal_padding"].pattern
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, pattern=pattern), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, pattern=pattern))


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_large_tile_change_nothing(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, log-sum-exps, first and second derivatives, with a bias and a kernel that is not fused."""
    inputs = (*tensors(torch.float64), torch.randn(HEADS, TOKENS, TOKENS).double().requires_grad_())

    def run() -> list[Tensor]:
        options = {"pattern": CASES[case].pattern, "bias": inputs[3], "kernel": TopKSoftmax(4)}
        with backend("blocked"):
            out, lse = attend(*inputs[:3], **options, return_lse=True)
        loss = lse.masked_fill(lse == -torch.inf, 0.0).sum() + out.square().sum()
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        again = torch.autograd.grad(torch.stack([x.square().sum() for x in first]).sum(), inputs)
        return [out, lse, *first, *again]

    whole = run()
    monkeypatch.setattr(backends_module, "rows_at_once", lambda q, num_keys: 3)
    for ours, theirs in zip(run(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_parts_of_a_large_tile_drop_the_same_weights_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends_module, "rows_at_once", lambda q, num_keys: 3)
    q, k, _ = tensors()
    v = torch.eye(TOKENS).expand(BATCH, KV_HEADS, -1, -1).clone().requires_grad_()
    with backend("blocked"):
        out = attend(q, k, v, dropout=0.5)
    (grad,) = torch.autograd.grad(out.sum(), v)
    weights = out.detach().unflatten(1, (KV_HEADS, -1)).sum((2, 3))  # with values that are unit vectors
    torch.testing.assert_close(grad, weights[..., None].expand_as(grad))


def test_parts_of_a_large_tile_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(backends_module, "rows_at_once", lambda q, num_keys: 3)
    inputs = tensors()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, pattern=Causal(), kernel=TopKSoftmax(4))

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for ours, theirs in zip(
        *([x, *torch.autograd.grad(x.sum(), inputs)] for x in (compiled(*inputs), run(*inputs))), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("case", CASES)
def test_flex_rules_equal_reference_forward(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules and bias given to flex_attention, by its uncompiled form: CPU has no backward of it."""
    monkeypatch.setattr(backends_module, "_flex_kernel", lambda: backends_module.flex_attention)
    q, k, v = (x.detach() for x in tensors())
    problem = backends_module.Problem(
        q, k, v, CASES[case].pattern, torch.randn(HEADS, TOKENS, TOKENS), 0.3, 0.0, softmax, True
    )
    expected, expected_lse = backends_module.reference(problem)
    out, lse = backends_module.flex(problem)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention runs on CUDA only")
@pytest.mark.parametrize("case", CASES)
def test_flex_equals_reference_on_cuda(case: str) -> None:
    q, k, v = (
        torch.randn(BATCH, heads, TOKENS, 16, device="cuda", requires_grad=True) for heads in (4, 2, 2)
    )
    cotangent = torch.randn(BATCH, 4, TOKENS, 16, device="cuda")
    pattern = CASES[case].pattern.to(q.device)
    with backend("reference"):
        expected = forward_backward((q, k, v), cotangent, pattern=pattern)
    with backend("flex"):
        found = forward_backward((q, k, v), cotangent, pattern=pattern)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
@pytest.mark.parametrize("case", ["causal_padding", "window_padding", "groups_padding", "neighbours"])
def test_gradcheck(case: str, name: str) -> None:
    inputs = tensors(torch.float64)
    with backend(name):
        assert torch.autograd.gradcheck(
            lambda *x: attend(*x, pattern=CASES[case].pattern), inputs, fast_mode=True
        )


@pytest.mark.parametrize("name", ["sdpa", "blocked"])
def test_gradcheck_of_log_sum_exp(name: str) -> None:
    inputs = tensors(torch.float64)

    def finite(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attend(*x, pattern=CASES["padding"].pattern, return_lse=True)
        return out, lse[:1]  # the second entry sees nothing: its lse is -inf

    with backend(name):
        assert torch.autograd.gradcheck(finite, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "kernel"), CAN)
def test_rows_that_see_nothing_are_zero_forward_and_backward(name: str, kernel: str) -> None:
    for case in CASES:
        inputs = tensors()
        with backend(name):
            cotangent = torch.randn(BATCH, HEADS, TOKENS, VALUE_WIDTH)
            out, *grads = forward_backward(
                inputs, cotangent, pattern=CASES[case].pattern, kernel=KERNELS[kernel]
            )
        empty = ~visible(CASES[case]).any(-1)[:, 0]
        assert torch.equal(out.transpose(1, 2)[empty], torch.zeros_like(out.transpose(1, 2)[empty]))
        assert torch.equal(grads[0].transpose(1, 2)[empty], torch.zeros_like(grads[0].transpose(1, 2)[empty]))
        assert all(x.isfinite().all() for x in (out, *grads)), case


def test_a_bias_of_minus_infinity_hides_a_key() -> None:
    q, k, v = tensors()
    bias = torch.zeros(BATCH, 1, 1, TOKENS).masked_fill(~visible(CASES["padding"])[:, :, :1], -math.inf)
    expected = attend(q, k, v, pattern=CASES["padding"].pattern)
    for name in ("reference", "blocked", "sdpa"):
        with backend(name):
            torch.testing.assert_close(attend(q, k, v, bias=bias), expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(["reference", "blocked", "sdpa"]))
def test_a_masked_key_changed_leaves_every_bit(data: st.DataObject, name: str) -> None:
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2))
    )
    inner = data.draw(
        st.sampled_from([Causal(), Window(3), EqualGroups(7), Groups(torch.tensor([0, 1, 0, 0, 1, 1, 2]))])
    )
    pattern = inner & Padding(mask)
    q, k, v = (torch.randn(2, 2, 7, 4) for _ in range(3))
    hidden = ~mask[:, None, :, None]
    k2, v2 = (torch.where(hidden, 100 * torch.randn_like(x), x) for x in (k, v))
    cotangent = torch.randn(2, 2, 7, 4)
    results = []
    for inputs in ((q, k, v), (q, k2, v2)):
        with backend(name):
            results.append(
                forward_backward(
                    tuple(x.clone().requires_grad_() for x in inputs), cotangent, pattern=pattern
                )
            )
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    for grad in results[1][2:]:
        assert not grad.masked_select(hidden).any()


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(-3, 6), min_size=1, max_size=30), by_entry=st.booleans(), seed=st.integers(0, 99)
)
def test_permuting_group_members_permutes_the_output(ids: list[int], by_entry: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = len(ids)
    group = torch.tensor(ids)
    order = torch.randperm(tokens, generator=generator)
    q, k, v = (torch.randn(2, 2, tokens, 4, generator=generator) for _ in range(3))
    pattern, permuted = (Groups(g.expand(2, -1) if by_entry else g) for g in (group, group[order]))
    out = attend(q, k, v, pattern=pattern)
    torch.testing.assert_close(
        attend(*(x[:, :, order] for x in (q, k, v)), pattern=permuted), out[:, :, order], atol=1e-5, rtol=1e-5
    )
    with backend("reference"):
        torch.testing.assert_close(attend(q, k, v, pattern=pattern), out, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    nq=st.integers(1, 90),
    more=st.integers(0, 40),
    size=st.integers(1, 60),
    causal=st.booleans(),
    kv=st.sampled_from([1, 2]),
)
def test_window_of_any_size_equals_reference(nq: int, more: int, size: int, causal: bool, kv: int) -> None:
    size = min(size, nq + more)
    size -= 0 if causal or size % 2 else 1
    q, k, v = torch.randn(1, 2, nq, 4), torch.randn(1, kv, nq + more, 4), torch.randn(1, kv, nq + more, 4)
    out = attend(q, k, v, pattern=Window(size, causal=causal))
    with backend("reference"):
        torch.testing.assert_close(
            out, attend(q, k, v, pattern=Window(size, causal=causal)), atol=1e-5, rtol=1e-5
        )


@settings(max_examples=25, deadline=None)
@given(edges=st.sets(st.tuples(st.integers(0, 14), st.integers(0, 14)), max_size=80))
def test_any_graph_equals_reference(edges: set[tuple[int, int]]) -> None:
    index = torch.tensor(sorted(edges), dtype=torch.long).view(-1, 2).T
    pattern = Neighbours.from_edges(index, 15)
    q, k, v = (torch.randn(2, 2, 15, 4) for _ in range(3))
    sees = torch.zeros(15, 15, dtype=torch.bool)
    sees[index[1], index[0]] = True
    mask = pattern.mask(2, 15, 15, q.device)
    assert mask is not None
    assert torch.equal(mask[0, 0], sees)
    with backend("reference"):
        expected = attend(q, k, v, pattern=pattern)
    torch.testing.assert_close(attend(q, k, v, pattern=pattern), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["reference", "blocked", "sdpa"])
def test_causal_with_cross_lengths_is_aligned_bottom_right(name: str) -> None:
    """The last queries of a long sequence, as in decoding with a cache."""
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    full = attend(q, k, v, pattern=Causal())
    with backend(name):
        torch.testing.assert_close(attend(q[:, :, 6:], k, v, pattern=Causal()), full[:, :, 6:])
        above = attend(q, k[:, :, :4], v[:, :, :4], pattern=Causal())
    assert torch.equal(above[:, :, :5], torch.zeros(1, 2, 5, 4))


def test_window_of_the_whole_axis_is_causal() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(
        attend(q, k, v, pattern=Window(TOKENS, causal=True)), attend(q, k, v, pattern=Causal())
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", ["reference", "blocked", "sdpa"])
def test_shared_heads_equal_repeated_heads(name: str, kv_heads: int) -> None:
    q, k, v = tensors(kv_heads=kv_heads)
    repeated = [x.repeat_interleave(HEADS // kv_heads, dim=1) for x in (k, v)]
    with backend(name):
        for case in ("dense", "causal", "groups", "window"):
            pattern = CASES[case].pattern
            torch.testing.assert_close(
                attend(q, k, v, pattern=pattern), attend(q, *repeated, pattern=pattern)
            )


def test_top_k_of_all_keys_is_softmax() -> None:
    q, k, v = tensors()
    torch.testing.assert_close(attend(q, k, v, kernel=TopKSoftmax(TOKENS)), attend(q, k, v))


@pytest.mark.parametrize("name", ["reference", "blocked", "sdpa"])
def test_autocast_is_close_to_float32_and_takes_mixed_inputs(name: str) -> None:
    q, k, v = (x.detach() for x in tensors())
    with backend(name):
        expected = attend(q, k, v, pattern=Causal())
        with torch.autocast("cpu", torch.bfloat16):
            out = attend(q, k.bfloat16(), v, pattern=Causal())
            double = attend(*(x.double() for x in (q, k, v)), pattern=Causal())
    assert (out.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    torch.testing.assert_close(out.float(), expected, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(double.float(), expected)


def test_half_precision_statistics_are_float32_on_many_keys() -> None:
    """4,096 equal weights: summed in bfloat16 they would stop growing at 256."""
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 4096, 4)
    v = torch.rand(1, 1, 4096, 4)
    for name in ("reference", "blocked", "sdpa"):
        with backend(name):
            out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
        torch.testing.assert_close(
            out.float(), v.mean(2, keepdim=True).expand(-1, -1, 2, -1), atol=4e-3, rtol=4e-3
        )


def test_dropout_drops_weights_and_keeps_their_mean() -> None:
    q, k, v = torch.zeros(1, 1, 400, 4), torch.zeros(1, 1, 400, 4), torch.ones(1, 1, 400, 4)
    for name in ("reference", "blocked", "sdpa"):
        with backend(name):
            out = attend(q, k, v, dropout=0.5)
        assert out.std() > 0
        assert abs(out.mean() - 1) < 0.02


COMPILED = [
    *((case, "softmax", "eager") for case in CASES),
    ("causal", "top3", "eager"),
    ("window", "softmax", "aot_eager"),
]


@pytest.mark.parametrize(("case", "kernel", "compiler"), COMPILED)
def test_compiles_without_graph_break(case: str, kernel: str, compiler: str) -> None:
    torch.compiler.reset()
    inputs = tensors()
    options = {"pattern": CASES[case].pattern, "kernel": KERNELS[kernel]}
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, **options), fullgraph=True, backend=compiler)
    cotangent = torch.randn(BATCH, HEADS, TOKENS, VALUE_WIDTH)
    found = compiled(*inputs)
    grads = torch.autograd.grad((found * cotangent).sum(), inputs)
    for ours, theirs in zip([found, *grads], forward_backward(inputs, cotangent, **options), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_padding_made_inside_compiles_and_follows_the_length() -> None:
    torch.compiler.reset()

    def masked(x: Tensor, lengths: Tensor) -> Tensor:
        return attend(x, x, x, pattern=Causal() & Padding.from_lengths(lengths, x.shape[2]))

    compiled = torch.compile(masked, fullgraph=True, backend="eager")
    for tokens in (5, 8, 11):
        x, lengths = torch.randn(2, 2, tokens, 4), torch.tensor([tokens, 3])
        torch.testing.assert_close(compiled(x, lengths), masked(x, lengths))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        leaves = result if isinstance(result, tuple | list) else [result]
        own = [x for x in leaves if isinstance(x, Tensor) and x.untyped_storage().nbytes()]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in own)])
        return result


TOKENS_16K = 16_384


@pytest.mark.parametrize(
    "pattern",
    [
        Window(129),
        Window(128, causal=True),
        EqualGroups(64),
        EqualGroups(4096) & Causal(),
        ShiftedGroups(TOKENS_16K, 4096, 2048) & Causal(),
        Groups(torch.arange(TOKENS_16K) * 7 % 251),
        Neighbours(torch.arange(TOKENS_16K)[:, None].add(torch.arange(16)) % TOKENS_16K),
    ],
    ids=["window", "causal_window", "equal_groups", "causal_groups", "shifted", "groups", "neighbours"],
)
def test_memory_is_linear_in_the_tokens(pattern) -> None:
    """At 16k tokens no operation, forward or backward, makes a tensor of more than 400 elements a token."""
    q, k, v = (torch.randn(1, 1, TOKENS_16K, 8, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        attend(q, k, v, pattern=pattern).sum().backward()
    assert TOKENS_16K * 8 <= largest.elements <= TOKENS_16K * 400


def test_one_large_group_does_not_pad_the_small_ones() -> None:
    ids = torch.cat([torch.zeros(1000, dtype=torch.long), torch.arange(1, 1001)])
    q, k, v = (torch.randn(1, 1, 2000, 8) for _ in range(3))
    with Largest() as largest:
        attend(q, k, v, pattern=Groups(ids), kernel=TopKSoftmax(5))
    assert largest.elements <= 1000 * 1000


def bad(message: str, call) -> object:
    return pytest.param(message, call, id=message)


Q = torch.zeros(2, 4, 6, 8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        bad("q, k, v are", lambda: attend(Q[0], Q, Q)),
        bad("one dtype", lambda: attend(Q, Q.double(), Q)),
        bad("differ in B", lambda: attend(Q, Q[:1], Q[:1])),
        bad("k and v in Hk or Nk", lambda: attend(Q, Q, Q[:, :, :3])),
        bad("head width 8, k has 4", lambda: attend(Q, Q[..., :4], Q)),
        bad("4 query heads are not divisible by 3", lambda: attend(Q, Q[:, :3], Q[:, :3])),
        bad("no keys", lambda: attend(Q, Q[:, :, :0], Q[:, :, :0])),
        bad("k = 7, but there are 6 keys", lambda: attend(Q, Q, Q, kernel=TopKSoftmax(7))),
        bad("k >= 1", lambda: TopKSoftmax(0)),
        bad("a mask is a pattern", lambda: attend(Q, Q, Q, bias=torch.ones(6, 6, dtype=torch.bool))),
        bad("does not broadcast", lambda: attend(Q, Q, Q, bias=torch.zeros(3, 6, 6))),
        bad("bool with True = attend", lambda: Padding(torch.ones(2, 6))),
        bad("shape (B, Nk)", lambda: Padding(torch.ones(2, 1, 6, dtype=torch.bool))),
        bad("key mask (2, 5) does not fit", lambda: attend(Q, Q, Q, pattern=Padding(torch.ones(2, 5) > 0))),
        bad("window of 7 is larger", lambda: attend(Q, Q, Q, pattern=Window(7))),
        bad("odd unless causal", lambda: Window(4)),
        bad("Nq = 6 > Nk = 3", lambda: attend(Q, Q[:, :, :3], Q[:, :, :3], pattern=Window(3))),
        bad("divisible by it", lambda: attend(Q, Q, Q, pattern=EqualGroups(4))),
        bad("at least one member", lambda: EqualGroups(0)),
        bad("shifted by 0 .. 3, and hold", lambda: ShiftedGroups(8, 4, 4)),
        bad("group ids are integers", lambda: Groups(torch.zeros(6))),
        bad("groups of 5 tokens", lambda: attend(Q, Q, Q, pattern=Groups(torch.zeros(5).long()))),
        bad("groups of 3 batch entries", lambda: attend(Q, Q, Q, pattern=Groups(torch.zeros(3, 6).long()))),
        bad("neighbours are integers", lambda: Neighbours(torch.zeros(6, 2))),
        bad("must lie in -1 .. 5", lambda: Neighbours(torch.full((6, 1), 6))),
        bad("token 1 lists neighbour 2 twice", lambda: Neighbours(torch.tensor([[0, 1], [2, 2], [-1, -1]]))),
        bad("room for at least one", lambda: Neighbours(torch.zeros(6, 0).long())),
        bad("a permutation", lambda: OrderedGroups(torch.zeros(2, 3).long(), 2)),
        bad("at least one member", lambda: OrderedGroups(torch.arange(6), 0)),
        bad("no tokens to group", lambda: Groups(torch.zeros(0).long())),
        bad("shape (2, E)", lambda: Neighbours.from_edges(torch.zeros(3, 2).long(), 3)),
        bad("nodes 0 .. 2", lambda: Neighbours.from_edges(torch.tensor([[0], [3]]), 3)),
        bad("no backend 'sdp'", lambda: backend("sdp").__enter__()),
    ],
)
def test_bad_input_is_named(message: str, call) -> None:
    with pytest.raises(AttentionError) as caught:
        call()
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sdpa", {"kernel": TopKSoftmax(2)}), ("sdpa", {"return_lse": True, "dropout": 0.1}), ("flex", {})],
)
def test_a_forced_backend_that_cannot_says_so(name: str, options: dict) -> None:
    with backend(name), pytest.raises(AttentionError, match=f"backend '{name}' computes softmax"):
        attend(Q, Q, Q, **options)


def test_a_forced_backend_ends_with_its_block() -> None:
    with pytest.raises(RuntimeError), backend("reference"):
        raise RuntimeError
    assert backends_module._forced is None
