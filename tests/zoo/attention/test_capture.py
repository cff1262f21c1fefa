"""Maps of unmodified models, by module name."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import (
    AttentionError,
    AttentionMap,
    Causal,
    Groups,
    Neighbours,
    Padding,
    Pattern,
    TopKSoftmax,
    Window,
    attend,
    backend,
    capture,
)


class Attention(nn.Module):
    def __init__(self, pattern: Pattern | None = None) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, pattern=self.pattern).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, pattern: Pattern | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = Attention(pattern)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def model() -> nn.Sequential:
    return nn.Sequential(Block(), Block(Causal()), nn.Linear(8, 8))


X = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [False, True])
def test_maps_carry_the_names_of_the_modules(given: bool) -> None:
    net = model()
    expected = net(X)
    with capture(net if given else None) as maps:
        torch.testing.assert_close(net(X), expected)
    assert list(maps) == ["0.attention", "1.attention"]
    dense, causal = (maps[name].weights for name in maps)
    assert dense.shape == (3, 2, 6, 6)
    assert not dense.requires_grad
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, 2, 6))
    assert not causal.triu(1).any()
    torch.testing.assert_close(
        maps["0.attention"].weights @ maps["0.attention"].values, maps["0.attention"].output
    )


def test_names_are_those_of_the_given_model_inside_a_wrapper() -> None:
    wrapper = nn.ModuleDict({"inner": model()})
    wrapper.forward = lambda x: wrapper["inner"](x)  # type: ignore[method-assign]
    with capture() as outer:
        wrapper(X)
    with capture(wrapper["inner"]) as inner:
        wrapper(X)
    assert list(outer) == ["inner.0.attention", "inner.1.attention"]
    assert list(inner) == ["0.attention", "1.attention"]


def test_calls_outside_of_the_given_model_are_not_recorded() -> None:
    net, other = model(), Attention()
    with capture(net) as maps:
        other(X)
        net(X)
        attend(*(torch.randn(1, 1, 2, 4) for _ in range(3)))
    assert list(maps) == ["0.attention", "1.attention"]


def test_a_second_call_of_a_module_and_a_root_have_names() -> None:
    attention = Attention()
    with capture() as maps:
        attention(X)
        attention(X + 1)
    assert list(maps) == ["Attention", "Attention#2"]
    assert not torch.equal(maps["Attention"].weights, maps["Attention#2"].weights)


def test_chosen_modules_are_recorded_and_the_others_keep_their_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model()
    fused = []
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention", lambda *a, **k: fused.append(1) or kernel(*a, **k)
    )
    with capture(net, modules=["1.*"]) as maps:
        net(X)
    assert list(maps) == ["1.attention"]
    assert fused == [1]


def test_a_reducer_runs_inside_and_only_its_result_is_kept() -> None:
    net = model()
    with capture(net, reduce=lambda found: found.weights.mean(1)) as maps:
        net(X)
        assert [type(value) for value in maps.values()] == [Tensor, Tensor]
    assert maps["0.attention"].shape == (3, 6, 6)


def test_gradient_of_the_map_is_that_of_the_output_through_it() -> None:
    """For y = sum(A V): dy/dA_ij = sum_d V_jd."""
    net = Attention()
    with capture(net, grad=True) as maps:
        net(X).sum().backward()
    found = maps["Attention"]
    torch.testing.assert_close(found.grad, found.values.sum(-1)[:, :, None, :].expand(-1, -1, 6, -1))


def test_scores_on_request() -> None:
    net = Attention(Causal())
    with capture(net, scores=True) as maps:
        net(X)
    torch.testing.assert_close(maps["Attention"].scores.softmax(-1), maps["Attention"].weights)
    assert maps["Attention"].scores[0, 0, 0, 1] == -torch.inf


@pytest.mark.parametrize("attribute", ["scores", "grad"])
def test_what_was_not_recorded_says_how_to_ask(attribute: str) -> None:
    net = Attention()
    with capture(net) as maps:
        net(X)
    with pytest.raises(AttentionError, match=f"capture with {attribute}=True"):
        getattr(maps["Attention"], attribute)


@pytest.mark.parametrize(
    "pattern",
    [
        Window(3),
        Groups(torch.tensor([2, 0, 2, 2, 1, 0])),
        Groups(torch.tensor([[0, 1, 1, 1, 1, 0], [2, 2, 2, 1, 1, 1], [3, 3, 3, 3, 3, 3]])),
        Neighbours(torch.tensor([[1, 2], [0, -1], [-1, -1], [5, 3], [2, 0], [4, 1]])),
        Window(5) & Padding(torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.5),
    ],
    ids=repr,
)
def test_maps_of_sparse_patterns_are_tiles_that_densify(pattern: Pattern) -> None:
    net = Attention(pattern)
    with capture(net, scores=True, grad=True) as maps:
        out = net(X)
        out.square().sum().backward()
    found = maps["Attention"]
    torch.testing.assert_close((found.weights @ found.values).transpose(1, 2).flatten(2), out)
    seen = pattern.mask(3, 6, 6, X.device)
    assert seen is not None
    hidden = ~seen.expand(3, 2, 6, 6)
    assert not found.weights[hidden].any()
    assert (found.scores[hidden] == -torch.inf).all()
    upstream = (2 * out).unflatten(-1, (2, 4)).transpose(1, 2)
    expected = (upstream @ found.values.transpose(-1, -2)).masked_fill(hidden, 0.0)
    torch.testing.assert_close(found.grad.masked_fill(hidden, 0.0), expected)


def test_a_dense_map_beyond_the_limit_is_refused() -> None:
    x = torch.randn(1, 1, 16_384, 4)
    with capture() as maps:
        attend(x, x, x, pattern=Window(3))
    with pytest.raises(AttentionError, match="too large"):
        _ = maps["attend"].weights
    assert maps["attend"].tiles[0].weights.shape[-1] < 100


def test_top_k_weights_are_recorded() -> None:
    q = torch.randn(1, 2, 5, 4)
    with capture() as maps:
        attend(q, q, q, kernel=TopKSoftmax(2))
    assert ((maps["attend"].weights > 0).sum(-1) == 2).all()


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # a global hook fires once more: harmless
def test_compiled_models_are_captured_by_their_own_names() -> None:
    torch.compiler.reset()
    net = torch.compile(model(), backend="eager")
    expected = net(X)
    with capture() as maps:
        torch.testing.assert_close(net(X), expected)
    assert list(maps) == ["0.attention", "1.attention"]
    torch.testing.assert_close(net(X), expected)
    with capture() as alone:
        torch.compile(Attention(), backend="eager")(X)
    assert list(alone) == ["Attention"]


def test_an_empty_capture_says_why() -> None:
    net = model()
    with (
        pytest.raises(AttentionError, match="captured of Sequential: no forward pass of it ran"),
        capture(net),
    ):
        pass
    with pytest.raises(AttentionError, match=r"of Linear: .* none of its modules called"), capture():
        nn.Linear(8, 8)(X)
    with (
        pytest.raises(AttentionError, match=r"match none of 0\.attention, 1\.attention"),
        capture(net, modules=["2.*"]),
    ):
        net(X)


def test_nothing_stays_behind_after_an_error_inside() -> None:
    net = model()
    with pytest.raises(RuntimeError, match="normalized_shape"), capture(net):
        net(X[..., :3])
    with pytest.raises(AttentionError, match="do not nest"), capture(net), capture(net):
        pass
    with capture(net) as maps:
        net(X)
    assert isinstance(maps["0.attention"], AttentionMap)


def test_an_error_caught_inside_a_model_does_not_shift_the_names() -> None:
    class Forgiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fails, self.works = Attention(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(RuntimeError):
                self.fails(x[..., :3])
            return self.works(x)

    with capture() as maps:
        Forgiving()(X)
    assert list(maps) == ["works"]


def test_a_forced_backend_does_not_hinder_a_capture() -> None:
    net = model()
    with backend("reference"), capture(net) as maps:
        net(X)
    assert len(maps) == 2


def test_the_example_in_the_docstring_runs() -> None:
    result = doctest.testmod(importlib.import_module("zoo.attention.capture"))
    assert (result.failed, result.attempted > 0) == (0, True)
