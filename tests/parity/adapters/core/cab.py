"""The attention plug-ins of CAB, which share the names of their projections (windows: `neighbourhood`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parity.fixture import Fixture
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.cosformer import CosFormer
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.layers.nystrom import NystromAttention
from zoo.attention.layers.slots import BoundedMemory

Result = tuple[dict[str, Tensor], dict[str, Any]]


def _adapter(build: Callable[[dict[str, Any], bool], AttentionLayer], masks: bool = True) -> Any:
    """Of the layer that `build` makes of the configuration and of whether projections have biases."""

    def run(fixture: Fixture) -> Result:
        layer = build(fixture.spec["config"], "q_proj.bias" in fixture.spec["state_dict"])
        state = {n: torch.from_numpy(array) for n, array in fixture.state_dict().items()}
        layer.load_state_dict({n.replace("out_proj", "o_proj"): x for n, x in state.items()})
        leaves = {
            n: fixture.tensors[f"input/{n}"].clone().requires_grad_()
            for n in ("x", "context")
            if f"input/{n}" in fixture.tensors
        }
        ignored = fixture.tensors.get("input/key_padding_mask")
        mask = None if ignored is None or not masks else ~ignored.bool()
        out = layer.eval()(**leaves, mask=mask)
        loss = (out * fixture.tensors["input/cotangent_o"]).sum()
        loss.backward()
        gradients = {n: leaf.grad for n, leaf in leaves.items()}
        gradients |= {f"param.{n}".replace("o_proj", "out_proj"): p.grad for n, p in layer.named_parameters()}
        found = {f"grad/{n}": gradient for n, gradient in gradients.items() if gradient is not None}
        return {"output/o": out, "loss/total": loss[None], **found}, {}

    return run


def _vanilla(config: dict[str, Any], bias: bool) -> MultiHead:
    causal = config.get("causal", False) and not config.get("cross", False)
    return MultiHead(config["embed_dim"], config["num_heads"], causal=causal, qkv_bias=bias, out_bias=bias)


def _abc(config: dict[str, Any], bias: bool) -> BoundedMemory:
    return BoundedMemory(
        config["embed_dim"],
        config["num_heads"],
        slots=config.get("num_landmarks", 16),
        causal=config.get("causal", False),
        accumulate=False,
        bias=bias,
    )


def _cosformer(config: dict[str, Any], bias: bool) -> CosFormer:
    return CosFormer(config["embed_dim"], config["num_heads"], causal=config.get("causal", False), bias=bias)


def _nystrom(config: dict[str, Any], bias: bool) -> NystromAttention:
    return NystromAttention(
        config["embed_dim"],
        config["num_heads"],
        landmarks=config.get("num_landmarks", 16),
        conv_kernel=config.get("conv_kernel_size"),
        published=True,
        bias=bias,
    )


ADAPTERS = {
    "cab_vanilla": _adapter(_vanilla),
    "cab_abc": _adapter(_abc),
    "cab_cosformer": _adapter(_cosformer, masks=False),  # the program takes a mask, and does not use it
    "cab_nystrom": _adapter(_nystrom),
}
