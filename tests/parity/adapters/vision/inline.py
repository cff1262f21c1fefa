"""Injective linear attention and InLine-PVT."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

import zoo
from parity.adapters.vision.agent import joined, op_loss
from parity.adapters.vision.common import loss_and_gradients
from parity.fixture import Fixture
from zoo.attention.layers.injective import InjectiveLinear


def inline(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    (x,) = fixture.inputs("x")
    if fixture.spec["variant"].startswith("op"):
        layer = _op(fixture, x.shape[1])
        out = layer(x)
        facts = {"params": sum(p.numel() for p in layer.parameters())}
        return {"output/out": out} | op_loss(fixture, out, layer), facts
    config = dict(fixture.spec["config"])
    name = config.pop("name", "inline_pvt_tiny")
    model = zoo.from_official(name, fixture.state_dict(), **config)
    out = {"output/logits": model(x)}
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


def _op(fixture: Fixture, tokens: int) -> InjectiveLinear:
    config = fixture.spec["config"]
    sides = re.search(r"(\d+)x(\d+)", fixture.spec["description"])
    shape = (int(sides[1]), int(sides[2])) if sides else (round(tokens**0.5),) * 2
    layer = InjectiveLinear(
        config["dim"], config["num_heads"], shape=shape, qkv_bias=config.get("qkv_bias", False)
    ).eval()
    layer.load_state_dict(joined(fixture.state_dict(), layer))
    return layer


ADAPTERS = {"InLine": inline}
