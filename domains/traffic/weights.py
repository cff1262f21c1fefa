"""Official checkpoint layouts of the traffic models: official tensor names <-> ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError
from zoo.weights.official import OfficialLayout


class _Link(NamedTuple):
    """One official tensor: rows `part` of `parts` of a tensor of ours, matrices in another layout."""

    official: str
    ours: str
    part: int = 0
    parts: int = 1


class _Layer(NamedTuple):
    """One linear layer of an official GMAN: (part of) a `NormLinear` of ours."""

    module: str
    official: str
    part: int = 0
    parts: int = 1


def _gman_layers(model: nn.Module, port: bool) -> Iterator[_Layer]:
    """The layers in the order in which the original creates them, with the port's names."""
    if model.unpublished:
        raise CheckpointError(f"Neither official program of GMAN has {', '.join(model.unpublished)}.")  # type: ignore[arg-type]

    def pair(module: str, official: str, first: str = "0", second: str = "1") -> Iterator[_Layer]:
        yield _Layer(f"{module}.{first}", f"{official}.convs.0")
        yield _Layer(f"{module}.{second}", f"{official}.convs.1")

    def after_heads(module: str, official: str) -> Iterator[_Layer]:
        if port:
            yield _Layer(module, f"{official}.FC.convs.0")
        else:
            yield from pair(module, f"{official}.FC")

    def blocks(module: str, official: str) -> Iterator[_Layer]:
        for i in range(len(model.get_submodule(module))):  # type: ignore[arg-type]
            for kind in ("spatial", "temporal"):
                for part, name in enumerate("qkv"):
                    yield _Layer(
                        f"{module}.{i}.{kind}.qkv",
                        f"{official}.{i}.{kind}Attention.FC_{name}.convs.0",
                        part,
                        3,
                    )
                yield from after_heads(f"{module}.{i}.{kind}.out", f"{official}.{i}.{kind}Attention")
            yield _Layer(f"{module}.{i}.fusion.gate_spatial", f"{official}.{i}.gatedFusion.FC_xs.convs.0")
            yield _Layer(f"{module}.{i}.fusion.gate_temporal", f"{official}.{i}.gatedFusion.FC_xt.convs.0")
            yield from pair(f"{module}.{i}.fusion.out", f"{official}.{i}.gatedFusion.FC_h")

    yield from pair("input", "FC_1")
    yield from pair("embedding.space", "STEmbedding.FC_se")
    yield from pair("embedding.time", "STEmbedding.FC_te")
    yield from blocks("encoder", "STAttBlock_1")
    for ours, name in (("query", "q"), ("key", "k"), ("value", "v")):
        yield _Layer(f"transform.{ours}", f"transformAttention.FC_{name}.convs.0")
    yield from after_heads("transform.out", "transformAttention")
    yield from blocks("decoder", "STAttBlock_2")
    yield from pair("output", "FC_2", "1", "3")


def _tf_links(model: nn.Module) -> Iterator[_Link]:
    """Names as TensorFlow counts them: kernels, biases and norms each by a counter of their own."""
    names = model.state_dict().keys()
    biases = norms = 0
    for kernels, layer in enumerate(_gman_layers(model, port=False)):
        yield _Link(_counted("kernel", kernels), f"{layer.module}.weight", layer.part, layer.parts)
        if f"{layer.module}.bias" in names:
            yield _Link(_counted("bias", biases), f"{layer.module}.bias", layer.part, layer.parts)
            biases += 1
        if f"{layer.module}.norm.weight" in names:
            moments = _counted("moments", norms)
            for official, ours in (
                (_counted("beta", norms), "bias"),
                (_counted("gamma", norms), "weight"),
                (f"{moments}/Squeeze/ExponentialMovingAverage", "running_mean"),
                (f"{moments}/Squeeze_1/ExponentialMovingAverage", "running_var"),
            ):
                yield _Link(official, f"{layer.module}.norm.{ours}", layer.part, layer.parts)
            norms += 1


