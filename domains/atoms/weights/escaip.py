"""Official EScAIP checkpoints <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from domains.atoms.weights.first_version import refuse_first_version
from domains.atoms.weights.pickled import SCALE, fitted_scale
from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.weights.formats import PREFIXES
from zoo.weights.official import OfficialLayout

INPUT = "backbone.input_block"
FIRST = f"{INPUT}.input_layer.source_atomic_embedding.weight"
BLOCK = "backbone.transformer_blocks"
PROJECTION = "backbone.output_projection"
ENERGY = ".energy_layer.ffn.0.0.weight"
FORCES = ".force_direction_layer.ffn.0.0.weight"
HEAD_WIDTH = 64
"""Channels of a head in every published configuration."""

ATTRIBUTES = {
    "source_atom": "source_atomic_embedding",
    "target_atom": "target_atomic_embedding",
    "source_order": "source_direction_embedding.0",
    "target_order": "target_direction_embedding.0",
    "distance": "edge_distance_embedding.0",
    "merge": "edge_attr_linear.0",
    "norm": "edge_attr_norm",
}
"""Modules of `EdgeAttributes`, ours and the official ones."""
ATTENTION = {
    "node_hidden": "node_hidden_linear.0",
    "edge_hidden": "edge_hidden_linear.0",
    "message": "message_linear.0",
    "gate": "gate_linear.0",
    "candidate": "candidate_linear.0",
    "norm": "message_norm",
    "attention.proj": "attn_out_proj",
    "attention.angle.distance": "attn_distance_embedding.0",
    "attention.angle.angle": "attn_angle_embedding.0",
    "attention.angle.project": "attn_bias_projection.0",
}
"""Modules of `GraphAttention`."""
QKV = tuple(f"attn_in_proj_{name}" for name in "qkv")
HEADS = {
    "energy_norm": "output_heads.energy.node_norm",
    "energy_head": "output_heads.energy.energy_layer",
    "force_head.node_norm": "output_heads.forces.node_norm",
    "force_head.edge_norm": "output_heads.forces.edge_norm",
    "force_head.direction": "output_heads.forces.force_direction_layer",
    "force_head.magnitude": "output_heads.forces.force_magnitude_layer",
}

OPTIONS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "max_radius": "cutoff",
    "max_num_elements": "max_num_elements",
    "use_pbc": "use_pbc",
    "knn_k": "knn_k",
    "knn_soft": "knn_soft",
    "knn_sigmoid_scale": "knn_sigmoid_scale",
    "knn_lse_scale": "knn_lse_scale",
    "knn_use_low_mem": "knn_low_mem",
    "distance_function": "distance_function",
    "use_envelope": "use_envelope",
    "atten_num_heads": "num_heads",
    "atom_embedding_size": "atom_embedding_size",
    "node_direction_embedding_size": "node_direction_embedding_size",
    "node_direction_expansion_size": "node_direction_expansion_size",
    "edge_distance_expansion_size": "edge_distance_expansion_size",
    "edge_distance_embedding_size": "edge_distance_embedding_size",
    "readout_hidden_layer_multiplier": "readout_multiplier",
    "output_hidden_layer_multiplier": "output_multiplier",
    "ffn_hidden_layer_multiplier": "ffn_multiplier",
    "use_angle_embedding": "angle_embedding",
    "angle_embedding_size": "angle_embedding_size",
    "use_graph_attention": "use_graph_attention",
    "use_message_gate": "use_message_gate",
    "use_global_readout": "use_global_readout",
    "freequency_list": "frequency_list",
    "energy_reduce": "energy_reduce",
    "activation": "activation",
    "normalization": "normalization",
    "mlp_dropout": "dropout",
    "atten_dropout": "attn_dropout",
    "stochastic_depth_prob": "drop_path",
    "node_ffn_dropout": "node_ffn_dropout",
    "edge_ffn_dropout": "edge_ffn_dropout",
    "scalar_output_dropout": "scalar_output_dropout",
    "vector_output_dropout": "vector_output_dropout",
}
"""Official options of the backbone and our arguments."""
WITHOUT_EFFECT = (
    "model",
    "dataset_list",
    "use_compile",
    "use_padding",
    "use_fp16_backbone",
    "max_batch_size",
    "max_atoms",
    "knn_pad_size",
    "atten_name",
    "angle_expansion_size",
)
"""Options that say how the official program runs, not what it computes: tables here are as wide as needed."""
HANDLED = ("direct_forces", "regress_forces", "regress_stress", "use_frequency_embedding")
"""Named in `config`."""


class EScAIPOfficial(OfficialLayout):
    """State dicts of fairchem's `HydraModel`: `backbone.*` and `output_heads.NAME.*`, of any name.

    The units of the outputs are no tensors of it: they come from the tasks of an inference checkpoint
    (`.pt`), and are not written back.
    """

    beside = (f"{SCALE}*",)

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture."""
        return any(name.endswith("input_layer.source_atomic_embedding.weight") for name in state_dict)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the prefixes of wrappers, and with the heads called `energy` and `forces`.

        Raises:
            CheckpointError: it is a checkpoint of the first version.
        """
        refuse_first_version(state_dict)
        out = {}
        for name, value in state_dict.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            if name != "n_averaged":
                out[name] = value
        for title, mark in (("energy", ENERGY), ("forces", FORCES)):
            found = [name.removesuffix(mark) for name in out if name.endswith(mark)]
            if len(found) == 1:
                old = f"{found[0]}."
                out = {_renamed(name, old, f"output_heads.{title}."): v for name, v in out.items()}
        return out

    @classmethod
    def told(cls, options: dict[str, Any]) -> dict[str, Any]:
        known = (*OPTIONS, *WITHOUT_EFFECT, *HANDLED)
        return {name: value for name, value in options.items() if name in known}

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        direct_forces: bool | None = None,
        regress_forces: bool | None = None,
        regress_stress: bool = False,
        use_frequency_embedding: bool = True,
        **options: Any,
    ) -> dict[str, Any]:
        """Sizes are read from the tensors, whether forces are direct too. What a file does not tell is as
        published unless it is given under its official name: cutoff and neighbours, heads (64 channels each),
        `freequency_list`, activation, energy_reduce, periodicity, stress.

        Raises:
            ConfigError: an official option that does not exist.
            CheckpointError: an option that is not that of the file.
        """
        for name in options:
            if name not in OPTIONS and name not in WITHOUT_EFFECT:
                raise ConfigError(
                    f"The official program of EScAIP has no option {name!r}.{did_you_mean(name, OPTIONS)}"
                )
        given = {OPTIONS[name]: value for name, value in options.items() if name in OPTIONS}
        if not use_frequency_embedding:
            given["frequency_list"] = None
        found = _found(state_dict)
        if direct_forces is not None and regress_forces is not False:
            stated = "direct" if direct_forces else "conservative"
            if stated != found["forces"]:
                raise CheckpointError(f"The checkpoint has forces={found['forces']!r}, not {stated!r}.")
        for name, value in found.items():
            if given.get(name, value) != value:
                raise CheckpointError(f"The checkpoint has {name}={value!r}, not {given[name]!r}.")
        heads = found["hidden_size"] // HEAD_WIDTH
        stress = regress_stress and found["forces"] == "conservative"
        return {"num_heads": heads} | given | found | {"stress": stress, "smooth_orders": False}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        own = model.state_dict()
        weights = {
            ours: torch.cat([state_dict[name] for name in official]).view(own[ours].shape)
            for ours, official in _names(model).items()
        }
        return weights | fitted_scale(state_dict, model)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        names, out = _names(model), {}
        for ours, value in state_dict.items():
            if ours in names:
                value = value[None, None] if ours.endswith(".pool") else value
                out |= dict(zip(names[ours], value.chunk(len(names[ours])), strict=True))
        return out


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our tensor names -> the official tensors that they hold, one after the other."""
    names, known = {}, model.state_dict().keys()
    for ours in known:
        if not ours.startswith(SCALE):
            module, _, kind = ours.removeprefix("network.").rpartition(".")
            official = _official(module, kind)
            if module.endswith(".fc1") and ours.replace(".fc1.", ".fc2.") not in known:
                # An MLP without hidden layer is a list of one.
                official = [name.replace(".0.0.", ".0.") for name in official]
            names[ours] = tuple(official)
    return names


