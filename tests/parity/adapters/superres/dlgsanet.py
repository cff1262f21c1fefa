"""DLGSANet: the network, its training step and what happens inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import zoo
from domains.superres.models.dlgsanet import DLGSANet
from domains.superres.models.dlgsanet_layers import Layer
from parity.fixture import Fixture, official_gradients


def run(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = built(fixture).train(not fixture.spec.get("eval_mode", True))
    out: dict[str, Tensor] = {}
    _watch(model, out)
    training = "loss/total" in fixture.tensors
    with torch.set_grad_enabled(training):
        out["output/sr"] = model(*fixture.inputs("lr"))
    if training:
        loss = (out["output/sr"] - fixture.tensors["input/hr"]).abs().mean()
        loss.backward()
        out |= {"loss/total": loss[None]} | official_gradients(model)
    return out, {}


ADAPTERS = {"DLGSANet": run}


def built(fixture: Fixture) -> DLGSANet:
    """By the builder of that scale, or the small one for the scales that none is published for."""
    config = fixture.spec["config"]
    scale = config["upscale"]
    name = f"dlgsanet_tiny_x{scale}" if scale in (2, 3, 4) and config["upsampler"] else "dlgsanet_mini"
    model = zoo.from_official(name, fixture.state_dict(), **config)
    assert isinstance(model, DLGSANet)
    return model


def _watch(model: DLGSANet, out: dict[str, Tensor]) -> None:
    """Keeps what the fixtures call by the place in the network."""

    def keep(name: str, find: Callable[[Any, Any], Tensor], last: bool = True) -> Callable[..., None]:
        def hook(_module: Any, inputs: Any, result: Any) -> None:
            value = find(inputs, result)
            out[f"output/{name}"] = value.permute(0, 3, 1, 2) if last else value

        return hook

    def result(_: Any, value: Any) -> Tensor:
        return value

    model.embed.register_forward_hook(keep("overlap_embed", result, last=False))
    model.conv.register_forward_hook(keep("deep", result, last=False))
    for g, group in enumerate(model.groups):
        group.register_forward_hook(keep(f"group{g}", result))
        layers: list[Layer] = list(group.layers)  # pyright: ignore
        for b, layer in enumerate(layers):
            name = f"g{g}b{b}"
            layer.register_forward_hook(keep(name, result))
            if layer.is_local:
                proj: Any = layer.mixer.proj
                proj.register_forward_hook(keep(f"{name}_dynconv", lambda inputs, _: inputs[0]))
            else:
                layer.mixer.register_forward_hook(keep(f"{name}_attn", result))
