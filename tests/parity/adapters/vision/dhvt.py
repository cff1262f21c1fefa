"""DHVT: classifiers, as they are and fused for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import zoo
from parity.adapters.vision.common import image, loss_and_gradients
from parity.fixture import Fixture


def dhvt(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("dhvt_tiny_cifar_patch4", fixture.state_dict(), **fixture.spec["config"])
    out = {"output/logits": model(image(fixture))}
    torch.testing.assert_close(model.fuse()(image(fixture)), out["output/logits"], atol=1e-4, rtol=1e-4)
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


ADAPTERS = {"DHVT": dhvt}
