"""Linear attention, decays, gates and the delta rule: all forms of the scan, and the layers with weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parity.fixture import Fixture
from zoo.attention.layers.linear import BasedAttention, LightningAttention
from zoo.attention.linear import (
    alibi_slopes,
    gated_slots,
    hedgehog_features,
    mlstm,
    retention_decay,
    squared_features,
    taylor_features,
    window_and_features,
)
from zoo.attention.scan import scan, scan_mean

Outputs = dict[str, Tensor]
Op = Callable[..., Outputs]
FORMS: list[dict[str, Any]] = [
    {"form": "step"},
    {"form": "parallel"},
    {"chunk": 5},
    {"chunk": 8},
    {"chunk": 64},
]


def _op(op: Op, *, heads_first: bool, forms: list[dict[str, Any]] = FORMS) -> Callable[[Fixture], Any]:
    """An adapter for `op(config, inputs, **form)`; inputs and outputs with heads first.

    Every form must give the fixture's numbers: the value that differs most from them is handed on.
    """

    def run(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
        results = [_graded(fixture, op, form, heads_first) for form in forms]
        return {name: _worst(fixture, name, results) for name in results[0]}, {}

    return run


def _worst(fixture: Fixture, name: str, results: list[dict[str, Tensor]]) -> Tensor:
    if name not in fixture.tensors:
        return results[0][name]
    return max(
        (result[name] for result in results),
        key=lambda value: float((value.detach() - fixture.tensors[name]).abs().max()),
    )


def _graded(fixture: Fixture, op: Op, form: dict[str, Any], heads_first: bool) -> dict[str, Tensor]:
    inputs = {
        name.removeprefix("input/"): tensor.clone().requires_grad_(tensor.is_floating_point())
        for name, tensor in fixture.tensors.items()
        if name.startswith("input/") and "cotangent" not in name
    }
    modules = {
        name: nn.Parameter(torch.from_numpy(value).clone()) for name, value in fixture.state_dict().items()
    }
    arguments = {name: x if heads_first else _turned(name, x) for name, x in inputs.items()}
    outputs = op(fixture.spec["config"], {**arguments, **modules}, **form)
    if not heads_first:
        outputs = {name: _turned(name, x) for name, x in outputs.items()}
    return _with_gradients(fixture, outputs, inputs, modules)


def _turned(name: str, x: Tensor) -> Tensor:
    """(B, T, H, ...) and (B, H, T, ...) into each other; states have no T."""
    return x if name in ("s0", "state") or x.ndim < 3 else x.transpose(1, 2)


def _with_gradients(
    fixture: Fixture, outputs: Outputs, inputs: dict[str, Tensor], parameters: dict[str, Any]
) -> dict[str, Tensor]:
    loss = sum(
        (
            (outputs[name.removeprefix("input/cotangent_")] * cotangent).sum()
            for name, cotangent in fixture.tensors.items()
            if name.startswith("input/cotangent_")
        ),
        torch.zeros(()),
    )
    loss.backward()
    grads = {f"grad/{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    grads |= {f"grad/param.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    return {f"output/{name}": x for name, x in outputs.items()} | {"loss/total": loss.reshape(1)} | grads


def _linear(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
    state = x.get("s0")
    if not config["normalize"]:
        out, state = scan(x["q"], x["k"], x["v"], state=state, **form)
        return {"o": out, "state": state}
    if state is not None:
        state = torch.cat([state, x["z0"].mT if "z0" in x else torch.zeros_like(state[..., :1])], dim=-1)
    out, state = scan_mean(x["q"], x["k"], x["v"], state=state, eps=1e-10, **form)
    return {"o": out, "state": state[..., :-1], "z": state[..., -1][:, :, None]}


def _decayed(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
    decay = x.get("log_decay")
    heads = x["q"].shape[1]
    if config.get("kind") == "lightning":
        rate = 8 / heads * (1 - config["layer_idx"] / config["num_layers"])
        decay = -(rate * torch.arange(heads, dtype=torch.float32))[None, :, None]
    elif config.get("kind") == "retention":
        decay = retention_decay(heads)[None, :, None]
    out, state = scan(x["q"], x["k"], x["v"], log_decay=decay, beta=x.get("beta"), state=x.get("s0"), **form)
    return {"o": out, "state": state}


def _lightning_official(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
    slopes = alibi_slopes(config["num_heads"])
    torch.testing.assert_close(slopes, x["slopes"].detach().flatten())
    out, _ = scan(x["q"], x["k"], x["v"], log_decay=-slopes[None, :, None], scale=1.0, **form)
    return {"o": out}


def _features(phi: Callable[[Tensor], Tensor]) -> Op:
    def op(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
        run = scan_mean if config["use_norm"] else scan
        out, _ = run(phi(x["q"]), phi(x["k"]), x["v"], scale=1.0, **form)
        return {"o": out}

    return op


def _gsa(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
    out, state = gated_slots(x["q"], x["k"], x["v"], x["slots"], log_decay=x["log_decay"], **form)
    return {"o": out, "keys": state[0], "values": state[1]}


def _mlstm(config: dict[str, Any], x: dict[str, Tensor], **form: Any) -> Outputs:
    result = mlstm(x["q"], x["k"], x["v"], input_gate=x["i"], forget_gate=x["f"], eps=config["eps"], **form)
    return {"o": result.out, "n": result.normaliser, "m": result.peak}


def _lolcats(config: dict[str, Any], x: dict[str, Tensor]) -> Outputs:
    factor = torch.sigmoid(x["window_factors"])
    q_features, k_features = (
        hedgehog_features(x[name], x[f"feature_map_{name}.mlp.layer"]) for name in ("q", "k")
    )

    def attention(v: Tensor) -> Tensor:
        return window_and_features(
            x["q"],
            x["k"],
            v,
            q_features,
            k_features,
            window=config["window"],
            window_factor=factor,
            rest_factor=1 - factor if config["affine_attention_factors"] else 1.0,
        )[0]

    one_hot = torch.eye(x["v"].shape[2]).expand(*x["v"].shape[:2], -1, -1)
    return {"o": attention(x["v"]), "weights": attention(one_hot), "f_q": q_features}


def _lightning_minimax(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    layer = LightningAttention(
        config["hidden_size"],
        config["num_attention_heads"],
        head_dim=config["head_dim"],
        layer=config["layer_idx"],
        num_layers=config["num_hidden_layers"],
    )
    state = {n: torch.from_numpy(w) for n, w in fixture.state_dict().items()}
    torch.testing.assert_close(layer.slopes, state["slope_rate"].flatten())
    layer.load_state_dict({n: state[n] for n in layer.state_dict()})
    x = fixture.tensors["input/x"].clone().requires_grad_()
    mask = fixture.tensors.get("input/mask")
    cache = layer.init_cache(len(x))
    out = layer(x, mask=None if mask is None else mask.bool(), cache=cache)
    outputs = {"o": out, "state": cache.state}
    return _with_gradients(fixture, outputs, {"x": x}, dict(layer.named_parameters())), {}


def _based_layer(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    layer = BasedAttention(
        config["d_model"],
        config["num_heads"],
        feature_dim=config["feature_dim"],
        head_dim=config["head_dim"],
        eps=config["eps"],
    )
    layer.load_state_dict({n: torch.from_numpy(w) for n, w in fixture.state_dict().items()})
    x = fixture.tensors["input/x"].clone().requires_grad_()
    head = layer.proj_q(x)[:1, :4, : config["feature_dim"]]
    outputs = {"o": layer(x), "phi_q": taylor_features(head, symmetric=False)[:, None]}
    return _with_gradients(fixture, outputs, {"x": x}, dict(layer.named_parameters())), {}


ADAPTERS = {
    "op_linear": _op(_linear, heads_first=False),
    **dict.fromkeys(
        ("op_lightning", "op_retention", "op_simple_gla", "op_gla", "op_delta", "op_gated_delta", "op_kda"),
        _op(_decayed, heads_first=False),
    ),
    "op_lightning_official": _op(_lightning_official, heads_first=True),
    "op_based": _op(_features(taylor_features), heads_first=True),
    "op_rebased": _op(_features(squared_features), heads_first=True),
    "op_gsa": _op(_gsa, heads_first=False),
    "op_mlstm": _op(_mlstm, heads_first=True),
    "op_lolcats": _op(_lolcats, heads_first=True, forms=[{}]),
    "lightning_minimax": _lightning_minimax,
    "based_layer": _based_layer,
}