def _official(module: str, kind: str) -> list[str]:
    if found := re.fullmatch(r"embedding\.(.+)", module):
        return [f"{INPUT}.{_input(found[1])}.{kind}"]
    if found := re.fullmatch(r"blocks\.(\d+)\.attention(?:\.(.+))?", module):
        place = f"{BLOCK}.{found[1]}.graph_attention"
        return [f"{place}.{name}" for name in _attention(found[2] or "", kind)]
    if found := re.fullmatch(r"blocks\.(\d+)\.(node|edge)_ffn\.fc(\d)", module):
        return [f"{BLOCK}.{found[1]}.feedforward.mlp_{found[2]}.{_layer(found[3])}.{kind}"]
    if found := re.fullmatch(r"blocks\.(\d+)\.(.+)", module):
        return [f"{BLOCK}.{found[1]}.{found[2]}.{kind}"]
    if found := re.fullmatch(r"(\w+)_readout\.norms\.(\d+)", module):
        return [f"backbone.readout_layers.{found[2]}.pre_{found[1]}_norm.{kind}"]
    if found := re.fullmatch(r"(\w+)_readout\.ffns\.(\d+)\.fc(\d)", module):
        return [f"backbone.readout_layers.{found[2]}.{found[1]}_ffn.{_layer(found[3])}.{kind}"]
    if found := re.fullmatch(r"(\w+)_readout\.projection", module):
        return [f"{PROJECTION}.{found[1]}_projection.0.{kind}"]
    if found := re.fullmatch(r"(\w+)_readout\.norm", module):
        return [f"{PROJECTION}.output_norm_{found[1]}.{kind}"]
    head = next(name for name in HEADS if module == name or module.startswith(f"{name}."))
    inside = module[len(head) :].replace(".final", ".final_output.0")
    inside = re.sub(r"\.fc(\d)", lambda found: f".{_layer(found[1])}", inside)
    return [f"{HEADS[head]}{inside}.{kind}"]


