"""CATANet: evaluation with trained and with fresh token centres, and two training steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo
from domains.superres.models.catanet import CATANet
from parity.fixture import Fixture, official_gradients


def catanet(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    model = zoo.from_official(
        f"catanet_x{config['upscale']}",
        fixture.state_dict(),
        setting=config["setting"],
        upscale=config["upscale"],
        **config["args"],
    )
    assert isinstance(model, CATANet)
    return (_training if "input/hr" in fixture.tensors else _evaluation)(fixture, model), {}


def _evaluation(fixture: Fixture, model: CATANet) -> dict[str, Tensor]:
    (x,) = fixture.inputs("lr")
    out: dict[str, Tensor] = {}

    def keep(name: str, *, last: bool) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple, result: Tensor) -> None:
            out[f"output/{name}"] = result.permute(0, 3, 1, 2) if last else result

        return hook

    model.first_conv.register_forward_hook(keep("first_conv", last=False))
    blocks: Any = model.blocks
    for i, block in enumerate(blocks):
        block.tokens.register_forward_hook(keep(f"block{i}_tab", last=True))
        block.local.register_forward_hook(keep(f"block{i}_lrsa", last=True))
        block.conv.register_forward_hook(keep(f"block{i}_midconv", last=False))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        out["output/sr"] = model(x)
        groups = model.token_groups(x)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    for i, group in enumerate(groups):
        assert torch.equal(group.flatten(1), fixture.tensors[f"output/block{i}_assign"]), f"block {i}"
        out[f"output/block{i}_assign"] = group.flatten(1)
    return out


def _training(fixture: Fixture, model: CATANet) -> dict[str, Tensor]:
    x, target = fixture.inputs("lr", "hr")
    model.train()
    out: dict[str, Tensor] = {}
    for step in ("step1", "step2"):
        model.zero_grad()
        sr = model(x)
        loss = F.l1_loss(sr, target)
        loss.backward()
        buffers = {name: value for name, value in zoo.to_official(model).items() if name.endswith(".means")}
        out |= {f"output/{step}_sr": sr, f"loss/{step}_total": loss.reshape(1)}
        out |= {f"output/{step}_{name}": value.clone() for name, value in buffers.items()}
        out |= {
            name.replace("grad/", f"grad/{step}_"): grad.clone()
            for name, grad in official_gradients(model).items()
        }
    return out


ADAPTERS = {"CATANet": catanet}
