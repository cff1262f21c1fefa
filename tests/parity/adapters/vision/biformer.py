"""BiFormer: the attention of both programs, classifiers and the dense-prediction backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from domains.vision.models.biformer import BiLevelRoutingAttention, padded
from parity.adapters.vision.common import loss_and_gradients, recorded
from parity.fixture import Fixture
from zoo.attention import backend, capture

PADDED = {"qkv": "qkv.qkv", "lepe": "lepe", "proj": "wo"}
FLOOR = {"qkv": "qkv_linear", "lepe": "lepe", "proj": "output_linear"}
"""Modules of the attention, ours and those of its two programs."""


def biformer(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if fixture.spec["variant"].startswith("op"):
        return _op(fixture)
    config = dict(fixture.spec["config"])
    name = "biformer_tiny"
    if "stl" in fixture.spec["variant"] or "downsample_layers.0.3.weight" not in fixture.spec["state_dict"]:
        name = "biformer_stl_nchw" if _is_nchw(fixture) else "biformer_stl"
    model = zoo.from_official(name, fixture.state_dict(), **config)
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in model.parameters())}
    if model.features_only:
        return {f"output/feat{i}": feature for i, feature in enumerate(model(x))}, facts
    names = {"stem": "output/stage0_stem", "norm": "output/features"}
    names |= {f"stages.{i}": f"output/stage{i + 1}" for i in range(len(model.stages))}  # type: ignore[arg-type]
    with recorded(model, names) as out:
        out["output/logits"] = model(x)
    return out | loss_and_gradients(fixture, out, model), facts


def _is_nchw(fixture: Fixture) -> bool:
    names = fixture.spec["state_dict"]
    return any("qkv_linear" in n for n in names) or (
        not any("qkv.qkv" in n for n in names)
        and any(n.endswith("attn.qkv.weight") and len(names[n]["shape"]) == 4 for n in names)
    )


def _op(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    nchw = "nchw" in fixture.spec["variant"]
    config = dict(fixture.spec["config"])
    pads = config.pop("auto_pad", nchw)
    layer = BiLevelRoutingAttention(
        config.pop("dim"),
        config.pop("num_heads", 8),
        config.pop("n_win", 7),
        config.pop("topk", 4),
        regions="floor" if nchw else "padded",
        **config,
    ).eval()
    modules = FLOOR if nchw else PADDED
    own, state = layer.state_dict(), fixture.state_dict()
    names = {
        f"{ours}.{kind}": f"{name}.{kind}" for ours, name in modules.items() for kind in ("weight", "bias")
    }
    names = {ours: name for ours, name in names.items() if name in state}
    layer.load_state_dict(
        {ours: torch.from_numpy(state[name]).reshape(own[ours].shape) for ours, name in names.items()}
    )
    (x,) = fixture.inputs("x")
    maps = x.permute(0, 2, 3, 1) if nchw else x
    height, width = maps.shape[1:3]
    assert pads or not (height % layer.n_win or width % layer.n_win)
    out = layer(maps)
    with backend("reference"):
        torch.testing.assert_close(layer(maps), out, atol=1e-5, rtol=1e-4)
    result = {"output/out": out.permute(0, 3, 1, 2) if nchw else out}
    if not nchw:
        result |= _routing(layer, maps)
    return result | loss_and_gradients(fixture, result, layer, names), {}


def _routing(layer: BiLevelRoutingAttention, x: Tensor) -> dict[str, Tensor]:
    """The debugging outputs of the reference."""
    size, shape = layer.grid(*x.shape[1:3])
    x = padded(x, shape)
    qk = layer.qkv(x)[..., : 2 * layer.qk_dim]
    logits, index = layer.route(qk, size)
    with torch.no_grad(), capture() as maps:
        layer(x)
    (found,) = maps.values()
    squares = found.weights.square().sum(-1)  # (B, heads, N)
    rows, columns = x.shape[1] // size[0], x.shape[2] // size[1]
    by_region = squares.view(*squares.shape[:2], rows, size[0], columns, size[1]).permute(0, 2, 4, 1, 3, 5)
    return {
        "output/dbg_route_weight": logits.softmax(-1),
        "output/dbg_route_index": index.sort(-1).values,
        "output/dbg_attn_weight_sum_of_squares": by_region.flatten(0, 2).flatten(2),
    }


ADAPTERS = {"BiFormer": biformer}
