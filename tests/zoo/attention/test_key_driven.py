"""Head maps, key-driven groups, and mixtures of heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, Causal, Dense, Padding, Pattern, Window, attend, backend
from zoo.attention.heads import allocate, expand, key_norms, map_of, min_max, shared_map
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.key_driven import DynamicGQA, KeyDrivenGQA, PerturbedGQA, perturb
from zoo.attention.layers.mixture_of_heads import MixtureOfHeads, MixtureOfHeadsLlama, precise
from zoo.attention.layers.multihead import MultiHead

DIM, HEADS, TOKENS = 24, 6, 7


def seeded(make: Callable[[], AttentionLayer]) -> AttentionLayer:
    torch.manual_seed(0)
    return make().eval()


LAYERS: dict[str, Callable[[], AttentionLayer]] = {
    "kdgqa": lambda: KeyDrivenGQA(DIM, HEADS, num_kv_heads=3),
    "kdgqa uneven": lambda: KeyDrivenGQA(DIM, HEADS, num_kv_heads=4, qkv_bias=False),
    "dgqa diff": lambda: DynamicGQA(DIM, HEADS, num_kv_heads=3),
    "dgqa ema": lambda: DynamicGQA(DIM, HEADS, num_kv_heads=2, kind="ema", eval_updates=True),
    "pgqa": lambda: PerturbedGQA(DIM, HEADS, num_kv_heads=2),
    "moh": lambda: MixtureOfHeads(DIM, HEADS, shared_heads=2, routed_heads=2, causal=True),
    "moh one shared": lambda: MixtureOfHeads(DIM, HEADS, shared_heads=1, routed_heads=3),
    "moh none shared": lambda: MixtureOfHeads(DIM, HEADS, shared_heads=0, routed_heads=2),
    "moh all shared": lambda: MixtureOfHeads(DIM, HEADS, shared_heads=6, routed_heads=0),
    "moh llama": lambda: MixtureOfHeadsLlama(DIM, HEADS, num_kv_heads=3, rope_theta=100.0),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def dealt(weights: list[float], heads: int) -> list[int]:
    """The allocation one correction at a time, as the paper's program does it."""
    total = sum(weights)
    counts = [round(heads * w / total) for w in weights]
    while sum(counts) > heads:
        counts[counts.index(max(counts))] -= 1
    while sum(counts) < heads:
        counts[counts.index(min(counts))] += 1
    return counts


@pytest.mark.parametrize("groups", [3, 5, 12])
def test_allocation_equals_one_correction_at_a_time(groups: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    corrected = 0
    for heads in (groups, 2 * groups, 16, 31):
        for _ in range(40):
            weights = (torch.rand(groups, generator=generator, dtype=torch.double) ** 3 * 8).round() / 8
            weights[0] += 1 / 8
            counts = allocate(weights, heads)
            assert counts.tolist() == dealt(weights.tolist(), heads)
            assert counts.sum() == heads
            assert counts.min() >= 0
            corrected += int((heads * weights / weights.sum()).round().sum() != heads)
    assert corrected > 10


def test_equal_norms_give_equal_groups() -> None:
    assert allocate(min_max(torch.full((3,), 5.0)), 6).tolist() == [2, 2, 2]
    assert allocate(torch.zeros(3), 6).tolist() == [2, 2, 2]
    assert map_of(torch.tensor([2, 2, 2]), 6).tolist() == shared_map(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert map_of(torch.tensor([2, 0, 5, 1]), 8).tolist() == [0, 0, 2, 2, 2, 2, 2, 3]


def test_expand_reads_each_head_by_its_map() -> None:
    k = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(
        expand(k, torch.tensor([2, 0, 0])), torch.stack([k[:, 2], k[:, 0], k[:, 0]], 1)
    )


def test_keys_and_values_with_maps_of_their_own() -> None:
    """DHA with equal maps is GQA; each head reads its own pair."""
    q, k, v = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 3, 5, 8)
    keys, values = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 2])
    out = attend(q, expand(k, keys), expand(v, values))
    torch.testing.assert_close(out[:, 3:], attend(q[:, 3:], k[:, 1:], v[:, 2:]))
    torch.testing.assert_close(attend(q, expand(k, keys), expand(k, keys)), attend(q, k, k))


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize(
    "pattern", [Dense(), Causal(), Window(3, causal=True), Padding(torch.tensor([[True] * 3 + [False] * 2]))]
)
def test_shared_heads_with_values_of_another_width(pattern: Pattern, num_queries: int) -> None:
    inputs = [torch.randn(2, h, n, d) for h, n, d in ((6, num_queries, 8), (2, 5, 8), (2, 5, 3))]

    def trained() -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, pattern=pattern, return_lse=True)
        grads = torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)
        torch.testing.assert_close(attend(*leaves, pattern=pattern), out)
        return out, lse, *grads

    with backend("reference"):
        expected = trained()
    torch.testing.assert_close(trained(), expected)