def _counted(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _port_links(model: nn.Module) -> Iterator[_Link]:
    names = model.state_dict().keys()
    for layer in _gman_layers(model, port=True):
        for official, ours in (
            ("conv.weight", "weight"),
            ("conv.bias", "bias"),
            ("batch_norm.weight", "norm.weight"),
            ("batch_norm.bias", "norm.bias"),
            ("batch_norm.running_mean", "norm.running_mean"),
            ("batch_norm.running_var", "norm.running_var"),
        ):
            if f"{layer.module}.{ours}" in names:
                yield _Link(f"{layer.official}.{official}", f"{layer.module}.{ours}", layer.part, layer.parts)


def _slice(links: Iterator[_Link], state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Official names and our (parts of) tensors; names of ours that are not in `state` are passed over."""
    for link in links:
        if link.ours in state:
            yield link.official, state[link.ours].chunk(link.parts)[link.part]


def _join(links: Iterator[_Link], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from official ones."""
    parts: dict[str, list[Tensor]] = {}
    for link in links:
        parts.setdefault(link.ours, []).append(state[link.official])
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


class GMANOfficial(OfficialLayout):
    """TensorFlow 1 checkpoints of both published programs (no name scopes; kernels `[1, 1, in, out]`).

    The spatial embedding is no part of them: call `model.bind(graph)`.
    """

    ignored = ("*/Adam", "*/Adam_1", "beta1_power", "beta2_power", "Variable", "global_step")
    unofficial = ("embedding.spatial_embedding",)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        N: int,
        which: str = "PeMS",
        P: int = 12,
        Q: int = 12,
        T: int = 288,
        L: int = 1,
        K: int = 8,
        d: int = 8,
        bn: bool = True,
        bn_eps: float = 1e-3,
        temporal_mask: bool | None = None,
        output_dropout: float | None = None,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> dict[str, Any]:
        """`which` program (`"PeMS"` or `"METR"`) says mask and dropout where they are not given.

        `mean` and `std` scale the data, not the network, and are accepted because the programs keep them
        beside it.
        """
        if which not in ("PeMS", "METR"):
            raise ConfigError(f"The programs of GMAN are which='PeMS' and which='METR', not {which!r}.")
        metr = which == "METR"
        return {
            "num_nodes": N,
            "history": P,
            "horizon": Q,
            "steps_per_day": T,
            "num_layers": L,
            "num_heads": K,
            "head_dim": d,
            "norm": bn,
            "norm_eps": bn_eps,
            "causal": metr if temporal_mask is None else temporal_mask,
            "dropout": 0.1 * metr if output_dropout is None else output_dropout,
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        rows = {name: t[0, 0].T if t.ndim == 4 else t for name, t in state_dict.items()}
        return _join(_tf_links(model), rows)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        parts = _slice(_tf_links(model), state_dict)
        return {name: (t.T[None, None] if t.ndim == 2 else t).contiguous() for name, t in parts}


class GMANPortOfficial(OfficialLayout):
    """State dicts of the PyTorch port; the spatial embedding is no part of them: call `model.bind(graph)`."""

    ignored = ("*.num_batches_tracked",)
    unofficial = ("embedding.spatial_embedding",)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        N: int,
        L: int = 1,
        K: int = 8,
        d: int = 8,
        num_his: int = 12,
        num_pred: int = 12,
        bn_decay: float = 0.1,
        bn_eps: float = 1e-5,
        mask: bool = False,
        mean: float = 0.0,
        std: float = 1.0,
    ) -> dict[str, Any]:
        """`bn_decay` is the momentum of its batch norms; `mean` and `std` scale the data, not the network."""
        return {
            "num_nodes": N,
            "history": num_his,
            "horizon": num_pred,
            "steps_per_day": state_dict["STEmbedding.FC_te.convs.0.conv.weight"].shape[1] - 7,
            "num_layers": L,
            "num_heads": K,
            "head_dim": d,
            "norm_eps": bn_eps,
            "norm_momentum": bn_decay,
            "causal": mask,
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        rows = {name: t[:, :, 0, 0] if t.ndim == 4 else t for name, t in state_dict.items()}
        return _join(_port_links(model), rows)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for name, t in _slice(_port_links(model), state_dict):
            out[name] = t[:, :, None, None].contiguous() if t.ndim == 2 else t.contiguous()
            if name.endswith(".running_var"):
                out[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
        return out


_GPT2_BLOCK = {
    "ln_1": "ln_1",
    "attn.c_attn": "qkv",
    "attn.c_proj": "proj",
    "ln_2": "ln_2",
    "mlp.c_fc": "fc_1",
    "mlp.c_proj": "fc_2",
}
"""Modules of a GPT-2 block as the transformers library calls them; it keeps matrices as `[in, out]`."""


def _gpt2_names(num_layers: int) -> dict[str, str]:
    names = {"wpe.weight": "positions", "ln_f.weight": "norm.weight", "ln_f.bias": "norm.bias"}
    for i in range(num_layers):
        for official, ours in _GPT2_BLOCK.items():
            for kind in ("weight", "bias"):
                names[f"h.{i}.{official}.{kind}"] = f"blocks.{i}.{ours}.{kind}"
    return names


def _from_conv1d(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 and ".c_" in name else tensor


def gpt2_start(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The part of an `STLLM` that pretrained GPT-2 weights fill: positions, the first blocks, the last norm.

    Raises:
        CheckpointError: a tensor of GPT-2 is missing.
    """
    prefix = "transformer." if "transformer.wpe.weight" in state_dict else ""
    names = {prefix + name: ours for name, ours in _gpt2_names(len(model.gpt2.blocks)).items()}  # type: ignore[union-attr,arg-type]
    return _renamed(state_dict, names, prefix="gpt2.", source="GPT-2")


def _renamed(
    state_dict: dict[str, Tensor], names: dict[str, str], prefix: str, source: str
) -> dict[str, Tensor]:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise CheckpointError(
            f"These are no weights of a {source} with enough layers: {len(missing)} tensors are missing, "
            f"first {missing[0]!r}."
        )
    return {prefix + ours: _from_conv1d(name, state_dict[name]) for name, ours in names.items()}


class STLLMOfficial(OfficialLayout):
    """State dicts of the official ST-LLM, whose unused token table (38.6 M numbers) is dropped."""

    ignored = ("gpt.gpt2.wte.weight", "*.attn.bias", "*.attn.masked_bias")
    optional = ("*.attn.c_attn.bias",)
    """Lost in files from which the mask buffers `*attn.bias` were taken out by name; 0, as GPT-2 starts."""

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        num_nodes: int,
        slots_per_day: int | None = None,
        input_dim: int = 3,
        input_len: int = 12,
        output_len: int = 12,
        llm_layer: int | None = None,
        U: int = 1,
        gpt2: str = "",
    ) -> dict[str, Any]:
        """`gpt2` is a description, read for `n_head`; without it heads are 64 wide, as in any GPT-2."""
        positions, width = state_dict["gpt.gpt2.wpe.weight"].shape
        heads = re.search(r"n_head\D{0,3}(\d+)", gpt2)
        blocks = {name.split(".")[3] for name in state_dict if name.startswith("gpt.gpt2.h.")}
        return {
            "num_nodes": num_nodes,
            "history": input_len,
            "horizon": output_len,
            "steps_per_day": slots_per_day or len(state_dict["Temb.time_day"]),
            "in_channels": input_dim - 2,
            "llm_layers": len(blocks) if llm_layer is None else llm_layer,
            "trainable_layers": U,
            "width": width,
            "num_heads": int(heads[1]) if heads else width // 64,
            "max_positions": positions,
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        zeros = {
            name: torch.zeros_like(t) for name, t in model.state_dict().items() if name.endswith("qkv.bias")
        }
        return zeros | {
            ours: _from_conv1d(
                name, state_dict[name].squeeze((2, 3)) if state_dict[name].ndim == 4 else state_dict[name]
            )
            for name, ours in _st_llm_names(model).items()
            if name in state_dict
        }

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for name, ours in _st_llm_names(model).items():
            if ours in state_dict:
                tensor = _from_conv1d(name, state_dict[ours])
                convolution = tensor.ndim == 2 and name.split(".")[0] in _ST_LLM_CONVOLUTIONS
                out[name] = (tensor[:, :, None, None] if convolution else tensor).contiguous()
        return out


_ST_LLM_CONVOLUTIONS = {"start_conv": "tokens.value", "feature_fusion": "fusion", "regression_layer": "head"}
"""Linear layers that the official program writes as 1 x 1 convolutions."""


def _st_llm_names(model: nn.Module) -> dict[str, str]:
    if model.attention:
        raise CheckpointError("The official ST-LLM has the attention of GPT-2: leave out `attention`.")
    names = {
        "Temb.time_day": "tokens.time_of_day",
        "Temb.time_week": "tokens.day_of_week",
        "node_emb": "tokens.node",
    }
    for official, ours in _ST_LLM_CONVOLUTIONS.items():
        names |= {f"{official}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    blocks = _gpt2_names(len(model.gpt2.blocks))  # type: ignore[union-attr,arg-type]
    return names | {f"gpt.gpt2.{official}": f"gpt2.{ours}" for official, ours in blocks.items()}


def llama_start(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The part of an `STLink` that pretrained Llama weights (transformers library) fill: blocks and last
    norm.

    Raises:
        CheckpointError: a tensor is missing.
    """
    prefix = "model." if "model.norm.weight" in state_dict else ""
    plain = {
        "input_layernorm": "norm_1",
        "self_attn.o_proj": "attention.proj",
        "post_attention_layernorm": "norm_2",
    }
    plain |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
    joined = [f"self_attn.{name}_proj" for name in "qkv"]
    names = {f"{prefix}norm.weight": "norm.weight"}
    for i in range(len(model.llama.blocks)):  # type: ignore[union-attr,arg-type]
        names |= {
            f"{prefix}layers.{i}.{name}.weight": f"blocks.{i}.{ours}.weight" for name, ours in plain.items()
        }
        names |= {f"{prefix}layers.{i}.{name}.weight": f"blocks.{i}.{name}" for name in joined}
    tensors = _renamed(state_dict, names, prefix="llama.", source="Llama")
    for i in range(len(model.llama.blocks)):  # type: ignore[union-attr,arg-type]
        parts = [tensors.pop(f"llama.blocks.{i}.{name}") for name in joined]
        tensors[f"llama.blocks.{i}.attention.qkv.weight"] = torch.cat(parts)
    return tensors
