"""Relative convolutional attention, which its program holds tokens first, `(T, B, C)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.fixture import Fixture
from zoo.attention.layers.convolved_relative import ConvolvedRelative


def rcmha(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    layer = ConvolvedRelative(
        config["d_model"],
        config["heads"],
        max_length=config["P"],
        kernel=config.get("kernel_size", 3),
        causal=config.get("causal", True),
    )
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    official = {_ours(name): name for name in state}
    layer.load_state_dict({ours: state[name] for ours, name in official.items()})
    leaves = {
        name: fixture.tensors[f"input/{name}"].clone().requires_grad_()
        for name in ("x", "memory")
        if f"input/{name}" in fixture.tensors
    }
    x = leaves["x"].transpose(0, 1)
    context = torch.cat([leaves["memory"].transpose(0, 1), x], 1) if "memory" in leaves else None
    out = layer(x, context).transpose(0, 1)
    loss = (out * fixture.tensors["input/cotangent_o"]).sum()
    loss.backward()
    computed = {"output/o": out, "loss/total": loss[None]}
    computed |= {f"grad/{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for name, p in layer.named_parameters():
        assert p.grad is not None
        computed[f"grad/param.{official[name]}"] = p.grad
    if layer.causal and context is None:
        cache = layer.init_cache(len(x))
        steps = torch.cat([layer.step(token, cache) for token in x.split(1, 1)], 1)
        torch.testing.assert_close(steps.transpose(0, 1), out, atol=1e-5, rtol=1e-4)
    return computed, {}


def _ours(name: str) -> str:
    """`query.0.linear.weight` and `query.1.conv.weight` are `q_proj.weight` and `q_conv.weight`."""
    module, *rest = name.split(".")
    if module in ("query", "key", "value"):
        return f"{module[0]}_{'proj' if rest[1] == 'linear' else 'conv'}.{rest[2]}"
    return name.replace("output.", "o_proj.")


ADAPTERS = {"rcmha": rcmha}
