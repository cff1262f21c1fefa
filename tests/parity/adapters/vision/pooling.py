"""Pooling: efficient probing, and the group generalised mean by its formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.adapters.vision.common import loss_and_gradients
from parity.fixture import Fixture
from zoo.layers.pool import AttentivePool, GGeM

PROBE = {"queries": "cls_token", "v.weight": "v.weight", "v.bias": "v.bias"}
"""Our names and those of the reference."""


def efficient_probing(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, state = fixture.spec["config"], fixture.state_dict()
    pool = AttentivePool(
        config["dim"],
        num_queries=config["num_queries"],
        num_heads=config["num_heads"],
        d_out=config["d_out"],
        bias="v.bias" in state,
    )
    names = {ours: official for ours, official in PROBE.items() if official in state}
    own = pool.state_dict()
    pool.load_state_dict({ours: torch.as_tensor(state[n]).view_as(own[ours]) for ours, n in names.items()})
    (x,) = fixture.inputs("x")
    out = {"output/out": pool(x)}
    facts = {"params": sum(p.numel() for p in pool.parameters())}
    return out | loss_and_gradients(fixture, out, pool, names), facts


def ggem(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The fixture is made from |x|."""
    config = fixture.spec["config"]
    (x,) = fixture.inputs("x")
    pool = GGeM(x.shape[2], groups=config["groups"], p=config["p_init"], eps=config["eps"])
    pool.load_state_dict({name: torch.as_tensor(value) for name, value in fixture.state_dict().items()})
    out = {"output/out": pool(x.abs())}
    facts = {"params": sum(p.numel() for p in pool.parameters())}
    return out | loss_and_gradients(fixture, out, pool, {"p": "p"}), facts


ADAPTERS = {"EfficientProbing": efficient_probing, "GGeM": ggem}
