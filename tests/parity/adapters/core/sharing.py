"""Latent heads, key-driven heads, mixtures of heads, compressed convolutional attention."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from parity.fixture import Fixture
from zoo.attention import Causal, attend, capture, rotary, rotary_tables
from zoo.attention.heads import key_norms, min_max, raw_shares, shared_map
from zoo.attention.layers.compressed import CompressedConvolutional
from zoo.attention.layers.key_driven import DynamicGQA, KeyDrivenGQA, PerturbedGQA
from zoo.attention.layers.latent import MultiHeadLatent
from zoo.attention.layers.mixture_of_heads import MixtureOfHeads, MixtureOfHeadsLlama
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.transmla import key_turn, transmla
from zoo.attention.yarn import Yarn

Result = tuple[dict[str, Tensor], dict[str, Any]]


M = TypeVar("M", bound=nn.Module)


def _loaded(layer: M, fixture: Fixture) -> M:
    state = {name: torch.from_numpy(array) for name, array in fixture.state_dict().items()}
    layer.load_state_dict(state)
    return layer.eval()


def _results(fixture: Fixture, layer: nn.Module, x: Tensor, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs, the loss of those that have a cotangent, and its gradients."""
    cotangents = {
        name: fixture.tensors[f"input/cotangent_{name}"]
        for name in outputs
        if f"input/cotangent_{name}" in fixture.tensors
    }
    loss = torch.stack([(outputs[name] * c).sum() for name, c in cotangents.items()]).sum()
    loss.backward()
    computed = {f"output/{name}": value.detach() for name, value in outputs.items()}
    computed |= {"loss/total": loss.detach()[None], "grad/x": _grad(x)}
    return computed | {f"grad/param.{name}": _grad(p) for name, p in layer.named_parameters()}


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _tokens(fixture: Fixture) -> Tensor:
    return fixture.tensors["input/x"].clone().requires_grad_()


def _agree(first: Tensor, second: Tensor, what: str) -> None:
    error = float((first - second).detach().abs().max())
    assert error < 2e-5, f"{what} differ by {error:.2g}"


