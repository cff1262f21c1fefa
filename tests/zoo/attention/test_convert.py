"""Conversions of trained layers: exact where nothing is left out, near where fitted, else refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.convert import CONVERSIONS, cache_bytes, conversion_options, convert, relative_error
from zoo.attention.convert.heads import contributions
from zoo.attention.layers import AttentionLayer, create_attention
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.multihead import MultiHead

DIM, HEADS, WIDTH = 24, 4, 6
OPTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 2},
    "mqa": {},
    "mla": {"kv_rank": 10},
    "linear": {"steps": 12},
    "lolcats": {"window": 4, "steps": 12},
    "moh": {"shared_heads": 1, "routed_heads": 2},
}
every_conversion = pytest.mark.parametrize("to", sorted(OPTIONS))


def trained(**options: Any) -> MultiHead:
    """A layer whose scores are far from equal."""
    torch.manual_seed(0)
    given: dict[str, Any] = {"causal": True, "qkv_bias": True, "out_bias": True} | options
    layer = MultiHead(DIM, HEADS, **given).eval()
    with torch.no_grad():
        layer.q_proj.weight *= 4
    return layer


def tokens(seed: int, rows: int = 4, length: int = 12) -> Tensor:
    """Tokens that lie near a subspace, as those of trained models do."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, DIM, generator=torch.Generator().manual_seed(99))
    return torch.randn(rows, length, 6, generator=draw) @ basis / 2 + 0.3


@pytest.fixture
def seen() -> list[Tensor]:
    return [tokens(1), tokens(2), tokens(3)]


@pytest.fixture
def unseen() -> Tensor:
    return tokens(7)


def test_all_conversions_are_tested_here() -> None:
    assert sorted(OPTIONS) == sorted(CONVERSIONS)


@every_conversion
@pytest.mark.parametrize("rope_theta", [None, 100.0])
def test_made_layer_is_the_one_that_its_config_makes(
    to: str, rope_theta: float | None, seen: list[Tensor], unseen: Tensor
) -> None:
    layer = trained(rope_theta=rope_theta)
    before = copy.deepcopy(layer.state_dict())
    made = convert(layer, to, seen, **OPTIONS[to])
    assert made.asked is not None
    again = create_attention(made.asked, DIM).eval()
    again.load_state_dict(made.state_dict())
    torch.testing.assert_close(again(unseen), made(unseen), atol=0, rtol=0)
    assert not made.training
    assert all(p.requires_grad and p.grad is None for p in made.parameters())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@every_conversion
