"""Multi-head layers: what they reduce to, what must not change them, and their messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention import AttentionError, Causal, attend, backend, capture
from zoo.attention.layers.base import LAYERS, AttentionLayer, create_attention
from zoo.attention.layers.forgetting import ForgettingAttention, StickBreaking, forgetting, stick_breaking
from zoo.attention.layers.multihead import (
    AffineScaled,
    GatedAttention,
    LearnedPair,
    MultiHead,
    Qwen3NextAttention,
    SinkAttention,
    gqa_from_mha,
)

B, N, DIM, H, HK = 2, 9, 24, 4, 2

LAYER_CASES: dict[str, tuple[type[MultiHead], dict]] = {
    "mha": (MultiHead, {}),
    "gqa": (MultiHead, {"num_kv_heads": HK, "rope_theta": 1e4, "qk_norm": True}),
    "mqa_partial_rotary": (MultiHead, {"num_kv_heads": 1, "rope_theta": 1e4, "rotary_dim": 4, "head_dim": 8}),
    "window": (MultiHead, {"num_kv_heads": HK, "window": 3, "qkv_bias": True, "out_bias": True}),
    "sinks": (SinkAttention, {"num_kv_heads": HK, "window": 4, "rope_theta": 1e4}),
    "learned_pair": (LearnedPair, {"num_kv_heads": HK, "window": 4}),
    "headwise": (GatedAttention, {"num_kv_heads": HK, "gate": "headwise", "rope_theta": 1e4}),
    "elementwise": (GatedAttention, {"num_kv_heads": HK, "gate": "elementwise"}),
    "qwen3_next": (Qwen3NextAttention, {"num_kv_heads": HK, "rope_theta": 1e4, "rotary_dim": 2}),
    "affine": (AffineScaled, {"num_kv_heads": HK}),
    "affine_window": (AffineScaled, {"num_kv_heads": HK, "window": 3, "activation": "sigmoid"}),
    "forgetting": (ForgettingAttention, {"num_kv_heads": HK}),
    "forgetting_window": (ForgettingAttention, {"num_kv_heads": HK, "window": 4}),
    "stick_breaking": (StickBreaking, {"num_kv_heads": HK}),
    "stick_breaking_window": (StickBreaking, {"num_kv_heads": HK, "window": 4, "attend_current": True}),
}
PERMUTABLE = ["mha", "elementwise", "affine"]


def build(name: str, *, causal: bool = True, dtype: torch.dtype = torch.float32) -> MultiHead:
    kind, options = LAYER_CASES[name]
    torch.manual_seed(3)
    layer = kind(DIM, H, causal=causal, **options)
    for parameter in layer.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
    if isinstance(layer, AffineScaled):
        layer.alpha_ma.copy_(torch.linspace(0.2, 0.8, H))
    return layer.to(dtype).eval()


def tokens(dtype: torch.dtype = torch.float32, rows: int = B, length: int = N) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(rows, length, DIM, dtype=dtype)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_step_equals_full_forward(name: str) -> None:
    layer, x = build(name), tokens()
    full = layer(x)
    for sizes in ([1] * N, [4, 1, 3, 1], [N]):
        cache = layer.init_cache(B)
        found = torch.cat([layer.step(part, cache) for part in x.split(sizes, dim=1)], dim=1)
        torch.testing.assert_close(found, full, atol=1e-5, rtol=1e-5)
        assert cache.length == N


@pytest.mark.parametrize("name", LAYER_CASES)
def test_padded_steps_equal_padded_forward(name: str) -> None:
    layer, x = build(name), tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :3] = False
    full = layer(x, mask=mask)
    cache = layer.init_cache(B)
    parts = [
        layer(part, mask=seen, cache=cache)
        for part, seen in zip(x.split([5, 1, 3], dim=1), (mask[:, :5], None, mask[:, 6:]), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[mask], full[mask], atol=1e-5, rtol=1e-5)


def test_the_cache_of_a_window_does_not_grow() -> None:
    layer, x = build("window"), tokens(length=40)
    cache = layer.init_cache(B)
    sizes = set()
    for token in x.split(1, dim=1):
        layer.step(token, cache)
        sizes.add(cache.nbytes())
    assert max(sizes) == cache.nbytes()
    assert cache.tensors[0].shape[2] == LAYER_CASES["window"][1]["window"] - 1


@pytest.mark.parametrize("name", LAYER_CASES)
def test_causality(name: str) -> None:
    layer, x = build(name), tokens()
    changed = x.clone()
    changed[:, 5:] += 1.0
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=1e-6)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("name", LAYER_CASES)
@pytest.mark.parametrize("where", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(name: str, where: str) -> None:
    layer, x = build(name), tokens()
    real = slice(3, N) if where == "left" else slice(0, 6)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, real] = True
    mask[1] = True
    found = layer(x, mask=mask)
    assert found.isfinite().all()
    torch.testing.assert_close(found[:1, real], layer(x[:1, real]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], layer(x[1:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_packed_documents_equal_the_documents_alone(name: str) -> None:
    layer, x = build(name), tokens(rows=1)
    found = layer(x, mask=torch.tensor([[0] * 5 + [1] * 4]))
    alone = torch.cat([layer(x[:, :5]), layer(x[:, 5:])], dim=1)
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PERMUTABLE)
def test_permuted_tokens_permute_the_output(name: str) -> None:
    layer, x = build(name, causal=False), tokens()
    order = torch.randperm(N)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-5, rtol=1e-5)
    context = torch.randn(B, 5, DIM)
    order = torch.randperm(5)
    torch.testing.assert_close(layer(x, context[:, order]), layer(x, context), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_backends_agree_and_capture_records(name: str) -> None:
    layer, x = build(name), tokens()
    expected = layer(x)
    for other in ("reference", "blocked"):
        with backend(other):
            torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    with capture(layer) as maps:
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    assert next(iter(maps.values())).weights.shape == (B, H, N, N)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_gradcheck(name: str) -> None:
    layer = build(name, dtype=torch.float64)
    x = tokens(torch.float64, length=4).requires_grad_()
    parameters = [*layer.parameters()]
    names = [n for n, _ in layer.named_parameters()]

    def program(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(program, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_compiles_without_breaks_and_keeps_gradients(name: str) -> None:
    torch.compiler.reset()
    layer, x = build(name).train(), tokens().requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    if isinstance(layer, AffineScaled):
        layer.rho = 1.0  # each of the two passes moves the running mean
    ours, theirs = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (compiled, layer))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_bfloat16_stays_close(name: str) -> None:
    layer, x = build(name), tokens()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x)
    torch.testing.assert_close(half.float(), exact, atol=0.06 * exact.abs().max().item(), rtol=0.0)


@pytest.mark.parametrize("name", LAYER_CASES)
def test_bfloat16_weights_stay_close(name: str) -> None:
    layer, x = build(name), tokens()
    exact = layer(x)
    layer, x = layer.bfloat16(), x.bfloat16()
    half, cache = layer(x), layer.init_cache(B)
    steps = torch.cat([layer.step(part, cache) for part in x.split(1, dim=1)], dim=1)
    assert half.dtype == steps.dtype == torch.bfloat16
    for found in (half, steps):
        torch.testing.assert_close(found.float(), exact, atol=0.03 * exact.abs().max().item(), rtol=0.0)


def test_layers_are_listed() -> None:
    for name, kind in {"multihead": MultiHead, "sinks": SinkAttention, "gated": GatedAttention}.items():
        assert LAYERS[name] is kind
    assert isinstance(create_attention("multihead", DIM, num_heads=H), MultiHead)


def by_torch(kind: type[MultiHead], *, causal: bool = False) -> tuple[MultiHead, nn.MultiheadAttention]:
    """A layer, and torch's with the same weights."""
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, H, batch_first=True, add_bias_kv=kind is LearnedPair)
    ours = kind(DIM, H, causal=causal, qkv_bias=True, out_bias=True)
    weights = {name: rows for name, rows in theirs.state_dict().items() if name.startswith("bias")}
    for part, weight, bias in zip(
        "qkv", theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True
    ):
        weights |= {f"{part}_proj.weight": weight, f"{part}_proj.bias": bias}
    for name, rows in theirs.out_proj.state_dict().items():
        weights[f"o_proj.{name}"] = rows
    ours.load_state_dict(weights)
    return ours, theirs