@pytest.mark.parametrize("kind", [KeyDrivenGQA, DynamicGQA])
def test_equal_allocation_is_grouped_attention(kind: type[KeyDrivenGQA], x: Tensor) -> None:
    layer = kind(DIM, HEADS, num_kv_heads=3)
    layer.allocation = lambda norms: torch.tensor([2, 2, 2])
    q, k, v = layer.split(layer.q(x)), layer.split(layer.k(x)), layer.split(layer.v(x))
    expected = layer.proj(attend(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected)


def test_dynamic_groups_in_training(x: Tensor) -> None:
    layer = DynamicGQA(DIM, HEADS, num_kv_heads=3, window_size=2)
    norms = key_norms(layer.split(layer.k(x)))
    first = layer.cache.clone()
    layer(x)
    assert layer.counts.tolist() == [2, 2, 2]
    torch.testing.assert_close(layer.cache, first)
    layer(x)
    torch.testing.assert_close(layer.cache, norms / 2)
    assert layer.counts.tolist() == allocate(norms, HEADS).tolist()
    kept = layer.cache.clone()
    layer.eval()(x)
    torch.testing.assert_close(layer.cache, kept)
    layer.eval_updates = True
    layer(x)
    torch.testing.assert_close(layer.cache, norms)
    assert set(layer.state_dict()) >= {"cache"}
    assert not {"counts", "steps"} & set(layer.state_dict())


def test_noise_takes_mean_and_spread_of_the_output() -> None:
    out, uniform = torch.randn(2, 4, 3, 5) * 3 + 1, torch.rand(2, 2, 15)
    noise = (out - perturb(out, uniform)).flatten(2)
    torch.testing.assert_close(noise.mean(-1), out.flatten(2).mean(-1))
    torch.testing.assert_close(noise.std(-1), out.flatten(2).std(-1))


def test_noise_is_random_in_training_only(x: Tensor) -> None:
    layer = PerturbedGQA(DIM, HEADS, num_kv_heads=2).eval()
    torch.testing.assert_close(layer(x), layer(x))
    points = layer.draw((2, 3, 100), x.device)
    assert (torch.histc(points, bins=10, min=0, max=1) - 60).abs().max() < 5
    layer.train()
    assert not torch.allclose(layer(x), layer(x))


def test_heads_of_weight_one_are_multi_head_attention(x: Tensor) -> None:
    layer = seeded(LAYERS["moh"])
    q, k, v = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    layer.gates = lambda tokens: torch.ones(2, TOKENS, HEADS)
    layer.causal = False
    torch.testing.assert_close(layer(x), layer.proj(attend(q, k, v).transpose(1, 2).flatten(2)))


def test_gates_of_a_mixture(x: Tensor) -> None:
    gates = seeded(LAYERS["moh"]).gates(x)
    assert ((gates[..., 2:] > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates.sum(-1), torch.full((2, TOKENS), 4.0))  # 2 b_0 + 2 b_1
    lone = seeded(LAYERS["moh one shared"]).gates(x)
    torch.testing.assert_close(lone[..., 1:].sum(-1), 3 * (2 - lone[..., 0]))
    torch.testing.assert_close(
        seeded(LAYERS["moh none shared"]).gates(x).sum(-1), torch.full((2, TOKENS), 2.0)
    )
    torch.testing.assert_close(
        seeded(LAYERS["moh all shared"]).gates(x).sum(-1), torch.full((2, TOKENS), 6.0)
    )


def test_balance_loss(x: Tensor) -> None:
    layer = seeded(LAYERS["moh none shared"])
    layer.balance_loss(x).backward()
    assert layer.wg.weight.grad.any()
    with torch.no_grad():
        layer.wg.weight.zero_()  # equal probabilities; two of six heads are kept
        torch.testing.assert_close(layer.balance_loss(x), torch.tensor(2.0))
        layer.wg.weight[:2] = 9 * x.flatten(0, 1).mean(0)
        assert layer.balance_loss(x.mean(1, keepdim=True)) > 3.0
    assert seeded(LAYERS["moh all shared"]).balance_loss(x) == 0


def test_llama_mixture_with_all_heads_is_grouped_attention(x: Tensor) -> None:
    layer = MixtureOfHeadsLlama(DIM, HEADS, num_kv_heads=3, routed_heads=3, rope_theta=100.0)
    grouped = MultiHead(DIM, HEADS, num_kv_heads=3, rope_theta=100.0, causal=True)
    grouped.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), grouped(x))
    layer.routed_heads = 1
    q = torch.randn(1, HEADS, 3, 4)
    q[:, 4] *= 100
    assert layer.gates(q)[0, :, 0].tolist() == [1, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "pgqa"])
