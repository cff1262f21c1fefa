"""Multi-head attention and what is done to it: groups, gates, sinks, affine weights, depth, forgetting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from parity.fixture import Fixture
from zoo.attention import AttentionMap, Causal, Dense, Pattern, Window, attend, backend, capture
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.depth import AttentionResiduals, attention_residual
from zoo.attention.layers.forgetting import Before, forgetting, stick_breaking
from zoo.attention.layers.multihead import (
    AffineScaled,
    GatedAttention,
    MultiHead,
    Qwen3NextAttention,
    SinkAttention,
    gqa_from_mha,
)
from zoo.attention.merge import sink
from zoo.attention.yarn import Yarn

BACKENDS = ("reference", "blocked", "sdpa")
Tensors = dict[str, Tensor]
Result = tuple[Tensors, dict[str, Any]]


def _op(
    fixture: Fixture, program: Callable[[Tensors], Tensors], backends: Sequence[str] = BACKENDS
) -> Result:
    """Outputs of a program on every backend, and the gradients of its inputs."""
    inputs = {
        name.removeprefix("input/"): tensor.requires_grad_(tensor.is_floating_point())
        for name, tensor in fixture.tensors.items()
        if name.startswith("input/") and "cotangent" not in name
    }
    computed = []
    for name in backends:
        with backend(name):
            computed.append(_with_gradients(fixture, program(inputs), inputs))
    _all_agree(computed)
    return computed[-1], {}


def _with_gradients(fixture: Fixture, outputs: Tensors, leaves: Tensors) -> Tensors:
    """Named as the fixture names them: outputs, loss, and gradients of the leaves."""
    loss = torch.zeros(())
    for name, tensor in outputs.items():
        if (cotangent := fixture.tensors.get(f"input/cotangent_{name}")) is not None:
            loss = loss + (tensor * cotangent).sum()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    named = {f"output/{name}": tensor.detach() for name, tensor in outputs.items()}
    named["loss/total"] = loss.detach()[None]
    return named | {f"grad/{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def _all_agree(computed: list[Tensors]) -> None:
    for other in computed[1:]:
        for name, tensor in computed[0].items():
            torch.testing.assert_close(
                other[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def _swapped(tensor: Tensor) -> Tensor:
    """`(B, T, H, D)` to `(B, H, T, D)`, and back."""
    return tensor.transpose(1, 2)


def _op_pattern(config: dict[str, Any], num_keys: int) -> Pattern:
    window = config.get("window")
    if window is not None and window < num_keys:
        return Window(window, causal=True)
    return Causal() if config.get("causal", True) else Dense()


def _op_softmax(fixture: Fixture) -> Result:
    """Grouped heads with a window, sinks and forget gates, each where the fixture has it."""
    config = fixture.spec["config"]

    def program(inputs: Tensors) -> Tensors:
        q, k, v = (_swapped(inputs[name]) for name in "qkv")
        scale = config.get("scale")
        pattern = _op_pattern(config, k.shape[2])
        if "log_forget" in inputs:
            log_forget = _swapped(inputs["log_forget"])
            out, lse = forgetting(q, k, v, log_forget, pattern=pattern, scale=scale)
            total = log_forget.cumsum(-1)
            bias = total[..., None] - total[..., None, :]
        else:
            out, lse = attend(q, k, v, pattern=pattern, scale=scale, return_lse=True)
            bias = None
        if "sink" in inputs:
            out = sink(out, lse, inputs["sink"][:, None])
        with torch.no_grad(), capture(scores=True) as maps:
            attend(q, k, v, pattern=pattern, scale=scale, bias=bias)
        peak = maps["attend"].scores.amax(-1)
        if "sink" in inputs:
            peak = torch.maximum(peak, inputs["sink"][:, None])
        return {"o": _swapped(out), "row_max": _swapped(peak)}

    return _op(fixture, program)


def _op_stick_breaking(fixture: Fixture) -> Result:
    pattern = Causal() if fixture.spec["config"]["attend_current"] else Before()

    def program(inputs: Tensors) -> Tensors:
        q, k, v = (_swapped(inputs[name]) for name in "qkv")
        scale = fixture.spec["config"].get("scale")
        out, left = attend(q, k, v, pattern=pattern, kernel=stick_breaking, scale=scale, return_lse=True)
        return {"o": _swapped(out), "rem": _swapped(left.exp())}

    return _op(fixture, program, ("reference", "blocked"))


def _op_attention_residual(fixture: Fixture) -> Result:
    config = fixture.spec["config"]

    def program(inputs: Tensors) -> Tensors:
        sources = [inputs[f"r{i}"] for i in range(config["sources"])]
        out, weights = attention_residual(
            sources, inputs["query"], inputs["rms_weight"], scale=config["scale"], eps=config["rms_eps"]
        )
        if config.get("output_norm"):
            (weight,) = [t for name, t in inputs.items() if name.endswith("weight") and name != "rms_weight"]
            out = nn.functional.rms_norm(out, out.shape[-1:], weight, config["rms_eps"])
        return {"o": out, "p": weights}

    return _op(fixture, program)


def _layer(
    fixture: Fixture,
    layer: AttentionLayer,
    further: Callable[[AttentionMap, Tensor], Tensors] = lambda found, x: {},
    renamed: Mapping[str, str] = MappingProxyType({}),
    buffers: Mapping[str, Tensor] = MappingProxyType({}),
) -> Result:
    """A layer on every backend, captured, decoded step by step, and its gradients by official names."""
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    ours = {_official(name, renamed): name for name, _ in layer.named_parameters()}
    layer.load_state_dict({ours[name]: tensor for name, tensor in state.items()} | dict(buffers))
    layer.eval()
    x = fixture.tensors["input/x"].requires_grad_()
    mask = fixture.tensors.get("input/mask")
    positions = fixture.tensors.get("input/position_ids")
    leaves = {f"param.{_official(name, renamed)}": tensor for name, tensor in layer.named_parameters()}
    leaves["x"] = x
    computed = []
    for name in BACKENDS:
        with backend(name):
            out = layer(x, mask=mask, positions=positions)
        computed.append(_with_gradients(fixture, {"o": out}, leaves))
    _all_agree(computed)
    if layer.causal and mask is None and positions is None:
        cache = layer.init_cache(len(x))
        steps = [layer.step(x[:, i : i + 1], cache) for i in range(x.shape[1])]
        torch.testing.assert_close(torch.cat(steps, dim=1), computed[0]["output/o"], atol=1e-5, rtol=1e-4)
    with torch.no_grad(), capture(layer, scores=True) as maps:
        layer(x, mask=mask, positions=positions)
    named = further(next(iter(maps.values())), x)
    return computed[-1] | {f"output/{name}": tensor.detach() for name, tensor in named.items()}, {}


def _official(name: str, renamed: Mapping[str, str]) -> str:
    module, _, rest = name.partition(".")
    return f"{renamed.get(module, module)}.{rest}" if rest else name


def _mhsa(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    heads = config.get("num_kv_heads", config["num_heads"])
    layer = MultiHead(
        config["dim"], config["num_heads"], num_kv_heads=heads, qkv_bias=config["qkv_bias"], out_bias=True
    )

    def norms(_found: AttentionMap, x: Tensor) -> Tensors:
        """Frobenius norm of each key head, summed over the batch."""
        keys = layer.k_proj(x).unflatten(-1, (heads, -1))
        return {"key_norms": keys.square().sum((1, 3)).sqrt().sum(0)}

    renamed = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}
    return _layer(fixture, layer, norms, renamed)


def _mean_pooled(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    layer = MultiHead(config["dim"], config["num_heads"], qkv_bias=True)
    weights, biases = (tensor.chunk(3) for tensor in fixture.inputs("qkv_weight", "qkv_bias"))
    for part, weight, bias in zip("qkv", weights, biases, strict=True):
        layer.get_submodule(f"{part}_proj").load_state_dict({"weight": weight, "bias": bias})
    grouped = gqa_from_mha(layer, config["num_kv_heads"])
    pairs = ((part, kind) for part in "qkv" for kind in ("weight", "bias"))
    return {
        f"output/{part}_{kind}": grouped.get_parameter(f"{part}_proj.{kind}").detach() for part, kind in pairs
    }, {}


def _weights(found: AttentionMap, _x: Tensor) -> Tensors:
    return {"weights": found.weights}


def _llama_like(config: dict[str, Any]) -> tuple[tuple[int, int], dict[str, Any]]:
    """What the configurations of the transformers library have in common."""
    heads = config["num_attention_heads"]
    bias = config.get("attention_bias", False)
    return (config["hidden_size"], heads), {
        "num_kv_heads": config.get("num_key_value_heads", heads),
        "head_dim": config.get("head_dim"),
        "causal": True,
        "window": config.get("sliding_window"),
        "rope_theta": config["rope_theta"],
        "yarn": _yarn(config.get("rope_scaling")),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _yarn(config: dict[str, Any] | None) -> Yarn | None:
    if config is None:
        return None
    names = ("factor", "beta_fast", "beta_slow", "truncate")
    given = {name: config[name] for name in names if name in config}
    return Yarn(original_length=config["original_max_position_embeddings"], **given)


def _gated(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    sizes, options = _llama_like(config)
    if "headwise_attn_output_gate" not in config:
        turned = config.get("rotary_dim", int(config["head_dim"] * config["partial_rotary_factor"]))
        return _layer(fixture, Qwen3NextAttention(*sizes, rotary_dim=turned, **options), _weights)
    options["qk_norm"] = config["use_qk_norm"]
    if config["headwise_attn_output_gate"]:
        return _layer(fixture, GatedAttention(*sizes, gate="headwise", **options), _weights)
    if config["elementwise_attn_output_gate"]:
        return _layer(fixture, GatedAttention(*sizes, gate="elementwise", **options), _weights)
    return _layer(fixture, MultiHead(*sizes, **options), _weights)


def _sinks(fixture: Fixture) -> Result:
    sizes, options = _llama_like({"attention_bias": True} | fixture.spec["config"])
    layer = SinkAttention(*sizes, **options)

    def weights(found: AttentionMap, _x: Tensor) -> Tensors:
        lse = found.scores.logsumexp(-1)
        return {"weights": sink(found.weights, lse, layer.sinks[:, None])}

    return _layer(fixture, layer, weights)


def _affine(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    layer = AffineScaled(
        config["hidden"],
        config["heads"],
        causal=config["causal"],
        activation=config["activation"],
        rho=config["rho"],
    )
    (mean,) = fixture.inputs("alpha_ma")

    def further(found: AttentionMap, x: Tensor) -> Tensors:
        alpha = layer.alpha(x)
        seen = found.scores > -torch.inf
        rest = (mean[:, None] - alpha)[..., None] / seen.sum(-1, keepdim=True)
        layer.train()(x)
        return {
            "alpha": alpha,
            "weights": alpha[..., None] * found.weights + rest * seen,
            "alpha_ma_next": layer.alpha_ma,
        }

    return _layer(fixture, layer, further, buffers={"alpha_ma": mean})


def _attention_residuals(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    dim, eps, block = config["hidden"], config["eps"], config["block_size"]
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    parts = [f"layers.{i}.{part}" for i in range(config["layers"]) for part in ("attn", "mlp")]
    sublayers = [nn.Sequential(nn.RMSNorm(dim, eps=eps), nn.Linear(dim, dim, bias=False)) for _ in parts]
    stack = AttentionResiduals(dim, sublayers, block_size=block, eps=eps)
    official: Tensors = {}
    pieces = [(f"{part}_", stack.readers[i]) for i, part in enumerate(parts)] + [("", stack.last)]
    for prefix, reader in pieces:
        official[f"{prefix}res_proj.weight"] = reader.query
        official[f"{prefix}res_norm.weight"] = reader.norm_weight
    for part, (norm, linear) in zip(parts, sublayers, strict=True):
        official |= {f"{part}_norm.weight": norm.weight, f"{part}.proj.weight": linear.weight}
    final = nn.RMSNorm(dim, eps=eps)
    official["norm.weight"] = final.weight
    assert official.keys() == state.keys()
    for name, parameter in official.items():
        parameter.data = state[name].reshape(parameter.shape)
    counts = []
    for number, reader in enumerate(stack.readers):
        reader.register_forward_pre_hook(
            lambda _module, args, n=number: counts.append(len(args[0]) - bool(n % block))
        )
    x = fixture.tensors["input/x"].requires_grad_()
    out = stack(x)
    outputs = {"o": out, "o_normed": final(out), "sources_after_layer": torch.tensor(counts[1::2])}
    leaves = {f"param.{name}": tensor for name, tensor in official.items()}
    computed = _with_gradients(fixture, outputs, leaves | {"x": x})
    shapes = {f"grad/param.{name}": array.shape for name, array in state.items()}
    return {name: tensor.reshape(shapes.get(name, tensor.shape)) for name, tensor in computed.items()}, {}


ADAPTERS = {
    "mhsa": _mhsa,
    "gqa": _mhsa,
    "gqa_from_mha": _mean_pooled,
    "op_gqa": _op_softmax,
    "op_forgetting": _op_softmax,
    "op_stickbreaking": _op_stick_breaking,
    "op_attnres": _op_attention_residual,
    "attnres_stack": _attention_residuals,
    "gated": _gated,
    "sinks": _sinks,
    "affine": _affine,
}