def _input(module: str) -> str:
    if found := re.fullmatch(r"attributes\.(.+)", module):
        return f"input_layer.{ATTRIBUTES[found[1]]}"
    if found := re.fullmatch(r"ffn\.fc(\d)", module):
        return f"input_layer.edge_ffn.{_layer(found[1])}"
    return module


def _attention(module: str, kind: str) -> list[str]:
    if kind == "pool":
        return ["attn_weight"]
    if kind == "scalar":
        return ["attn_scalar"]
    if module == "attention.qkv":
        return [f"{name}.{kind}" for name in QKV]
    if found := re.fullmatch(r"attributes\.(.+)", module):
        return [f"{ATTRIBUTES[found[1]]}.{kind}"]
    return [f"{ATTENTION[module]}.{kind}"]


def _layer(fc: str) -> str:
    """`fc1` and `fc2` are steps 0 and 1, each the first of its own list."""
    return f"{int(fc) - 1}.0"


def _found(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our constructor arguments that the names and shapes of an official file tell."""
    matched = (re.match(rf"{BLOCK}\.(\d+)\.", name) for name in state)
    layers = {int(match[1]) for match in matched if match}
    if not layers:
        raise KeyError(f"{BLOCK}.0.norm_attn_node.weight")
    inside, place = f"{INPUT}.input_layer", f"{BLOCK}.0.graph_attention"
    elements, atom = state[FIRST].shape
    directions = state[f"{inside}.source_direction_embedding.0.weight"].shape
    distances = state[f"{inside}.edge_distance_embedding.0.weight"].shape
    width = len(state[f"{inside}.edge_attr_linear.0.weight"])
    found: dict[str, Any] = {
        "num_layers": len(layers),
        "hidden_size": width,
        "max_num_elements": elements,
        "atom_embedding_size": atom,
        "node_direction_embedding_size": directions[0],
        "node_direction_expansion_size": directions[1],
        "edge_distance_embedding_size": distances[0],
        "edge_distance_expansion_size": distances[1],
        "use_message_gate": f"{place}.gate_linear.0.weight" in state,
        "use_graph_attention": f"{place}.attn_weight" in state,
        "use_global_readout": f"{PROJECTION}.global_projection.0.weight" in state,
        "angle_embedding": "none",
        "forces": _forces(state, max(layers)),
        "ffn_multiplier": _multiplier(state, f"{BLOCK}.0.feedforward.mlp_node", width),
        "readout_multiplier": _multiplier(state, "backbone.readout_layers.0.node_ffn", width),
        "output_multiplier": _multiplier(state, "output_heads.energy.energy_layer.ffn", width),
    }
    if f"{inside}.edge_attr_norm.weight" not in state:
        found["normalization"] = "skip"
    else:
        found["normalization"] = "layernorm" if f"{inside}.edge_attr_norm.bias" in state else "rmsnorm"
    if f"{place}.attn_scalar" in state:
        found["angle_embedding"] = "scalar"
        found["num_heads"] = len(state[f"{place}.attn_scalar"])
    elif f"{place}.attn_bias_projection.0.weight" in state:
        found["angle_embedding"] = "bias"
        found["num_heads"] = len(state[f"{place}.attn_bias_projection.0.weight"])
        found["angle_embedding_size"] = len(state[f"{place}.attn_distance_embedding.0.weight"])
    if found["use_graph_attention"]:
        found["num_heads"] = state[f"{place}.attn_weight"].shape[2]
    return found


def _forces(state: Mapping[str, Tensor], last: int) -> str | None:
    if any(name.endswith(FORCES) for name in state):
        return "direct"
    has_edge_ffn = any(name.startswith(f"{BLOCK}.{last}.feedforward.mlp_edge.") for name in state)
    return None if has_edge_ffn else "conservative"


def _multiplier(state: Mapping[str, Tensor], place: str, width: int) -> int:
    if f"{place}.1.0.weight" not in state:
        return 0
    return len(state[f"{place}.0.0.weight"]) // width
