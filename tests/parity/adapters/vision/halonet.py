"""HaloNet: its attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from domains.vision.models.halonet import HaloAttention
from parity.fixture import Fixture


def halonet(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = {name: value for name, value in fixture.spec["config"].items() if name != "feat_size"}
    layer = HaloAttention(**config).eval()
    own = layer.state_dict()
    state = {name.removeprefix("pos_embed."): t for name, t in fixture.state_dict().items()}
    layer.load_state_dict({name: torch.as_tensor(t).reshape(own[name].shape) for name, t in state.items()})
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in layer.parameters())}
    return {"output/out": layer(x)}, facts


ADAPTERS = {"HaloNet": halonet}
