"""MoH-ViT: its two attentions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.fixture import Fixture
from zoo.attention.layers import create_attention


def moh(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config, state = fixture.spec["config"], fixture.state_dict()
    aggregated = "sr.weight" in state
    options = {"window": config["window_size"], "sr_ratio": config["sr_ratio"]} if aggregated else {}
    layer = create_attention(
        "moh_aggregated" if aggregated else "moh_cosine",
        config["dim"],
        num_heads=config["num_heads"],
        shape=config["input_resolution"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        qkv_bias=config["qkv_bias"],
        **options,
    ).eval()
    layer.load_state_dict({name: torch.as_tensor(tensor) for name, tensor in state.items()})
    (x,) = fixture.inputs("x")
    facts = {"params": sum(p.numel() for p in layer.parameters())}
    return {"output/out": layer(x)}, facts


ADAPTERS = {"MoH": moh}
