"""FIT: one round of it as a layer, and the stack, against loops over the groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError, EqualGroups, attend
from zoo.attention.layers.fit import Fit, FitAttention, fit_layers
from zoo.attention.layers.multihead import split_heads

DIM, SIZE, LATENTS = 8, 4, 3


def fit(**options: Any) -> FitAttention:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"group_size": SIZE, "latents": LATENTS}
    return FitAttention(DIM, 2, **sizes | options).double()


def stack(layers: str = "(1)2(0)1(1)", **options: Any) -> Fit:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_heads": 2, "latent_heads": 2, "group_size": SIZE, "latents": LATENTS}
    return Fit(layers, DIM, 12, **sizes | options).double()


def tokens(length: int = 12) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [False, True])
def test_layer_is_its_definition_group_by_group(causal: bool) -> None:
    layer, x = fit(causal=causal), tokens()
    rows = []
    for row in x.unbind(0):
        groups = row[None].split(SIZE, 1)
        first = layer.latents[None]
        latents = [first + layer.read(first, group) for group in groups]
        normed = [layer.norm(group) for group in latents]
        after = []
        for g, own in enumerate(latents):
            seen = torch.cat(normed[: g + 1] if causal else normed, dim=1)
            after.append(own + across(layer, normed[g], seen))
        outs = []
        for g, group in enumerate(groups):
            read = after[g] if not causal else after[g - 1] if g else first
            outs.append(layer.local(group) + layer.write(group, layer.norm(read)))
        rows.append(torch.cat(outs, 1))
    torch.testing.assert_close(layer(x), torch.cat(rows), atol=1e-10, rtol=1e-10)


def across(layer: FitAttention, queries: Tensor, seen: Tensor) -> Tensor:
    net = layer.across
    q, k, v = (
        split_heads(f(x), 2) for f, x in ((net.q_proj, queries), (net.k_proj, seen), (net.v_proj, seen))
    )
    return net.project(attend(q, k, v))


def test_without_latents_it_is_attention_in_equal_groups() -> None:
    layer, x = fit(), tokens()
    nn.init.zeros_(layer.write.o_proj.weight)
    q, k, v = (split_heads(f(x), 2) for f in (layer.local.q_proj, layer.local.k_proj, layer.local.v_proj))
    expected = layer.local.project(attend(q, k, v, pattern=EqualGroups(SIZE)))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


def test_positions_are_those_of_the_row() -> None:
    layer, x = fit(rope_theta=10.0), tokens(10)
    torch.testing.assert_close(layer(x, positions=torch.arange(10)), layer(x))
    assert not torch.allclose(layer(x, positions=torch.arange(10) * 2), layer(x))


@pytest.mark.parametrize("layers", ["(1)1(1)", "(0)2(1)", "(1)2(0)1(1)"])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_stack_takes_any_length_as_padded_rows(layers: str, length: int) -> None:
    net = stack(layers)
    x = tokens(length + 5)
    mask = torch.arange(length + 5).expand(2, -1) < length
    alone, padded = net(x[:, :length]), net(x, mask)
    torch.testing.assert_close(padded[0][:, :length], alone[0])
    latents = alone[1].shape[1]
    assert latents == -(-length // SIZE) * LATENTS
    torch.testing.assert_close(padded[1][:, :latents], alone[1])


def test_stack_is_its_parts_in_order() -> None:
    """One group: local, read, across, write, local are plain layers."""
    net, x = stack("(1)1(1)"), tokens(SIZE)
    latents = net.latents.expand(2, -1, -1)
    x1 = net.local[0](x, None)
    latents = net.across[0](net.read[0](latents, x1, None), None)
    expected = net.local[1](net.write[0](x1, latents, None), None)
    out, after = net(x)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(after, latents)


def test_causal_stack_does_not_look_ahead_and_reaches_all_that_lies_behind() -> None:
    net, x = stack(causal=True, rope_theta=100.0), tokens(15)
    changed = x.clone()
    changed[:, 6, 0] += 1  # a norm does not see what all channels gain
    moved = (net(changed)[0] - net(x)[0]).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [i >= 6 for i in range(15)]


def test_every_token_reaches_every_other() -> None:
    net, x = stack(), tokens(15)
    changed = x.clone()
    changed[:, 6, 0] += 1  # a norm does not see what all channels gain
    assert ((net(changed)[0] - net(x)[0]).abs().amax((0, 2)) > 1e-9).all()


@pytest.mark.parametrize("build", [fit, stack])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_in_double_precision(build: Callable[..., nn.Module], causal: bool) -> None:
    net = build(causal=causal)

    def run(x: Tensor) -> Tensor:
        out = net(x)
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(run, (tokens(6).requires_grad_(),), fast_mode=True)


def test_stack_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    net, x = stack("(1)1(1)", causal=True), tokens(10)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[0], net(x)[0])


def test_strings_of_layers() -> None:
    assert fit_layers("(2)4(2)") == ([2, 2], [4])
    assert fit_layers("(0)12(3)4(1)") == ([0, 3, 1], [12, 4])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(group_size=0), "at least one token"),
        (lambda: stack(latents=0), "one latent"),
        (lambda: stack("4(2)"), "such as"),
        (lambda: stack("(2)4"), "such as"),
        (lambda: stack(latent_heads=5), "not divisible by 5"),
        (lambda: fit(causal=True).init_cache(1), "cannot decode"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        call()