@pytest.mark.parametrize("kind", [MultiHead, LearnedPair])
def test_equals_torch_multihead_attention(kind: type[MultiHead]) -> None:
    ours, theirs = by_torch(kind)
    x, context = tokens(), torch.randn(B, 5, DIM)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, context), theirs(x, context, context)[0])


def test_learned_pair_is_seen_by_all_queries_as_in_torch() -> None:
    ours, theirs = by_torch(LearnedPair, causal=True)
    x, mask, later = tokens(), torch.ones(B, N, dtype=torch.bool), torch.ones(N, N).triu(1).bool()
    mask[0, :3] = False  # the first queries see the pair alone
    expected = theirs(x, x, x, attn_mask=later, key_padding_mask=~mask)[0]
    torch.testing.assert_close(ours(x, mask=mask), expected)
    torch.testing.assert_close(expected[0, 0], theirs.out_proj(ours.get_parameter("bias_v")[0, 0]))


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = build("gqa")
    full = MultiHead(DIM, H, causal=True, rope_theta=1e4, qk_norm=True).eval()
    state = grouped.state_dict()
    for part in ("k_proj.weight", "v_proj.weight"):
        state[part] = state[part].unflatten(0, (HK, -1)).repeat_interleave(H // HK, 0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()))


def test_a_window_over_all_tokens_is_causal_attention() -> None:
    wide = MultiHead(DIM, H, causal=True, window=N).eval()
    torch.testing.assert_close(wide(tokens()), copied(MultiHead(DIM, H, causal=True), wide)(tokens()))


def test_mean_pooling_equal_heads_changes_nothing() -> None:
    layer = MultiHead(DIM, H, causal=True, qkv_bias=True).eval()
    for linear in (layer.k_proj, layer.v_proj):
        for parameter in linear.parameters():
            rows = parameter.data.unflatten(0, (HK, H // HK, -1))
            rows.copy_(rows[:, :1].clone().expand_as(rows))
    grouped = gqa_from_mha(layer, HK)
    torch.testing.assert_close(grouped(tokens()), layer(tokens()))
    assert grouped.k_proj.weight.shape == (DIM // 2, DIM)
    assert layer.num_kv_heads == H
    with pytest.raises(AttentionError, match="do not form 3 equal groups"):
        gqa_from_mha(layer, 3)
    with pytest.raises(AttentionError, match="cannot stay"):
        gqa_from_mha(GatedAttention(DIM, H), HK)


def copied(target: MultiHead, source: MultiHead) -> MultiHead:
    own = target.state_dict()
    target.load_state_dict({name: source.state_dict().get(name, own[name]) for name in own})
    return target.eval()


def test_open_gates_are_plain_attention() -> None:
    plain = build("gqa")
    options = LAYER_CASES["gqa"][1]
    for kind in (GatedAttention, Qwen3NextAttention):
        gated = kind(DIM, H, causal=True, qkv_bias=True, **options).eval()
        weight, bias = torch.zeros_like(gated.q_proj.weight), torch.full_like(gated.q_proj.bias, 50.0)
        rows = H // gated.blocks * gated.head_dim
        queries = plain.q_proj.weight.detach().unflatten(0, (gated.blocks, rows))
        weight.view(gated.blocks, -1, DIM)[:, :rows] = queries
        bias.view(gated.blocks, -1)[:, :rows] = 0.0
        with torch.no_grad():
            for name in ("k_proj", "v_proj"):
                getattr(gated, name).bias.zero_()
                getattr(gated, name).weight.copy_(getattr(plain, name).weight)
            gated.o_proj.weight.copy_(plain.o_proj.weight)
            gated.q_proj.weight.copy_(weight)
            gated.q_proj.bias.copy_(bias)
            for name in ("q_norm", "k_norm"):
                centre = 1.0 if kind is Qwen3NextAttention else 0.0
                getattr(gated, name).weight.copy_(getattr(plain, name).weight - centre)
        torch.testing.assert_close(gated(tokens()), plain(tokens()), atol=1e-6, rtol=1e-5)


def test_no_sink_is_plain_attention() -> None:
    plain = build("gqa")
    layer = copied(SinkAttention(DIM, H, causal=True, **LAYER_CASES["gqa"][1]), plain)
    layer.sinks.data.fill_(-torch.inf)
    torch.testing.assert_close(layer(tokens()), plain(tokens()))


def test_affine_scale_one_is_softmax() -> None:
    plain = build("mha")
    layer = copied(AffineScaled(DIM, H, causal=True), plain)
    x = tokens()
    x[..., 0] = 1.0
    layer.alpha_proj.weight.data.zero_()[:, 0] = 5.0  # the clip of 0.1 * 5 + 0.5
    layer.alpha_ma.fill_(1.0)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_affine_weights_are_the_formula(causal: bool) -> None:
    layer = AffineScaled(DIM, H, causal=causal).eval()
    layer.alpha_ma.copy_(torch.linspace(0.2, 0.8, H))
    x = tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 6:] = False
    with capture(layer) as maps:
        found = layer(x, mask=mask)
    (softmax_map,) = maps.values()
    seen = mask[:, None, None].expand(B, H, N, N)
    seen = seen & torch.ones(N, N).tril().bool() if causal else seen
    alpha = layer.alpha(x)[..., None]
    weights = alpha * softmax_map.weights + (layer.alpha_ma[:, None, None] - alpha) * seen / seen.sum(
        -1, True
    )
    out = weights @ softmax_map.values
    torch.testing.assert_close(found, layer.o_proj(out.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5)


def test_the_running_mean_moves_in_training_only_and_over_real_tokens() -> None:
    layer = AffineScaled(DIM, H, rho=0.75).eval()
    x = tokens()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 6:] = False
    layer(x, mask=mask)
    assert not layer.alpha_ma.any()
    layer.train()(x, mask=mask)
    mean = layer.alpha(x).detach().transpose(1, 2)[mask].mean(0)
    torch.testing.assert_close(layer.alpha_ma, 0.25 * mean)


def test_gates_that_keep_everything_are_plain_attention() -> None:
    q, k, v = torch.randn(B, H, N, 6), torch.randn(B, HK, N, 6), torch.randn(B, HK, N, 6)
    out, lse = forgetting(q, k, v, torch.zeros(B, H, N))
    plain, plain_lse = attend(q, k, v, pattern=Causal(), return_lse=True)
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(lse, plain_lse)


def test_forgetting_equals_its_bias() -> None:
    q, k, v = torch.randn(B, H, 200, 6), torch.randn(B, HK, 200, 6), torch.randn(B, HK, 200, 6)
    log_forget = F.logsigmoid(torch.randn(B, H, 200))
    total = log_forget.cumsum(-1)
    bias = total[..., None] - total[..., None, :]
    expected = attend(q, k, v, pattern=Causal(), bias=bias, return_lse=True)
    for ours, theirs in zip(forgetting(q, k, v, log_forget), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 4096])
def test_forgetting_keeps_its_digits_over_long_rows(length: int) -> None:
    """Half of the past is forgotten at each token: the sums reach thousands, their differences do not."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 1, 4096, 8)
    q, log_forget = torch.randn(1, 2, length, 8), F.logsigmoid(torch.randn(1, 2, 4096))
    out = forgetting(q, k, v, log_forget)[0][:, :, -64:]
    total = log_forget.double().cumsum(-1)
    rows = min(length, 64)
    scores = q[:, :, -rows:].double() @ k.double().mT * 8**-0.5
    scores = scores + total[:, :, -rows:, None] - total[:, :, None]
    behind = torch.arange(4096 - rows, 4096)[:, None] - torch.arange(4096)
    weights = scores.masked_fill(behind < 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(out.double(), weights @ v.double(), atol=5e-6, rtol=0.0)


def test_stick_breaking_is_the_product_of_the_definition() -> None:
    scores = torch.randn(5, 7).double()
    scores[2, 3:] = -torch.inf
    scores[4] = -torch.inf
    weights, left = stick_breaking(scores)
    for i in range(5):
        stick = 1.0
        for j in reversed(range(7)):
            piece = stick * float(scores[i, j].sigmoid())
            assert float(weights[i, j]) == pytest.approx(piece)
            stick -= piece
        assert float(left[i].exp()) == pytest.approx(stick)


BAD: dict[str, tuple[str, Callable[[], object]]] = {
    "heads": ("width 24 is not divisible by 5", lambda: MultiHead(DIM, 5)),
    "kv_heads": ("4 query heads are not divisible by 3", lambda: MultiHead(DIM, H, num_kv_heads=3)),
    "rotary": ("rotary_dim is even", lambda: MultiHead(DIM, H, rope_theta=1e4, rotary_dim=3)),
    "rotary_wide": ("at most the head width 6", lambda: MultiHead(DIM, H, rope_theta=1e4, rotary_dim=8)),
    "window": ("a window looks back", lambda: MultiHead(DIM, H, window=3)),
    "learned_pair": ("no place to be turned by", lambda: LearnedPair(DIM, H, rope_theta=1e4)),
    "gate": ("a gate is 'headwise' or 'elementwise'", lambda: GatedAttention(DIM, H, gate="tokenwise")),
    "activation": ("'linear_clipping' or 'sigmoid'", lambda: AffineScaled(DIM, H, activation="relu")),
    "not_causal": ("looks back only", lambda: StickBreaking(DIM, H, causal=False)),
    "cache": ("needs causal=True", lambda: MultiHead(DIM, H).init_cache(B)),
    "context": ("takes no context", lambda: build("mha")(tokens(), tokens())),
    "documents": (
        "takes no document ids",
        lambda: packed_with_cache(build("mha")),
    ),
    "foreign_cache": (
        "belongs to another layer",
        lambda: build("mha")(tokens(), cache=build("mha").init_cache(B)),
    ),
    "gates": ("forget gates are", lambda: forgetting(*torch.randn(3, B, H, N, 4), torch.zeros(B, 1, N))),
    "forgetting_heads": (
        "4 query heads are not divisible by 3",
        lambda: forgetting(torch.randn(B, H, N, 4), *torch.randn(2, B, 3, N, 4), torch.zeros(B, H, N)),
    ),
}


def packed_with_cache(layer: AttentionLayer) -> Tensor:
    return layer(tokens(), mask=torch.zeros(B, N, dtype=torch.long), cache=layer.init_cache(B))


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    message, call = BAD[name]
    with pytest.raises(AttentionError) as caught:
        call()
    assert message in str(caught.value)
