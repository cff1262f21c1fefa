"""SReT: classifiers, with the orders of tokens that the reference drew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import image, loss_and_gradients
from parity.fixture import Fixture


def sret(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("sret_t", fixture.state_dict(), **fixture.spec["config"])
    drawn = [name for name in fixture.tensors if name.startswith("input/perm")]
    model.set_permutations([fixture.tensors[f"input/perm{i}"] for i in range(len(drawn))])
    features = model.forward_features(image(fixture))
    out = {
        "output/features": model.forward_head(features, pre_logits=True),
        "output/logits": model.forward_head(features),
    }
    torch.testing.assert_close(model.fuse()(image(fixture)), out["output/logits"], atol=1e-4, rtol=1e-4)
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


ADAPTERS = {"SReT": sret}
