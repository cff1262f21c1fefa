"""Pools with weights in every family of backbones, and fine-tuning them: probes, LoRA, other classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from small_backbones import SMALL, build, images
from torch import nn

import zoo
from domains.vision.probe import carry_classes, classifiers, transfer
from zoo.errors import ConfigError
from zoo.registry import model_class
from zoo.training.finetune import adapt, merge_lora
from zoo.weights.exchange import load_weights

FAMILIES = list({model_class(name): name for name in reversed(SMALL)}.values())
EACH = pytest.mark.parametrize("name", FAMILIES)
POOLS: list[Any] = [{"name": "ggem", "groups": 4}, {"name": "attentive", "num_queries": 2, "d_out": 2}]
POOL = pytest.mark.parametrize("pool", POOLS, ids=["ggem", "attentive"])
pytestmark = pytest.mark.filterwarnings("ignore:The official weights:UserWarning")


def settings(method: str, **changes: Any) -> Any:
    attentive = {"num_queries": 2, "num_heads": 2, "d_out": 1, "key_projection": False}
    lora = {"r": 2, "alpha": 4, "dropout": 0.0, "target": None}
    return OmegaConf.create(
        {"method": method, "freeze": [], "lora": lora, "probe": {"kind": "linear", "attentive": attentive}}
        | changes
    )


def probed(name: str, kind: str) -> nn.Module:
    model = build(name).train()
    cfg = settings("probe")
    cfg.probe.kind = kind
    adapt(model, cfg)
    return model


# ---- pools -------------------------------------------------------------------------------------------------


@EACH
@POOL
def test_a_pool_with_weights_is_part_of_the_model(name: str, pool: dict, tmp_path: Path) -> None:
    model, x = build(name, global_pool=pool, head_norm=True), images()
    assert model.global_pool == pool["name"]
    assert any(key.startswith("pool.") for key in model.state_dict())
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))
    kept = {key: value.clone() for key, value in model.pool.state_dict().items()}
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    assert all(torch.equal(value, kept[key]) for key, value in model.pool.state_dict().items())
    model.reset_classifier(0)
    assert model(x).shape == (2, model.pool.out_features)
    model.reset_classifier(4, "avg", head_norm=False)
    assert model(x).shape == (2, 4)
    assert not any(key.startswith(("pool.", "head_norm.")) for key in model.state_dict())


@EACH
@POOL
def test_official_weights_start_a_model_with_another_pool(name: str, pool: dict, tmp_path: Path) -> None:
    plain = build(name)
    path = tmp_path / "official.pth"
    torch.save(zoo.to_official(plain), path)
    options = SMALL[name] | {"num_classes": 3, "global_pool": pool, "head_norm": True}
    model = zoo.create_model(f"vision/{name}", checkpoint_path=path, **options).eval()
    x = images()
    torch.testing.assert_close(model.forward_features(x), plain.forward_features(x))
    other = zoo.create_model(f"vision/{name}", **options).eval()
    load_weights(other, zoo.to_official(model))
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"name": "avg", "groups": 2}, "one of the last two with its arguments"),
        ({"name": "ggem", "group": 2}, "Did you mean 'groups'"),
        ({"name": "attentive", "num_queries": 7}, "64 channels cannot be shared out evenly"),
    ],
)
def test_a_pool_that_cannot_be_is_told(pool: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("biformer_tiny", global_pool=pool)


# ---- probes ------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("kind", ["linear", "attentive"])
def test_a_probe_trains_on_frozen_features(name: str, kind: str, tmp_path: Path) -> None:
    model, x = probed(name, kind), images(4)
    features = model.forward_features(x)
    assert not features.requires_grad
    torch.testing.assert_close(features, build_like(model).forward_features(x))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained == {key for key, _ in model.named_parameters() if key.startswith(("head.", "pool."))}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    assert not {key for key, p in model.named_parameters() if p.requires_grad and p.grad is None}
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.split(".")[0] for key in changed} <= {"head", "pool", "head_norm"}
    assert {key for key in trained if key.endswith("weight")} <= changed
    assert any(key.endswith("running_mean") for key in changed)
    zoo.save_model(model.eval(), tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(x), model(x))


def build_like(model: Any) -> nn.Module:
    built = model.zoo_config
    other = zoo.create_model(f"vision/{built['name']}", **built["config"]).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_a_linear_probe_leaves_a_trained_pool_alone() -> None:
    model = build("biformer_tiny", global_pool={"name": "ggem", "groups": 4})
    adapt(model, settings("probe"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}
    model = build("biformer_tiny", global_pool={"name": "ggem", "groups": 4})
    adapt(model, settings("head"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "pool.p",
        "head.weight",
        "head.bias",
    }


def test_a_model_without_pool_has_linear_probes_only() -> None:
    model = zoo.create_model("stid", num_nodes=3)
    cfg = settings("probe")
    cfg.probe.kind = "attentive"
    with pytest.raises(ConfigError, match="has no pool to exchange"):
        adapt(model, cfg)
    cfg.probe.kind = "atentive"
    with pytest.raises(ConfigError, match="Did you mean 'attentive'"):
        adapt(model, cfg)


# ---- LoRA --------------------------------------------------------------------------------------------------


@EACH
def test_lora_reaches_the_attention_of_every_family(name: str) -> None:
    pytest.importorskip("peft")
    model, x = build(name), images()
    names, before = set(model.state_dict()), model(x)
    adapt(model, settings("lora"))
    torch.testing.assert_close(model(x), before)
    updates = {key: p for key, p in model.named_parameters() if "lora_B" in key}
    assert updates
    model(x).square().sum().backward()
    assert not {key for key, p in updates.items() if p.grad is None or not p.grad.any()}
    with torch.no_grad():
        for parameter in updates.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = model(x)
    assert not torch.allclose(after, before)
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x), after, atol=1e-4, rtol=1e-4)


# ---- other classes -----------------------------------------------------------------------------------------


@EACH
def test_classes_keep_their_rows_by_name(name: str) -> None:
    model = build(name, num_classes=3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = build(name, num_classes=4)
    assert carry_classes(other, state, ["cat", "dog", "owl"], ["owl", "ant", "cat", "bee"]) == ["owl", "cat"]
    for weight in classifiers(other):
        found = other.get_parameter(weight)
        assert torch.equal(found[[0, 2]], state[weight][[2, 0]])
        assert not any(torch.equal(row, own) for row in found[[1, 3]] for own in state[weight])


@pytest.mark.parametrize("facts", [{"classes": ["a", "b", "c"]}, {}])
def test_transfer_says_what_it_took_over(
    facts: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build("biformer_tiny", num_classes=3)
    zoo.save_model(model, tmp_path / "model.safetensors", extra=facts)
    new = ["c", "b", "x"] if facts else ["x", "y"]
    data = SimpleNamespace(model_kwargs=lambda: {"num_classes": len(new)}, class_names=new)
    made = transfer(tmp_path / "model.safetensors", data)
    said = " ".join(capsys.readouterr().out.split())
    if facts:
        assert "2 of 3 classes are in the checkpoint and keep their rows of the head: c, b." in said
        assert torch.equal(made.head.weight[:2], model.head.weight[[2, 1]])
        assert not torch.equal(made.head.weight[2], model.head.weight[2])
    else:
        assert "names no classes: the head starts anew" in said
        assert made.head.weight.shape[0] == 2
