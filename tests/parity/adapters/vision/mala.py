"""MALA: its linear attention, and classifiers, as they are and fused for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import image, loss_and_gradients, recorded
from parity.fixture import Fixture
from zoo.attention.layers.magnitude import MagnitudeAware


def mala(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if fixture.spec["variant"].startswith("op"):
        return _op(fixture)
    model = zoo.from_official("mala_tiny", fixture.state_dict(), **fixture.spec["config"])
    names = {"stem": "output/stage0_stem", f"stages.{len(model.stages) - 1}": "output/stage4"}  # type: ignore[arg-type]
    names |= {f"stages.{i}.0": f"output/stage{i}" for i in range(1, len(model.stages))}  # type: ignore[arg-type]
    with recorded(model, names) as out:
        out["output/logits"] = model(image(fixture))
    torch.testing.assert_close(model.fuse()(image(fixture)), out["output/logits"], atol=1e-4, rtol=1e-4)
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


def _op(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The attention alone, on a map."""
    (x,) = fixture.inputs("x")
    config = fixture.spec["config"]
    layer = MagnitudeAware(config["dim"], config["num_heads"], shape=x.shape[2:]).eval()
    state, own = fixture.state_dict(), layer.state_dict()
    assert own.keys() == state.keys() - {"angle"}
    layer.load_state_dict({name: torch.as_tensor(state[name]).reshape(t.shape) for name, t in own.items()})
    out = {"output/out": layer(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])}
    facts = {"params": sum(p.numel() for p in layer.parameters())}
    return out | loss_and_gradients(fixture, out, layer, {name: name for name in own}), facts


ADAPTERS = {"MALA": mala}
