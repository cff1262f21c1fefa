"""SpectFormer: classifiers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import zoo
from parity.adapters.vision.common import image, loss_and_gradients
from parity.fixture import Fixture


def spectformer(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = zoo.from_official("spectformer_xs", fixture.state_dict(), **fixture.spec["config"])
    features = model.forward_features(image(fixture))
    out = {
        "output/features": model.forward_head(features, pre_logits=True),
        "output/logits": model.forward_head(features),
    }
    facts = {"params": sum(p.numel() for p in model.parameters())}
    return out | loss_and_gradients(fixture, out, model), facts


ADAPTERS = {"SpectFormer": spectformer}
