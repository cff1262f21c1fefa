"""What each method of fine-tuning trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy
from omegaconf import OmegaConf
from torch import nn

from zoo.errors import ConfigError
from zoo.training.finetune import adapt, merge_lora
from zoo.training.optim import build_optimizer, parameter_groups


def settings(method: str, **changes: Any) -> Any:
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target": ["stem"]}
    probe = {"kind": "linear"}
    return OmegaConf.create({"method": method, "freeze": [], "lora": lora, "probe": probe} | changes)


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_head_trains_the_last_layer_and_keeps_running_statistics() -> None:
    model = toy.model(dropout=0.0).train()
    adapt(model, settings("head"))
    assert trained(model) == {"head.weight", "head.bias"}
    before = model.norm.running_mean.clone()
    model(torch.randn(16, 8))
    assert torch.equal(model.norm.running_mean, before)


def test_probe_draws_a_fresh_head() -> None:
    model = toy.model()
    old = model.head.weight.detach().clone()
    adapt(model, settings("probe"))
    assert not torch.equal(model.head.weight, old)
    assert trained(model) == {"head.weight", "head.bias"}


def test_freeze_adds_to_any_method() -> None:
    model = toy.model()
    adapt(model, settings("full", freeze=["norm.*", "head.bias"]))
    assert trained(model) == {"stem.weight", "stem.bias", "head.weight"}


def test_lora_starts_as_the_model_and_merges_into_it() -> None:
    pytest.importorskip("peft")
    model = toy.model(dropout=0.0).eval()
    x, names = torch.randn(4, 8), set(model.state_dict())
    before = model(x)
    adapt(model, settings("lora"))
    assert torch.equal(model(x), before)
    assert trained(model) == {
        "stem.lora_A.default.weight",
        "stem.lora_B.default.weight",
        "head.weight",
        "head.bias",
    }
    optimizer = build_optimizer(model, name="sgd", lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    after = model(x)
    merge_lora(model)
    assert set(model.state_dict()) == names
    assert not torch.allclose(after, before)
    torch.testing.assert_close(model(x), after)


def test_lora_without_a_layer_to_adapt_lists_those_there_are() -> None:
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match=r"none matches \['stm'\].*the model has stem, head"):
        adapt(toy.model(), settings("lora", lora={"r": 2, "alpha": 4, "dropout": 0.0, "target": ["stm"]}))


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("block.attention.out", "block.mlp", "memory.query"), ["block.attention.out"]),
        (("block.qkv", "block.mlp"), ["block.qkv"]),
    ],
)
def test_lora_goes_to_attention_where_no_target_is_given(names: tuple[str, ...], chosen: list[str]) -> None:
    pytest.importorskip("peft")
    model = nn.Module()
    for name in (*names, "head"):
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(4, 4))
    adapt(model, settings("lora", lora={"r": 2, "alpha": 4, "dropout": 0.0, "target": None}))
    updates = {f"{name}.lora_{side}.default.weight" for name in chosen for side in "AB"}
    assert trained(model) == {"head.weight", "head.bias", *updates}


def test_layer_decay_lowers_the_rate_towards_the_input() -> None:
    model = toy.model()
    rates = {}
    for group in parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    by_name = {name: rates[id(parameter)] for name, parameter in model.named_parameters()}
    assert by_name["stem.weight"] < by_name["norm.weight"] < by_name["head.weight"] == 1.0


def test_frozen_parameters_never_reach_the_optimizer() -> None:
    model = toy.model()
    model.stem.requires_grad_(False)
    optimizer = build_optimizer(model, name="adamw", lr=0.1, weight_decay=0.5)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if not name.startswith("stem.")}
