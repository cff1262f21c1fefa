"""Whole models with another attention: what they keep, and what is said of each layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.attention import AttentionError
from zoo.attention.layers import AttentionLayer
from zoo.errors import ConfigError
from zoo.training.converted_model import Calls, as_core_layers, convert_model, observe
from zoo.weights.checkpoint import load_model, save_model

N, STEPS = 6, 8


def st_llm(attention: Any = None) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_nodes": N, "history": STEPS, "horizon": STEPS, "steps_per_day": 24}
    widths: dict[str, Any] = {"width": 24, "num_heads": 4, "llm_layers": 2, "trainable_layers": None}
    return zoo.create_model("traffic/st_llm", **sizes, **widths, attention=attention).eval()


def gman(**attention: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_nodes": N, "history": STEPS, "horizon": STEPS, "steps_per_day": 24}
    return zoo.create_model("traffic/gman", **sizes, num_heads=2, head_dim=4, **attention).eval()


def chronos() -> nn.Module:
    torch.manual_seed(0)
    widths: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2}
    return zoo.create_model("forecasting/chronos2_mini", **widths, context_length=64).eval()


def window(seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    time = torch.stack([torch.zeros(2 * STEPS), torch.arange(2 * STEPS)], -1).long()
    return torch.randn(3, STEPS, N, generator=draw), time.expand(3, -1, -1)


def passes(model: nn.Module, count: int = 3, seed: int = 0) -> Iterator[None]:
    for i in range(count):
        model(*window(seed + i))
        yield


def calls(model: nn.Module) -> tuple[Calls, Calls]:
    return observe(model, passes(model), 1000), observe(model, passes(model, seed=10), 20)


@torch.no_grad()
def test_own_attention_of_st_llm_is_one_of_the_core() -> None:
    model = st_llm()
    core = as_core_layers(model)
    assert sum(isinstance(m, AttentionLayer) for m in core.modules()) == 2
    torch.testing.assert_close(core(*window()), model(*window()), atol=1e-6, rtol=1e-6)
    assert as_core_layers(core) is core


@torch.no_grad()
def test_own_attention_of_chronos_is_one_of_the_core() -> None:
    """With missing steps, and rows that begin with patches of none."""
    model = chronos()
    core = as_core_layers(model)
    series = torch.randn(4, 60).cumsum(1)
    series[0, :35], series[1, 40:45] = torch.nan, torch.nan
    found, expected = (cast(Any, m)(series, num_output_patches=2).quantiles for m in (core, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("gqa", {"num_kv_heads": 4}),
        ("mla", {"kv_rank": 48}),
        ("moh", {"shared_heads": 2, "routed_heads": 2}),
    ],
)
def test_model_of_layers_that_lose_nothing_is_the_same(to: str, options: dict[str, Any]) -> None:
    model = as_core_layers(st_llm())
    made, losses = convert_model(model, to, *calls(model), **options)
    with torch.no_grad():
        torch.testing.assert_close(made(*window(5)), model(*window(5)), atol=1e-5, rtol=1e-5)
    assert [loss.layer for loss in losses] == ["gpt2.blocks.0.attention", "gpt2.blocks.1.attention"]
    assert max(max(loss.error, loss.held_out) for loss in losses) < 1e-4


def test_converted_model_is_stored_and_built_again(tmp_path: Any) -> None:
    model = as_core_layers(st_llm())
    made, losses = convert_model(model, "mla", *calls(model), kv_rank=8)
    save_model(made, tmp_path / "model.safetensors")
    again, _ = load_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(*window()), made(*window()))
        assert not torch.allclose(made(*window()), model(*window()), atol=1e-5)
    assert losses[0].cache == (4 * 2 * 24, 4 * 8)
    assert losses[0].parameters[1] < losses[0].parameters[0] == 4 * 24 * 25
    assert all(0 < loss.error < 1 and 0 < loss.held_out < 1 for loss in losses)


def test_conversions_follow_each_other() -> None:
    model = as_core_layers(st_llm())
    grouped, _ = convert_model(model, "gqa", *calls(model), num_kv_heads=2)
    latent, losses = convert_model(grouped, "mla", *calls(grouped), kv_rank=24)
    with torch.no_grad():
        torch.testing.assert_close(latent(*window()), grouped(*window()), atol=1e-5, rtol=1e-5)
    assert cast(Any, latent).zoo_config["config"]["attention"]["name"] == "mla"
    assert losses[0].cache == (4 * 2 * 12, 4 * 24)


@pytest.mark.parametrize("asked", [{"name": "multihead", "causal": False}, {"name": "multihead"}])
def test_one_attention_of_two_is_converted(asked: dict[str, Any]) -> None:
    """Over the steps of GMAN; that over its sensors stays, also where it goes by the same config."""
    model = gman(attention="multihead", temporal_attention=asked)
    made, losses = convert_model(model, "mqa", *calls(model), argument="temporal_attention")
    names = [loss.layer for loss in losses]
    assert names == ["encoder.0.temporal.layer", "decoder.0.temporal.layer"]
    config = cast(Any, made).zoo_config["config"]
    assert config["attention"] == "multihead"
    assert config["temporal_attention"] == asked | {"num_kv_heads": 1}
    state = made.state_dict()
    for name, value in model.state_dict().items():
        kept = "temporal.layer.k_proj" not in name and "temporal.layer.v_proj" not in name
        assert (state[name].shape == value.shape and torch.equal(state[name], value)) == kept


def test_layers_are_observed_up_to_whole_rows() -> None:
    model = as_core_layers(st_llm())
    found = observe(model, passes(model, 5), 25)["gpt2.blocks.1.attention"]
    assert [len(call.x) for call in found] == [3, 2]  # of N = 6 tokens each
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_mistakes_are_explained() -> None:
    with pytest.raises(ConfigError, match=r"own attention of model 'gman' is no layer.*multihead"):
        as_core_layers(gman())
    with pytest.raises(ConfigError, match=r"no argument 'attn'.*It has: attention, temporal_attention"):
        as_core_layers(gman(), "attn")
    model = as_core_layers(st_llm())
    seen, unseen = calls(model)
    with pytest.raises(ConfigError, match=r"gpt2.blocks.0.attention are not called.*nothing to fit them to"):
        convert_model(model, "mqa", seen | {"gpt2.blocks.0.attention": []}, unseen)
    with pytest.raises(AttentionError, match=r"kv_rank is 1 .. 48, not 64"):
        convert_model(model, "mla", seen, unseen, kv_rank=64)