def mla(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    rope = dict(config["rope_parameters"])
    yarn = None
    if rope["rope_type"] == "yarn":
        names = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
        given = {name: rope[name] for name in names if rope.get(name) is not None}
        yarn = Yarn(original_length=rope["original_max_position_embeddings"], **given)
    layer = MultiHeadLatent(
        config["hidden_size"],
        config["num_attention_heads"],
        kv_rank=config["kv_lora_rank"],
        q_rank=config["q_lora_rank"],
        nope_dim=config["qk_nope_head_dim"],
        rope_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
        bias=config["attention_bias"],
        rope_theta=rope["rope_theta"],
        yarn=yarn,
        interleaved=config["rope_interleave"],
    )
    layer = _loaded(layer, fixture)
    x = _tokens(fixture)
    with capture(layer) as maps:
        layer(x)
    cos, sin = layer.tables(torch.arange(x.shape[1]))
    latent = layer.latents(x, cos, sin)
    q = layer.queries(x, cos, sin)
    expanded, absorbed = (
        layer.o_proj(form(q, latent, Causal()).transpose(1, 2).flatten(2))
        for form in (layer.expanded, layer.absorbed)
    )
    _agree(expanded, absorbed, "expanded and absorbed forms")
    cache = layer.init_cache(len(x))
    steps = torch.cat([layer.step(token, cache) for token in x.split(1, dim=1)], dim=1)
    _agree(steps, expanded, "decoded steps and the full forward pass")
    outputs = {
        "o": layer(x),
        "weights": next(iter(maps.values())).weights,
        "latent": latent[:, 0, :, : layer.kv_rank],
        "cos": torch.cat([cos, cos], dim=-1)[None],
        "sin": torch.cat([sin, sin], dim=-1)[None],
    }
    assert abs(layer.scale - config["scaling"]) < 1e-6, f"scale {layer.scale}, not {config['scaling']}"
    return _results(fixture, layer, x, outputs), {}


def _grouped_options(fixture: Fixture) -> dict[str, Any]:
    config = fixture.spec["config"]
    names = ("dim", "num_heads", "num_kv_heads", "qkv_bias", "kind", "window_size")
    return {name: config[name] for name in names if name in config}


def kdgqa(fixture: Fixture) -> Result:
    layer = _loaded(KeyDrivenGQA(**_grouped_options(fixture)), fixture)
    x = _tokens(fixture)
    norms = key_norms(layer.split(layer.k(x)))
    outputs = {
        "o": layer(x),
        "key_norms": norms,
        "allocation": layer.allocation(norms),
        "raw_alloc": raw_shares(min_max(norms), layer.num_heads),
    }
    return _results(fixture, layer, x, outputs), {}


def dgqa(fixture: Fixture) -> Result:
    layer = _loaded(DynamicGQA(**_grouped_options(fixture), eval_updates=True), fixture)
    x = _tokens(fixture)
    norms = key_norms(layer.split(layer.k(x)))
    before = layer.cache.clone()
    outputs = {"key_norms": norms, "allocation": layer.allocation(norms)}
    layer.cache.copy_(before)
    outputs |= {"o": layer(x), "cache_after": layer.cache}
    return _results(fixture, layer, x, outputs), {}


def pgqa(fixture: Fixture) -> Result:
    layer = _loaded(PerturbedGQA(**_grouped_options(fixture)), fixture)
    (uniform,) = fixture.inputs("uniform")
    layer.draw = lambda shape, device: uniform
    x = _tokens(fixture)
    return _results(fixture, layer, x, {"o": layer(x)}), {}


def moh(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    if "topk" in config:
        return _moh_llama(fixture, config)
    layer = MixtureOfHeads(
        config["dim"],
        config["num_heads"],
        shared_heads=config["shared_head"],
        routed_heads=config["routed_head"],
        qkv_bias=config["qkv_bias"],
    )
    layer = _loaded(layer, fixture)
    x = _tokens(fixture)
    return _results(fixture, layer, x, {"o": layer(x)}), {}


def _moh_llama(fixture: Fixture, config: dict[str, Any]) -> Result:
    layer = MixtureOfHeadsLlama(
        config["hidden"],
        config["num_heads"],
        num_kv_heads=config["kv_heads"],
        shared_heads=config["shared"],
        routed_heads=config["topk"],
        rope_theta=config.get("rope_theta", 10_000.0),
    )
    layer = _loaded(layer, fixture)
    x = _tokens(fixture)
    q = split_heads(layer.q_proj(x), layer.num_heads)
    outputs = {"o": layer(x), "routing_norms": layer.routing_norms(q)}
    return _results(fixture, layer, x, outputs), {}


def cca(fixture: Fixture) -> Result:
    config = fixture.spec["config"]
    layer = CompressedConvolutional(
        config["hidden_size"],
        config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        kernels=(config["cca_time0"], config["cca_time1"]),
        bias=config.get("attention_bias", False),
        rope_theta=config["rope_theta"],
        rotary_factor=config["partial_rotary_factor"],
        window=config.get("sliding_window"),
    )
    layer = _loaded(layer, fixture)
    x = _tokens(fixture)
    given = [fixture.tensors[name] for name in _MASKS if name in fixture.tensors]
    mask = given[0].reshape(x.shape[:2]).bool() if given else torch.ones(x.shape[:2], dtype=torch.bool)
    real = mask[..., None]
    with capture(layer) as maps:
        out = layer(x, mask=mask) * real  # padded queries count nowhere
    q, k, v = layer.qkv_proj(x * real, None)
    heads_second = {"q": q, "k": k, "v": v, "k_normed": layer.qk_norm(q, k)[1]}
    outputs = {name: tensor.transpose(1, 2) for name, tensor in heads_second.items()}
    outputs |= {"o": out, "weights": next(iter(maps.values())).weights}
    cache = layer.init_cache(len(x))
    steps = [layer(x[:, i : i + 1], mask=mask[:, i : i + 1], cache=cache) for i in range(x.shape[1])]
    _agree(torch.cat(steps, dim=1) * real, out, "decoded steps and the full forward pass")
    return _results(fixture, layer, x, outputs), {}


def transmla_layer(fixture: Fixture) -> Result:
    """Outputs of the layer, of its turned keys, and of the latent layers; there are no gradients."""
    config = fixture.spec["config"]
    source = MultiHead(
        config["hidden_size"],
        config["num_heads"],
        num_kv_heads=config["kv_heads"],
        head_dim=config["head_dim"],
        causal=True,
        rope_theta=config["rope_theta"],
        qkv_bias=config["attention_bias"],
        out_bias=config["attention_bias"],
    )
    source = _loaded(source, fixture)
    x, calibration = fixture.inputs("x", "calibration")
    width, rope_dim = config["head_dim"], config["qk_mqa_dim"]
    common = {"rope_dim": rope_dim, "freqfold": config["freqfold"]}
    full = 2 * config["kv_heads"] * width - rope_dim
    partial = transmla(source, calibration, kv_rank=full, balance=None, **common)
    narrow = transmla(
        source,
        calibration,
        kv_rank=config["kv_lora_rank"],
        q_rank=config["q_lora_rank"],
        balance=config["balance_kv_ratio"],
        norm="official" if config["use_qkv_norm"] else None,
        **common,
    )
    with torch.no_grad():
        latent = narrow.kv_a_proj_with_mqa(calibration).flatten(0, 1)[:, : narrow.kv_rank]
        outputs = {
            "o_original": source(x),
            "o_rotated_all_rope": _turned_keys(source, x, calibration, config["freqfold"]),
            "o_partial_rope": partial(x),
            "o_mla": narrow(x),
            "latent_gram": (latent.T @ latent).abs(),
        }
    return {f"output/{name}": value for name, value in outputs.items()}, {}


def _turned_keys(layer: MultiHead, x: Tensor, calibration: Tensor, freqfold: int) -> Tensor:
    """All heads read one head of turned keys, with rotary positions on every block of it."""
    width, groups = layer.head_dim, layer.num_kv_heads
    keys = layer.k_proj(calibration).double().flatten(0, 1)
    turn = key_turn(keys, width, width, freqfold).to(x.dtype)
    cos, sin = rotary_tables(torch.arange(x.shape[1]), width, theta=layer.rope_theta or 0.0)

    q, v = (proj(x).unflatten(-1, (-1, width)).transpose(1, 2) for proj in (layer.q_proj, layer.v_proj))
    by_group = turn.unflatten(0, (groups, width))[shared_map(layer.num_heads, groups)]
    out = attend(
        _rotated_blocks(q @ by_group, cos, sin, groups),
        _rotated_blocks((layer.k_proj(x) @ turn)[:, None], cos, sin, groups).expand(-1, groups, -1, -1),
        v,
        pattern=Causal(),
        scale=width**-0.5,
    )
    return layer.o_proj(out.transpose(1, 2).flatten(2))


def _rotated_blocks(x: Tensor, cos: Tensor, sin: Tensor, blocks: int) -> Tensor:
    """Rotary positions on each of the blocks that `(B, H, N, blocks D)` consists of."""
    parts = (rotary(part, cos, sin) for part in x.chunk(blocks, dim=-1))
    return torch.cat(list(parts), dim=-1)


_MASKS = ("input/mask", "input/conv_mask", "input/attention_mask", "input/padding_mask")

ADAPTERS = {
    "transmla": transmla_layer,
    "cca": cca,
    "moh": moh,
    "mla": mla,
    "kdgqa": kdgqa,
    "dgqa": dgqa,
    "pgqa": pgqa,
}
