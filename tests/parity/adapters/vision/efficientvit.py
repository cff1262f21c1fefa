"""EfficientViT: cascaded group attention, classifiers and detectors' backbones, as they are and fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from domains.vision.models.efficientvit_blocks import CascadedAttention, FusedCascade, as_map, tokens
from domains.vision.weights.efficientvit import official_name
from parity.adapters.vision.common import loss_and_gradients, recorded
from parity.fixture import Fixture

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Between the model and its fused copy."""


def efficientvit(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if fixture.spec["variant"].startswith("op"):
        return _op(fixture)
    model = zoo.from_official("efficientvit_m0", fixture.state_dict(), **fixture.spec["config"])
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in model.parameters())}
    if model.features_only:
        maps = model(x)
        torch.testing.assert_close(model.fuse()(x), maps, **TOLERANCE)
        return {f"output/feat{i}": map for i, map in enumerate(maps)}, facts
    names = {"stem": "output/stage0_patch_embed"}
    names |= {f"stages.{i}": f"output/stage{i + 1}" for i in range(len(model.stages))}  # type: ignore[arg-type]
    with recorded(model, names) as out:
        out["output/logits"] = model(x)
    torch.testing.assert_close(model.fuse()(x), out["output/logits"], **TOLERANCE)
    return out | loss_and_gradients(fixture, out, model), facts


def _op(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The attention alone, on one window."""
    config = fixture.spec["config"]
    window = config["resolution"]
    layer = CascadedAttention(
        config["dim"],
        config["num_heads"],
        config["key_dim"],
        config["kernels"],
        window,
        value_dim=int(config["attn_ratio"] * config["key_dim"]),
    ).eval()
    state, own = fixture.state_dict(), layer.state_dict()
    names = {ours: official_name(f"attention.cascade.{ours}").removeprefix("mixer.m.attn.") for ours in own}
    assert sorted(names.values()) == sorted(set(state) - {"attention_bias_idxs"})
    assert torch.equal(layer.offsets, torch.from_numpy(state["attention_bias_idxs"]))
    layer.load_state_dict({ours: torch.as_tensor(state[name]) for ours, name in names.items()})
    facts = {"params": sum(p.numel() for p in layer.parameters())}
    (x,) = fixture.inputs("x")
    out = {"output/out": as_map(layer(tokens(x)), window)}
    result = out | loss_and_gradients(fixture, out, layer, names)
    with torch.no_grad():
        for part in layer.modules():
            if hasattr(part, "fuse_"):
                part.fuse_()
        fused = FusedCascade(layer)
        torch.testing.assert_close(as_map(fused(tokens(x)), window), out["output/out"], **TOLERANCE)
    return result, facts


ADAPTERS = {"EfficientViT": efficientvit}
