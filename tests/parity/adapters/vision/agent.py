"""Agent attention and Agent-PVT."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from parity.adapters.vision.common import loss_and_gradients
from parity.fixture import Fixture
from zoo.attention import backend
from zoo.attention.layers.agent import AgentAttention


def agent(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if fixture.spec["variant"].startswith("op"):
        return _op(fixture)
    config = dict(fixture.spec["config"])
    model = zoo.from_official(config.pop("name", "agent_pvt_tiny"), fixture.state_dict(), **config)
    (x,) = fixture.inputs("x")
    features = model.forward_features(x)
    out = {
        "output/features": model.forward_head(features, pre_logits=True),
        "output/logits": model.forward_head(features),
    }
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


def _op(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, state = fixture.spec["config"], fixture.state_dict()
    (x,) = fixture.inputs("x")
    side = math.isqrt(x.shape[1])
    layer = AgentAttention(
        config["dim"],
        config["num_heads"],
        shape=(side, side),
        agents=config["agent_num"],
        reduction=config.get("sr_ratio", 1),
        class_token="ac_bias" in state,
        qkv_bias=config.get("qkv_bias", False),
    ).eval()
    layer.load_state_dict(joined(state, layer))
    out = layer(x)
    with backend("reference"):
        torch.testing.assert_close(layer(x), out, atol=1e-5, rtol=1e-4)
    facts = {"params": sum(p.numel() for p in layer.parameters())}
    return {"output/out": out} | op_loss(fixture, out, layer), facts


def joined(state: dict[str, Any], layer: nn.Module) -> dict[str, Tensor]:
    """Official tensors with one matrix of queries, keys and values, where the layer has one."""
    tensors = {name: torch.as_tensor(tensor) for name, tensor in state.items()}
    for kind in ("weight", "bias"):
        if f"qkv.{kind}" in layer.state_dict() and f"q.{kind}" in tensors:
            tensors[f"qkv.{kind}"] = torch.cat([tensors.pop(f"q.{kind}"), tensors.pop(f"kv.{kind}")])
    return tensors


def op_loss(fixture: Fixture, out: Tensor, layer: nn.Module) -> dict[str, Tensor]:
    """`loss/total`, the mean of squares or the squared error, and gradients by official names."""
    if "loss/total" not in fixture.tensors:
        return {}
    target = fixture.tensors.get("input/target")
    loss = out.square().mean() if target is None else F.mse_loss(out, target)
    loss.backward()
    gradients = {f"grad/{n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    apart = "q.weight" in fixture.spec["state_dict"]
    for name in [name for name in gradients if apart and name.startswith("grad/qkv.")]:
        whole = gradients.pop(name)
        parts = whole.split([len(whole) // 3, 2 * len(whole) // 3])
        gradients |= {name.replace("qkv", part): t for part, t in zip(("q", "kv"), parts, strict=True)}
    return {"loss/total": loss} | gradients


ADAPTERS = {"AgentAttention": agent}
