"""The linear recurrence: its forms agree, its reductions hold, it stays finite, mistakes are told."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention import AttentionError, Causal, attend
from zoo.attention.layers import create_attention
from zoo.attention.linear import (
    alibi_slopes,
    elu_features,
    gated_slots,
    hedgehog_features,
    mlstm,
    retention_decay,
    squared_features,
    taylor_features,
    window_and_features,
)
from zoo.attention.scan import scan, scan_mean

B, H, N, D, V = 2, 3, 21, 5, 4
KINDS = ["none", "constant", "head", "channel", "value", "both", "delta", "gated delta", "kda"]
FORMS: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "parallel"},
    {"chunk": 7},
    {"chunk": 8},
    {"chunk": 32},
]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed + len(shape)))


def rates(
    kind: str, tokens: int = N, strength: float = 1.0, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """Arguments of one kind of recurrence."""

    def decay(*shape: int) -> Tensor:
        return -strength * draw(*shape, dtype=dtype, seed=7).abs()

    channels = decay(B, H, tokens, D)
    beta = draw(B, H, tokens, dtype=dtype, seed=8).sigmoid()
    return {
        "none": {},
        "constant": {"log_decay": decay(1, H, 1)},
        "head": {"log_decay": decay(B, H, tokens)},
        "channel": {"log_decay": channels},
        "value": {"value_decay": decay(B, H, tokens, V)},
        "both": {"log_decay": channels, "value_decay": decay(B, H, tokens, V)},
        "delta": {"beta": beta},
        "gated delta": {"log_decay": decay(B, H, tokens), "beta": beta},
        "kda": {"log_decay": channels, "beta": beta},
    }[kind]


def inputs(
    tokens: int = N, heads: int = H, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k of unit length, v, state."""
    q, k = (F.normalize(draw(B, heads, tokens, D, dtype=dtype, seed=s), dim=-1) for s in (1, 2))
    return q, k, draw(B, H, tokens, V, dtype=dtype, seed=3), draw(B, H, D, V, dtype=dtype, seed=4)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def outputs_and_gradients(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    out, state = scan(**leaves, **options)
    loss = (out * draw(*out.shape, seed=5)).sum() + (state * draw(*state.shape, seed=6)).sum()
    return [out, state, *torch.autograd.grad(loss, list(leaves.values()))]


@pytest.mark.parametrize("starts", [None, "documents"])
@pytest.mark.parametrize("heads", [H, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_forms_agree_with_all_gradients(kind: str, heads: int, starts: str | None) -> None:
    q, k, v, state = inputs(heads=heads)
    begins = None
    if starts is not None:
        begins = torch.zeros(B, N, dtype=torch.bool)
        begins[0, [3, 9, 10]] = begins[1, [0, 20]] = True
    tensors = {"q": q, "k": k, "v": v, "state": state, **rates(kind)}
    step, *others = (outputs_and_gradients(tensors, starts=begins, **form) for form in FORMS)
    for result in others:
        for actual, expected in zip(result, step, strict=True):
            close(actual, expected)


@pytest.mark.parametrize("starts", [None, "documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_parts_follow_one_another(
    kind: str, starts: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of one chunk of 8 tokens, the last one not full."""
    monkeypatch.setattr(sys.modules[scan.__module__], "_PART", 1)
    q, k, v, state = inputs()
    begins = None
    if starts is not None:
        begins = torch.zeros(B, N, dtype=torch.bool)
        begins[0, [3, 9, 10]] = begins[1, [0, 16]] = True
    given = {"state": state, "starts": begins, **rates(kind)}
    with torch.no_grad():
        found = scan(q, k, v, chunk=8, **given)
        expected = scan(q, k, v, form="step", **given)
    for actual, wanted in zip(found, expected, strict=True):
        close(actual, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_definition(kind: str) -> None:
    """The equations of the module, one batch entry and head at a time."""
    q, k, v, start = inputs()
    given = rates(kind)
    out, last = scan(q, k, v, state=start, **given)
    full = {name: x.expand(B, H, N, *x.shape[3:]) for name, x in given.items()}
    for b, h in itertools.product(range(B), range(H)):
        state = start[b, h]
        for t in range(N):
            if "log_decay" in full:
                state = full["log_decay"][b, h, t].exp().reshape(-1, 1) * state
            if "value_decay" in full:
                state = state * full["value_decay"][b, h, t].exp()
            key, new = k[b, h, t], v[b, h, t]
            if "beta" in full:
                new = full["beta"][b, h, t] * (new - key @ state)
            state = state + torch.outer(key, new)
            close(out[b, h, t], D**-0.5 * q[b, h, t] @ state)
        close(last[b, h], state)


@pytest.mark.parametrize("form", ["step", "chunk"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, form: Any) -> None:
    tokens = 11
    tensors = {n: x.requires_grad_() for n, x in zip("qkv", inputs(tokens)[:3], strict=True)}
    tensors |= {n: x.requires_grad_() for n, x in rates(kind, tokens).items()}
    tensors["state"] = inputs()[3].requires_grad_()

    def run(*values: Tensor) -> tuple[Tensor, Tensor]:
        named: dict[str, Any] = dict(zip(tensors, values, strict=True))
        return scan(**named, form=form, chunk=4)

    assert torch.autograd.gradcheck(run, tuple(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_state_carries_on_where_a_call_ended(kind: str) -> None:
    q, k, v, state = inputs()
    given = rates(kind)
    whole, last = scan(q, k, v, state=state, **given)
    parts = []
    for span in (slice(0, 8), slice(8, 9), slice(9, N)):
        cut = {n: x if x.shape[2] == 1 else x[:, :, span] for n, x in given.items()}
        part, state = scan(q[:, :, span], k[:, :, span], v[:, :, span], state=state, **cut)
        parts.append(part)
    close(torch.cat(parts, 2), whole)
    close(state, last)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_calls_of_their_own(kind: str) -> None:
    q, k, v, state = inputs()
    given = rates(kind)
    starts = torch.zeros(B, N, dtype=torch.bool)
    starts[:, [0, 5, 13]] = True
    packed, last = scan(q, k, v, starts=starts, state=state, chunk=8, **given)
    for begin, end in ((0, 5), (5, 13), (13, N)):
        cut = {n: x if x.shape[2] == 1 else x[:, :, begin:end] for n, x in given.items()}
        alone, final = scan(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], **cut)
        close(packed[:, :, begin:end], alone)
    close(last, final)


@pytest.mark.parametrize("form", ["step", "chunk", "parallel"])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_tokens_in_front_change_nothing(kind: str, form: Any) -> None:
    """Left padding: keys and log decays of zero."""
    q, k, v, state = inputs()
    given = {n: x.expand(B, H, N, *x.shape[3:]) for n, x in rates(kind).items()}
    expected, last = scan(q, k, v, state=state, **given)

    def padded(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :, :3]), x], dim=2)

    more: dict[str, Any] = {n: padded(x) for n, x in given.items()}
    out, final = scan(padded(q), padded(k), padded(v), state=state, form=form, **more)
    close(out[:, :, 3:], expected)
    close(final, last)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.01, 3.0, 300.0])
def test_long_sequences_stay_finite_and_exact(kind: str, strength: float) -> None:
    """Weak and strong decays over 1,000 tokens, in float32, with gradients."""
    tokens = 1000
    double = {**dict(zip("qkv", inputs(tokens)[:3], strict=True)), **rates(kind, tokens, strength)}
    exact, _ = scan(**double, form="step")
    single = {n: x.float().requires_grad_() for n, x in double.items()}
    out, state = scan(**single)
    close(out.double(), exact, 2e-5 if kind != "none" else 2e-4)
    gradients = torch.autograd.grad(out.sum() + state.sum(), list(single.values()))
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize("starts", [None, "documents"])
@pytest.mark.parametrize("kind", ["channel", "value", "both", "kda"])
def test_chunks_in_runs_are_those_in_one(
    kind: str, starts: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mild decays, as if they were strong."""
    begins = None if starts is None else torch.arange(N).expand(B, N) % 9 == 4
    q, k, v, state = inputs()
    tensors = {"q": q, "k": k, "v": v, "state": state, **rates(kind)}
    whole = outputs_and_gradients(tensors, starts=begins)
    monkeypatch.setattr(sys.modules[scan.__module__], "_MILD", {torch.float64: 0.0})
    runs = outputs_and_gradients(tensors, starts=begins)
    assert not all(torch.equal(a, b) for a, b in zip(runs, whole, strict=True))
    for actual, expected in zip(runs, whole, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("kind", ["channel", "value", "both", "kda"])
@pytest.mark.parametrize("decay", [-2.4, -2.6])
def test_exact_around_the_decay_from_which_chunks_have_runs(kind: str, decay: float) -> None:
    """A chunk of 32 tokens, -40 over a half of it; with gradients."""
    tokens = 100
    double = {**dict(zip("qkv", inputs(tokens)[:3], strict=True)), **rates(kind, tokens)}
    double |= {n: torch.full_like(x, decay) for n, x in double.items() if "decay" in n}
    double["state"] = inputs()[3]
    single = {n: x.float() for n, x in double.items()}
    results = zip(outputs_and_gradients(single), outputs_and_gradients(double, form="step"), strict=True)
    for actual, expected in results:
        close(actual.double(), expected, 1e-5)


def test_negative_rates_above_one_stay_finite() -> None:
    """beta up to 2 turns the state around: the keys of unit length keep it bounded."""
    q, k, v, _ = inputs(2000, dtype=torch.float32)
    out, _ = scan(q, k, v, beta=torch.full((B, H, 2000), 2.0))
    assert out.isfinite().all()
    assert out.abs().max() < 1e3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_looks_ahead(kind: str) -> None:
    q, k, v, _ = inputs()
    out, _ = scan(q, k, v, **rates(kind))
    k, v = k.clone(), v.clone()
    k[:, :, 12:], v[:, :, 12:] = 9.0, -9.0
    later, _ = scan(q, k, v, **rates(kind))
    close(later[:, :, :12], out[:, :, :12])
    assert not torch.allclose(later[:, :, 12:], out[:, :, 12:])


def test_equal_decays_per_channel_are_a_decay_per_head() -> None:
    q, k, v, state = inputs()
    g, beta = rates("head")["log_decay"], rates("delta")["beta"]
    for options in ({}, {"beta": beta}):
        head = scan(q, k, v, log_decay=g, state=state, **options)
        channel = scan(q, k, v, log_decay=g[..., None].expand(-1, -1, -1, D), state=state, **options)
        close(channel[0], head[0])
        close(channel[1], head[1])


def test_no_decay_is_a_decay_of_zero() -> None:
    q, k, v, _ = inputs()
    beta = rates("delta")["beta"]
    close(scan(q, k, v, beta=beta, log_decay=torch.zeros(1, 1, 1))[0], scan(q, k, v, beta=beta)[0])


def test_delta_rule_over_orthonormal_keys_is_linear_attention() -> None:
    q, _, v, _ = inputs(D)
    k = torch.linalg.qr(draw(B, H, D, D)).Q
    close(scan(q, k, v, beta=torch.ones(1, 1, 1, dtype=torch.float64))[0], scan(q, k, v)[0])


def test_delta_rule_recalls_the_last_value_of_a_key() -> None:
    key = F.normalize(draw(1, 1, 1, D), dim=-1)
    k = key.expand(1, 1, 4, D)
    v = draw(1, 1, 4, V)
    out, _ = scan(k, k, v, beta=torch.ones(1, 1, 1, dtype=torch.float64), scale=1.0)
    close(out, v)


def test_linear_attention_is_the_lower_triangle_of_products() -> None:
    q, k, v, _ = inputs()
    close(scan(q, k, v, scale=1.0)[0], (q @ k.mT).tril() @ v)


def test_mean_over_exact_features_is_softmax() -> None:
    """With one value per channel and key, phi(q) . phi(k) = exp(q . k) in features enumerated by hand."""
    q, k = torch.randint(0, 3, (2, B, H, N, 1), generator=torch.Generator().manual_seed(0)).double()
    v = inputs()[2]
    levels = torch.arange(3.0, dtype=torch.float64)
    phi_q, phi_k = (q * levels).exp(), F.one_hot(k[..., 0].long(), 3).double()
    out, _ = scan_mean(phi_q, phi_k, v, scale=1.0, eps=0.0)
    close(out, attend(q, k, v, pattern=Causal(), scale=1.0))


def test_taylor_features_approach_softmax_to_the_third_order() -> None:
    q, k, v, _ = inputs()

    def error(size: float) -> float:
        based, _ = scan_mean(taylor_features(size * q), taylor_features(k), v, scale=1.0, eps=0.0)
        return float((based - attend(size * q, k, v, pattern=Causal())).abs().max())

    assert error(0.5) / error(0.25) == pytest.approx(8.0, rel=0.3)


@pytest.mark.parametrize("symmetric", [True, False])
def test_features_have_the_products_that_they_state(symmetric: bool) -> None:
    x, y = draw(7, D), draw(7, D, seed=3)
    s = (x * y).sum(-1)
    phi = [taylor_features(t, symmetric=symmetric) for t in (x, y)]
    assert phi[0].shape[-1] == 1 + D + (D * (D + 1) // 2 if symmetric else D * D)
    close((phi[0] * phi[1]).sum(-1), 1 + s * D**-0.5 + s**2 / (2 * D))
    close((squared_features(x) * squared_features(y)).sum(-1), s**2 / D)
    assert (elu_features(x) > 0).all()
    hedgehog = hedgehog_features(x[None, None], draw(1, D, 6))
    close(hedgehog.sum(-1), torch.full((1, 1, 7), 2.0, dtype=torch.float64))


def test_published_decays() -> None:
    close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    close(alibi_slopes(6), torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]))
    close(retention_decay(3), torch.tensor([1 - 2**-5, 1 - 2**-6, 1 - 2**-7]).log(), 1e-7)


@pytest.mark.parametrize("form", FORMS)
def test_mlstm_forms_agree_with_its_definition(form: dict[str, Any]) -> None:
    q, k, v, _ = inputs()
    write, forget = 3 * draw(B, H, N, seed=1), 3 * draw(B, H, N, seed=2)
    result = mlstm(q, k, v, input_gate=write, forget_gate=forget, **form)
    c = F.logsigmoid(forget).cumsum(-1)
    logs = (c[..., :, None] - c[..., None, :] + write[..., None, :]).masked_fill(
        torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf
    )
    peak = logs.amax(-1)
    weights = (q @ k.mT) * D**-0.5 * (logs - peak[..., None]).exp()
    normaliser = torch.maximum(weights.sum(-1).abs(), (-peak).exp())
    close(result.peak, peak)
    close(result.normaliser, normaliser)
    close(result.out, weights @ v / (normaliser + 1e-6)[..., None])


def test_mlstm_carries_its_state_and_begins_anew_with_a_document() -> None:
    q, k, v, _ = inputs()
    gates: dict[str, Any] = {
        "input_gate": 3 * draw(B, H, N, seed=1),
        "forget_gate": 3 * draw(B, H, N, seed=2),
    }
    whole = mlstm(q, k, v, **gates)
    early: dict[str, Any] = {n: g[..., :8] for n, g in gates.items()}
    rest: dict[str, Any] = {n: g[..., 8:] for n, g in gates.items()}
    first = mlstm(q[:, :, :8], k[:, :, :8], v[:, :, :8], **early)
    second = mlstm(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], state=first.state, **rest)
    close(torch.cat([first.out, second.out], 2), whole.out)
    starts = (torch.arange(N) == 8).expand(B, N)
    packed = mlstm(q, k, v, starts=starts, **gates)
    close(packed.out[:, :, :8], first.out)
    close(packed.out[:, :, 8:], mlstm(q[:, :, 8:], k[:, :, 8:], v[:, :, 8:], **rest).out)


def test_mlstm_with_open_gates_is_linear_attention() -> None:
    q, k, v, _ = inputs()
    gates: dict[str, Any] = {
        "input_gate": torch.zeros(B, H, N),
        "forget_gate": torch.full((B, H, N), math.inf),
    }
    result = mlstm(q, k, v, eps=0.0, **gates)
    close(result.out * result.normaliser[..., None], scan(q, k, v)[0])


def test_huge_input_gates_stay_finite() -> None:
    q, k, v, _ = inputs(dtype=torch.float32)
    gates = torch.linspace(-300, 300, N).expand(B, H, N)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = mlstm(*leaves, input_gate=gates, forget_gate=-gates).out
    assert out.isfinite().all()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("form", FORMS)
def test_slots_hold_decaying_sums_read_by_softmax(form: dict[str, Any]) -> None:
    q, k, v, _ = inputs()
    slots, decay = draw(B, H, N, 6, seed=1), -draw(B, H, N, 6, seed=2).abs()
    out, (keys, values) = gated_slots(q, k, v, slots, log_decay=decay, **form)
    memory_k, memory_v = torch.zeros(B, H, 6, D).double(), torch.zeros(B, H, 6, V).double()
    for t in range(N):
        kept = decay[:, :, t, :, None].exp()
        memory_k = kept * memory_k + slots[:, :, t, :, None] * k[:, :, t, None]
        memory_v = kept * memory_v + slots[:, :, t, :, None] * v[:, :, t, None]
        weights = (memory_k @ q[:, :, t, :, None] * D**-0.5).softmax(-2)
        close(out[:, :, t], (weights * memory_v).sum(-2))
    close(keys, memory_k.mT)
    close(values, memory_v)


def test_window_over_everything_leaves_softmax() -> None:
    q, k, v, _ = inputs()
    features = draw(B, H, N, 6).exp()
    out, _ = window_and_features(
        q, k, v, features, features, window=N + 5, window_factor=torch.tensor(0.5).double()
    )
    close(out, attend(q, k, v, pattern=Causal()))


def test_half_precision_keeps_a_float32_state() -> None:
    q, k, v, _ = (x.bfloat16() for x in inputs(256))
    given = {n: x.float() for n, x in rates("gated delta", 256, 0.1).items()}
    out, state = scan(q, k, v, **given)
    exact, _ = scan(q.double(), k.double(), v.double(), **given)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (out.double() - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.mark.parametrize("kind", ["both", "gated delta", "kda"])
def test_compiles_without_graph_breaks(kind: str) -> None:
    torch._dynamo.reset()
    q, k, v, state = inputs()
    compiled = torch.compile(scan, fullgraph=True, backend="eager")
    close(compiled(q, k, v, state=state, **rates(kind))[0], scan(q, k, v, state=state, **rates(kind))[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(B, H, N)}, r"q and k \(B, Hk, N, D\)"),
        ({"k": torch.zeros(B, H, N, D + 1)}, r"q and k \(B, Hk, N, D\)"),
        ({"v": torch.zeros(B, H, N + 1, V)}, "differ in B or N"),
        ({"v": torch.zeros(B, H + 1, N, V)}, "4 value heads are not divisible by 3"),
        ({"log_decay": torch.zeros(B, H)}, "log_decay"),
        ({"log_decay": torch.zeros(B, H, N, V)}, "log_decay"),
        ({"beta": torch.zeros(B, H, N, D)}, "beta"),
        ({"beta": torch.ones(B, H, N), "value_decay": torch.zeros(B, H, N)}, "value channels"),
        ({"starts": torch.zeros(B, N)}, "starts is bool"),
        ({"starts": torch.zeros(N, dtype=torch.bool)}, "starts is bool"),
        ({"state": torch.zeros(B, H, V, D)}, r"state is \(B, H, D, V\)"),
        ({"form": "recurrent"}, "parallel, chunk and step"),
        ({"chunk": 0}, "at least one token"),
    ],
)
def test_mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    q, k, v, _ = inputs(dtype=torch.float32)
    with pytest.raises(AttentionError, match=message):
        scan(**{"q": q, "k": k, "v": v, **changes})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deltanet", {"kernel": 0}, "positive kernel"),
        ("kda", {"value_heads": 3}, "3 value heads are not divisible by 2"),
        ("lightning", {"layer": 2, "num_layers": 2}, "not one of 2"),
        ("gla", {"expand_k": 0.03}, "width 0 is not divisible"),
    ],
)
def test_mistakes_in_layers_are_told(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        create_attention(name, 32, num_heads=2, **options)


def test_what_a_direction_rules_out_is_told() -> None:
    x = torch.zeros(1, 4, 8)
    with pytest.raises(AttentionError, match="causal=False"):
        create_attention("linear", 8, num_heads=2)(x, context=x)
    with pytest.raises(AttentionError, match="no cache"):
        create_attention("linear", 8, num_heads=2, causal=False).init_cache(1)
    layer = create_attention("gla", 8, num_heads=2)
    with pytest.raises(AttentionError, match="no packed documents"):
        layer(x, mask=torch.zeros(1, 4, dtype=torch.long), cache=layer.init_cache(1))


@pytest.mark.parametrize("name", ["linear", "gla", "mlstm", "gsa", "gated_deltanet", "kda"])
def test_memory_of_decoding_does_not_grow(name: str) -> None:
    layer = create_attention(name, 16, num_heads=2).eval()
    cache = layer.init_cache(1)
    layer.step(draw(1, 1, 16, dtype=torch.float32), cache)
    first = cache.nbytes()  # type: ignore[attr-defined]
    layer.step(draw(1, 40, 16, dtype=torch.float32), cache)
    assert cache.nbytes() == first > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["linear", "retention", "mlstm", "gsa", "deltanet", "gated_deltanet", "kda"])
def test_left_padding_leaves_state_and_outputs(name: str) -> None:
    layer = create_attention(name, 16, num_heads=2).eval()
    x, pad = draw(2, 12, 16, dtype=torch.float32), 3
    mask = (torch.arange(12 + pad) >= pad).expand(2, -1)
    positions = (torch.arange(12 + pad) - pad).clamp(min=0)
    cache, plain = layer.init_cache(2), layer.init_cache(2)
    padded = torch.cat([torch.full((2, pad, 16), 5.0), x], 1)
    y = layer(padded, mask=mask, positions=positions, cache=cache)
    close(y[:, pad:], layer(x, cache=plain), 1e-5)
    if name != "retention":  # its positions count on from the padded ones
        close(layer.step(x[:, :1], cache), layer.step(x[:, :1], plain), 1e-5)


def test_value_groups_share_keys() -> None:
    layer = create_attention("gated_deltanet", 16, num_heads=2, value_heads=4)
    assert layer(draw(1, 9, 16, dtype=torch.float32)).shape == (1, 9, 16)


def test_without_convolutions_nothing_mixes_but_the_scan() -> None:
    layer = create_attention("deltanet", 16, num_heads=2, kernel=None, negative=True).eval()
    x = draw(2, 9, 16, dtype=torch.float32)
    close(layer(x)[:, :1], layer(x[:, :1]), 1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_sees_all_and_packed_its_document(packed: bool) -> None:
    layer = create_attention("linear", 16, num_heads=2, causal=False).double()
    x = draw(1, 9, 16)
    order = torch.tensor([3, 1, 0, 2, 8, 7, 4, 6, 5]) if packed else torch.randperm(9)
    ids = torch.tensor([[4, 4, 4, 4, 1, 1, 1, 1, 1]]) if packed else None
    close(layer(x[:, order], mask=ids), layer(x, mask=ids)[:, order])
