"""LITv2 and its HiLo attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import loss_and_gradients, recorded
from parity.fixture import Fixture
from zoo.attention import backend
from zoo.attention.layers.hilo import HiLo


def hilo(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    (x,) = fixture.inputs("x")
    config = dict(fixture.spec["config"])
    config["window"] = config.pop("window_size", 2)
    config["shape"] = _grid(fixture, x.shape[1])
    layer = HiLo(config.pop("dim"), config.pop("num_heads", 8), **config).eval()
    layer.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in fixture.state_dict().items()})
    out = {"output/out": layer(x)}
    with backend("reference"):
        torch.testing.assert_close(layer(x), out["output/out"], atol=1e-5, rtol=1e-4)
    names = {name: name for name in layer.state_dict()}
    return out | loss_and_gradients(fixture, out, layer, names), {"params": _count(layer)}


def _grid(fixture: Fixture, tokens: int) -> tuple[int, int]:
    """Height and width, as the description says; a square without."""
    words = fixture.spec["description"].replace("tokens", "").split()
    sides = next((word.split("x") for word in words if word.replace("x", "").isdigit() and "x" in word), None)
    height, width = map(int, sides) if sides else (round(tokens**0.5),) * 2
    assert height * width == tokens
    return height, width


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def litv2(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("litv2_s", fixture.state_dict(), **fixture.spec["config"])
    (x,) = fixture.inputs("x")
    last = len(model.stages) - 1  # type: ignore[arg-type]
    names = {f"stages.{i}.0": f"output/stage{i}" for i in range(1, last + 1)}
    names[f"stages.{last}"] = f"output/stage{last + 1}"
    with recorded(model, names) as out:
        logits = model(x)
    out = {name: map.flatten(2).mT for name, map in out.items()} | {"output/logits": logits}
    torch.testing.assert_close(model.fuse()(x), logits, atol=1e-4, rtol=1e-4)
    return out | loss_and_gradients(fixture, out, model), {"params": _count(model)}


ADAPTERS = {"HiLo": hilo, "LITv2": litv2}