def test_made_layer_decodes_as_it_runs(to: str, seen: list[Tensor], unseen: Tensor) -> None:
    made = convert(trained(rope_theta=100.0), to, seen, **OPTIONS[to])
    cache = made.init_cache(len(unseen))
    steps = torch.cat([made.step(token, cache) for token in unseen.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, made(unseen), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("to", "options", "rope_theta"),
    [
        ("gqa", {"num_kv_heads": HEADS}, 100.0),
        ("mla", {"kv_rank": 2 * DIM}, None),
        ("moh", {"shared_heads": 1, "routed_heads": 3}, 100.0),
        ("moh", {"shared_heads": 0, "routed_heads": 4}, None),
        ("moh", {"shared_heads": 4, "routed_heads": 0}, None),
    ],
)
def test_nothing_is_lost_where_nothing_is_left_out(
    to: str,
    options: dict[str, Any],
    rope_theta: float | None,
    causal: bool,
    seen: list[Tensor],
    unseen: Tensor,
) -> None:
    layer = trained(rope_theta=rope_theta, causal=causal).double()
    made = convert(layer, to, [x.double() for x in seen], **options)
    torch.testing.assert_close(made(unseen.double()), layer(unseen.double()), atol=1e-10, rtol=1e-10)


def test_heads_that_are_alike_share_without_loss(unseen: Tensor) -> None:
    """MHA with equal heads in each group, to GQA, to MLA of full rank, to a mixture: all the same."""
    grouped = trained(num_kv_heads=2)
    full = trained()
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        state[name] = state[name].unflatten(0, (2, WIDTH)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    assert relative_error(convert(full, "gqa", num_kv_heads=2), grouped, unseen) < 1e-6
    assert relative_error(convert(grouped, "mla", unseen, kv_rank=2 * 2 * WIDTH), full, unseen) < 1e-5
    mixture = convert(grouped, "moh", unseen, shared_heads=2, routed_heads=2)
    assert relative_error(mixture, full, unseen) < 1e-6


def test_latent_error_falls_with_the_rank(seen: list[Tensor], unseen: Tensor) -> None:
    layer = trained()
    errors = [relative_error(convert(layer, "mla", seen, kv_rank=r), layer, unseen) for r in (2, 6, 14)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-4  # the tokens span 6 dimensions and the mean: no more than 14 are needed


@pytest.mark.parametrize(
    ("to", "options", "causal"),
    [("linear", {}, False), ("linear", {"features": 8}, True), ("lolcats", {"window": 3}, True)],
)
def test_transfer_lowers_the_error(
    to: str, options: dict[str, Any], causal: bool, seen: list[Tensor], unseen: Tensor
) -> None:
    """Projections stay as they are."""
    layer = trained(causal=causal)
    start = convert(layer, to, seen, steps=0, **options)
    made = convert(layer, to, seen, steps=60, lr=3e-2, **options)
    assert relative_error(made, layer, seen) < 0.75 * relative_error(start, layer, seen)
    assert relative_error(made, layer, unseen) < 0.9 * relative_error(start, layer, unseen)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, made.state_dict()[name])


def test_transfer_that_would_not_help_is_undone(seen: list[Tensor]) -> None:
    layer = trained()
    start = convert(layer, "linear", seen, steps=0)
    spoiled = convert(layer, "linear", seen, steps=1, lr=1e4)
    assert relative_error(spoiled, layer, seen) == relative_error(start, layer, seen)


def test_window_over_all_tokens_is_softmax(seen: list[Tensor], unseen: Tensor) -> None:
    layer = trained()
    assert relative_error(convert(layer, "lolcats", seen, window=16, steps=0), layer, unseen) < 1e-6


def test_mixture_keeps_the_heads_that_give_most(seen: list[Tensor], unseen: Tensor) -> None:
    layer = trained()
    with torch.no_grad():  # heads 1 and 3 matter, 0 and 2 hardly
        layer.o_proj.weight.view(DIM, HEADS, WIDTH)[:, [0, 2]] *= 1e-3
    made = convert(layer, "moh", seen, shared_heads=2, routed_heads=1)
    assert relative_error(made, layer, unseen) < 0.01


def test_router_finds_the_head_that_a_token_needs() -> None:
    """Two kinds of token, for each of which one head of the two gives something."""
    layer = MultiHead(4, 2).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.q_proj.weight[0, 0] = layer.k_proj.weight[0, 0] = 30.0  # tokens see their own kind
        layer.q_proj.weight[2, 0] = layer.k_proj.weight[2, 0] = 30.0
        layer.v_proj.weight[0, 1] = layer.v_proj.weight[2, 2] = 1.0
        layer.o_proj.weight[0, 0] = layer.o_proj.weight[1, 2] = 1.0
    draw = torch.Generator().manual_seed(0)
    kind = torch.rand(8, 10, generator=draw) < 0.5
    x = torch.zeros(8, 10, 4)
    x[..., 0] = torch.where(kind, 1.0, -1.0)
    x[..., 1], x[..., 2] = kind.float() * 2, (~kind).float() * 2
    with torch.no_grad():
        gates = convert(layer, "moh", x, shared_heads=0, routed_heads=1).gates(x)  # type: ignore[operator]
    norms = contributions(layer, [Inputs(x, None, None, None, None)])
    wanted = norms.argsort(descending=True)[:, 0].view(8, 10)
    order = norms.mean(0).argsort(descending=True)
    assert torch.equal(order[gates.argmax(-1)], wanted)


def test_padding_counts_for_nothing(seen: list[Tensor]) -> None:
    layer = trained()
    x, mask = seen[0], torch.arange(12).expand(4, 12) < 9
    calls = [Inputs(x.masked_fill(~mask[..., None], 50.0), None, mask, None, None)]
    for to, options in (("mla", {"kv_rank": 6}), ("linear", {"steps": 5}), ("moh", OPTIONS["moh"])):
        padded, cut = convert(layer, to, calls, **options), convert(layer, to, x[:, :9], **options)
        assert relative_error(padded, cut, x) < 1e-4
        assert relative_error(padded, layer, calls) == pytest.approx(
            relative_error(cut, layer, x[:, :9]), rel=1e-3
        )


def test_error_is_that_of_the_outputs(unseen: Tensor) -> None:
    layer = trained()
    halved = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in halved.o_proj.parameters():
            parameter *= 0.5
    assert relative_error(halved, layer, unseen) == pytest.approx(0.5)
    assert relative_error(layer, layer, unseen) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_cache_is_counted_in_bytes_per_token(causal: bool, seen: list[Tensor]) -> None:
    """float32; keys and values of a head are 6 wide."""
    layer = trained(rope_theta=100.0, causal=causal)
    found = {
        to: cache_bytes(convert(layer, to, seen, **OPTIONS[to])) for to in ("gqa", "mqa", "mla", "linear")
    }
    assert cache_bytes(layer) == 4 * 2 * DIM
    assert found == {"gqa": 4 * DIM, "mqa": 4 * 2 * WIDTH, "mla": 4 * (10 + WIDTH), "linear": 0}
    assert cache_bytes(create_attention("agent", DIM, num_heads=2, agents=2)) is None
    assert cache_bytes(create_attention("lolcats", DIM, num_heads=2, window=3)) == 0


def test_other_layers_share_keys_too(unseen: Tensor) -> None:
    layer = create_attention({"name": "sinks", "window": 5}, DIM, num_heads=HEADS, causal=True).eval()
    made = convert(layer, "gqa", num_kv_heads=2)
    assert made.asked == {"name": "sinks", "window": 5, "num_kv_heads": 2}
    assert 0 < relative_error(made, layer, unseen) < 2


@pytest.mark.parametrize(
    ("layer", "to", "options", "message"),
    [
        ({"name": "multihead"}, "gpa", {}, "no conversion to 'gpa'.*Did you mean.*gqa"),
        ({"name": "multihead"}, "gqa", {"num_kv_heads": 3}, "4 key/value heads do not form 3"),
        ({"name": "multihead"}, "gqa", {}, "'gqa' needs num_kv_heads"),
        ({"name": "multihead"}, "gqa", {"num_kv_head": 2}, "no option 'num_kv_head'.*num_kv_heads"),
        ({"name": "multihead"}, "mqa", {"num_kv_heads": 2}, "It has: none"),
        ({"name": "multihead"}, "mla", {"kv_rank": 99}, "kv_rank is 1 .. 48, not 99"),
        ({"name": "multihead"}, "linear", {"steps": -1}, "steps of a positive size, not -1"),
        ({"name": "multihead"}, "moh", {"shared_heads": 9, "routed_heads": 1}, "shared heads are 0 .. 4"),
        (
            {"name": "multihead"},
            "lolcats",
            {},
            "takes causal multihead.*can become: gqa, linear, mla, moh, mqa",
        ),
        ({"name": "multihead", "qk_norm": True}, "mla", {"kv_rank": 4}, "It can become: gqa, linear, mqa"),
        ({"name": "multihead", "head_dim": 8}, "moh", OPTIONS["moh"], "as wide as the tokens"),
        ({"name": "gated"}, "gqa", {"num_kv_heads": 2}, "'gated' as it is here cannot become 'gqa'"),
        ({"name": "gla"}, "linear", {}, "'gla' as it is here.*It can become nothing else"),
    ],
)
def test_mistakes_are_explained(
    layer: dict[str, Any], to: str, options: dict[str, Any], message: str, unseen: Tensor
) -> None:
    with pytest.raises(AttentionError, match=message):
        convert(create_attention(layer, DIM, num_heads=HEADS), to, unseen, **options)


def test_fitting_needs_tokens_of_the_layer() -> None:
    layer: AttentionLayer = trained()
    with pytest.raises(AttentionError, match="give some as the layer meets them"):
        convert(layer, "mla", kv_rank=4)
    with pytest.raises(AttentionError, match=r"calibration tokens are \(B, N, 24\), not \(2, 3, 8\)"):
        convert(layer, "mla", torch.zeros(2, 3, 8), kv_rank=4)
    assert set(conversion_options("mla")) >= {"kv_rank", "q_rank", "rope_dim"}
