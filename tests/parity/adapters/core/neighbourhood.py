"""Neighbourhoods, shifted groups, local windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parity.fixture import Fixture
from zoo.attention import attend, backend
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.window import LocalAttention, ShiftedSparse
from zoo.attention.neighbourhood import Neighbourhood

Result = tuple[dict[str, Tensor], dict[str, Any]]


def neighbourhood(fixture: Fixture) -> Result:
    """By every backend; they may not differ. The fixtures hold `(B, *shape, H, D)`."""
    first = _neighbourhood(fixture, "sdpa")
    for name in ("blocked", "reference"):
        for key, value in _neighbourhood(fixture, name).items():
            torch.testing.assert_close(value, first[key], atol=1e-4, rtol=1e-4, msg=f"{name} {key}")
    return first, {}


def _neighbourhood(fixture: Fixture, name: str) -> dict[str, Tensor]:
    config = fixture.spec["config"]
    pattern = Neighbourhood(
        config["spatial"],
        config["kernel_size"],
        dilation=config["dilation"],
        stride=config["stride"],
        causal=config["is_causal"],
    )
    leaves = [x.clone().requires_grad_() for x in fixture.inputs("q", "k", "v")]
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in leaves)
    with backend(name):
        with_lse, lse = attend(q, k, v, pattern=pattern, return_lse=True)
        out = attend(q, k, v, pattern=pattern)
    torch.testing.assert_close(out, with_lse, atol=2e-5, rtol=1e-4)
    grid = leaves[0].shape[:-1]
    out = out.transpose(1, 2).reshape(*grid, -1)
    loss = (out * fixture.tensors["input/cotangent_o"]).sum()
    gradients = torch.autograd.grad(loss, leaves)
    mask = pattern.mask(1, pattern.tokens, pattern.tokens, q.device)
    assert mask is not None
    return {
        "output/o": out,
        "output/lse": lse.transpose(1, 2).reshape(grid),
        "output/mask": mask[0, 0].to(torch.uint8),
        "loss/total": loss[None],
        **{f"grad/{leaf}": gradient for leaf, gradient in zip("qkv", gradients, strict=True)},
    }


def shifted_sparse(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    state = _state(fixture)
    x = fixture.tensors["input/x"].clone().requires_grad_()
    layer = ShiftedSparse(
        x.shape[-1],
        config["num_heads"],
        num_kv_heads=config["kv_heads"],
        head_dim=len(state["q_proj.weight"]) // config["num_heads"],
        num_groups=x.shape[1] // config["group_size"],
        wrap=True,
        rope_theta=config["rope_theta"],
        qkv_bias="q_proj.bias" in state,
        out_bias="o_proj.bias" in state,
    )
    layer.load_state_dict(state)
    return _run(fixture, layer.train(), x)


def local(fixture: Fixture) -> Result:
    config, state = fixture.spec["config"], _state(fixture)
    causal, size = config.get("causal", False), config["wsize"]
    layer = LocalAttention(
        config["embed_dim"],
        config["num_heads"],
        window=size if causal else 2 * size + 1,
        causal=causal,
        qkv_bias="q_proj.bias" in state,
        out_bias="out_proj.bias" in state,
    )
    layer.load_state_dict({k.replace("out_proj", "o_proj"): v for k, v in state.items()})
    return _run(fixture, layer, fixture.tensors["input/x"].clone().requires_grad_())


def _state(fixture: Fixture) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}


def _run(fixture: Fixture, layer: AttentionLayer, x: Tensor) -> Result:
    out = layer(x)
    loss = (out * fixture.tensors["input/cotangent_o"]).sum()
    loss.backward()
    assert x.grad is not None
    computed = {"output/o": out, "loss/total": loss[None], "grad/x": x.grad}
    official = "out_proj" if "out_proj.weight" in fixture.spec["state_dict"] else "o_proj"
    for name, p in layer.named_parameters():
        assert p.grad is not None
        computed[f"grad/param.{name.replace('o_proj', official)}"] = p.grad
    return computed, {}


ADAPTERS = {
    "na1d": neighbourhood,
    "na2d": neighbourhood,
    "na3d": neighbourhood,
    "s2_attention": shifted_sparse,
    "cab_local": local,
}