def test_padding_is_not_seen(name: str, x: Tensor) -> None:
    layer = seeded(LAYERS[name])
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[:, 5:] = False
    torch.testing.assert_close(layer(x, mask=mask)[:, :5], layer(x[:, :5]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("pgqa", "moh", "moh llama")])
def test_permuted_tokens_give_permuted_results(name: str, x: Tensor) -> None:
    layer, order = seeded(LAYERS[name]), torch.randperm(TOKENS)
    expected = layer(x)[:, order]
    torch.testing.assert_close(seeded(LAYERS[name])(x[:, order]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_double_precision(name: str) -> None:
    layer = seeded(LAYERS[name]).double()
    tokens = torch.randn(1, 3, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(layer, (tokens.requires_grad_(),), fast_mode=True)


def test_autocast_does_not_round_what_chooses_heads(x: Tensor) -> None:
    mixture, proj = seeded(LAYERS["moh"]), torch.nn.Linear(DIM, 5)
    gates, projected = mixture.gates(x), proj(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mixture.gates(x), gates)
        torch.testing.assert_close(precise(proj, x), projected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyDrivenGQA(DIM, 5, num_kv_heads=2), "not divisible by 5 heads"),
        (lambda: KeyDrivenGQA(DIM, HEADS, num_kv_heads=1), "at least 2 key/value heads"),
        (lambda: KeyDrivenGQA(DIM, HEADS, num_kv_heads=7), "heads are 1 .. 6"),
        (lambda: PerturbedGQA(DIM, HEADS, num_kv_heads=4), "not divisible by 4"),
        (lambda: DynamicGQA(DIM, HEADS, num_kv_heads=2, kind="sum"), "'diff' or 'ema'"),
        (lambda: DynamicGQA(DIM, HEADS, num_kv_heads=2, window_size=0), "window_size"),
        (lambda: MixtureOfHeads(DIM, HEADS, shared_heads=2, routed_heads=5), "1 .. 4 act on a token, not 5"),
        (lambda: MixtureOfHeads(DIM, HEADS, shared_heads=2, routed_heads=0), "1 .. 4 act on a token, not 0"),
        (lambda: MixtureOfHeads(DIM, HEADS, shared_heads=7, routed_heads=0), "shared heads are 0 .. 6"),
        (lambda: MixtureOfHeads(DIM, HEADS, shared_heads=6, routed_heads=0).init_cache(1), "only causal"),
        (lambda: KeyDrivenGQA(DIM, HEADS, num_kv_heads=2).init_cache(1), "has no cache"),
        (
            lambda: PerturbedGQA(4, 2, num_kv_heads=1)(torch.zeros(1, 3, 4), mask=torch.ones(1, 3).bool()),
            "padded",
        ),
        (lambda: expand(torch.zeros(1, 2, 3, 4), torch.zeros(3)), "integers"),
        (lambda: shared_map(6, 4), "not divisible by 4"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        call()
