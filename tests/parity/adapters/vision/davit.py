"""DaViT, as it is and fused for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import loss_and_gradients, recorded
from parity.fixture import Fixture


def davit(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = dict(fixture.spec["config"])
    model = zoo.from_official(config.pop("timm_name", "davit_tiny"), fixture.state_dict(), **config)
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in model.parameters())}
    levels = range(len(model.stages))  # type: ignore[arg-type]
    names = {"stem": "output/stage0_stem"} | {f"stages.{i}": f"output/stage{i + 1}" for i in levels}
    with recorded(model, names) as out:
        out["output/logits"] = model(x)
    torch.testing.assert_close(model.fuse()(x), out["output/logits"], atol=1e-4, rtol=1e-4)
    return out | loss_and_gradients(fixture, out, model), facts


ADAPTERS = {"DaViT": davit}
