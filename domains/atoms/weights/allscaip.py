"""Official AllScAIP checkpoints <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from domains.atoms.weights.pickled import SCALE, fitted_scale
from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.weights.formats import PREFIXES
from zoo.weights.official import OfficialLayout

INPUT = "backbone.input_block"
BLOCK = "backbone.transformer_blocks"
FIRST = f"{INPUT}.atomic_embedding.weight"
PUBLISHED_HEADS = {False: ("energyandforcehead.head",), True: ("oc20_energy", "forces")}
"""Names of the heads of energy and forces in the published configurations, by whether forces are direct."""
FREQUENCIES = (20, 10, 4, 10, 20)
"""Channels of a head that turn with the harmonics of each degree, where an official file does not say."""
HEAD_WIDTH = 64
"""Channels of a head of attention in every published configuration."""
DIRECTION_SIZE = 6
"""Degrees of an edge's direction in every published configuration."""

EMBEDDING = {
    "atom": "atomic_embedding",
    "order": "node_direction_embedding.0",
    "norm": "node_norm",
    "node": "node_linear.0",
    "charge": "charge_embedding.rand_emb",
    "spin": "spin_embedding.rand_emb",
    "charge_spin": "charge_spin_linear.0",
    "attributes": "edge_attr_linear.0",
    "edge": "edge_feature_linear.0",
}
"""Modules of `Embedding`, ours and the official ones."""
ATTENTION = {
    "source": ("neighborhood_attention.src_attn", "neighborhood_attention.src_attn_"),
    "destination": ("neighborhood_attention.dst_attn", "neighborhood_attention.dst_attn_"),
    "node_attention": ("node_attention", "node_attention.node_"),
}
"""Where the projections of the attention of a block lie, and how the name of its norm begins."""
SCALES = {
    "source": "neighborhood_attention.src_attn_res_scale",
    "destination": "neighborhood_attention.dst_attn_res_scale",
    "node_attention": "node_attention.node_attn_res_scale",
    "edge_mlp": "edge_ffn.ffn_res_scale",
    "node_mlp": "node_ffn.ffn_res_scale",
}
QKV = tuple(f"attn_in_proj_{name}" for name in "qkv")

OPTIONS = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "max_radius": "cutoff",
    "max_num_elements": "max_num_elements",
    "knn_k": "knn_k",
    "knn_soft": "knn_soft",
    "knn_sigmoid_scale": "knn_sigmoid_scale",
    "knn_lse_scale": "knn_lse_scale",
    "knn_use_low_mem": "knn_low_mem",
    "distance_function": "distance_function",
    "use_envelope": "use_envelope",
    "atten_num_heads": "num_heads",
    "node_direction_expansion_size": "node_direction_expansion_size",
    "edge_direction_expansion_size": "edge_direction_expansion_size",
    "edge_distance_expansion_size": "edge_distance_expansion_size",
    "output_hidden_layer_multiplier": "output_multiplier",
    "ffn_hidden_layer_multiplier": "ffn_multiplier",
    "use_node_path": "use_node_path",
    "use_residual_scaling": "use_residual_scaling",
    "energy_reduce": "energy_reduce",
    "activation": "activation",
    "normalization": "normalization",
    "mlp_dropout": "dropout",
    "atten_dropout": "attn_dropout",
}
"""Official options of the backbone and our arguments."""
WITHOUT_EFFECT = (
    "model",
    "dataset_list",
    "use_compile",
    "use_pbc",
    "max_batch_size",
    "max_atoms",
    "atten_name",
    "float32_matmul_precision",
    "skip_single_system_base_mask",
)
"""Options that say how the official program runs, or that it does not read."""
HANDLED = (
    "direct_forces",
    "regress_forces",
    "regress_stress",
    "use_padding",
    "knn_pad_size",
    "use_freq_mask",
    "freequency_list",
    "use_sincx_mask",
    "attn_num_freq",
)
"""Named in `config`."""


class AllScAIPOfficial(OfficialLayout):
    """State dicts of fairchem's `HydraModel`, and its inference checkpoints (`.pt`).

    Heads keep the names they have in a file. The units of the outputs are no tensors of the official state
    dict: they come from the tasks of an inference checkpoint, and are not written back.
    """

    beside = (f"{SCALE}*",)

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture."""
        return any("neighborhood_attention.src_attn." in name for name in state_dict)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the prefixes of wrappers."""
        out = {}
        for name, value in state_dict.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            if name != "n_averaged":
                out[name] = value
        return out

    @classmethod
    def told(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Without padding, which belongs to training: official inference does without, and drops nothing."""
        known = {*OPTIONS, *WITHOUT_EFFECT, *HANDLED} - {"use_padding"}
        return {name: value for name, value in options.items() if name in known}

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        direct_forces: bool | None = None,
        regress_forces: bool | None = None,
        regress_stress: bool = False,
        use_padding: bool = False,
        knn_pad_size: int = 30,
        use_freq_mask: bool | None = None,
        freequency_list: list[int] | None = None,
        use_sincx_mask: bool | None = None,
        attn_num_freq: int | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Sizes are read from the tensors, whether forces are direct too. What a file does not tell is as
        published unless it is given under its official name: cutoff and neighbours, heads (64 channels each),
        `edge_direction_expansion_size`, `freequency_list`, whether the angular mask goes with the radial one,
        activation, stress. With `use_padding`, neighbours beyond `knn_pad_size` are dropped as officially.

        Raises:
            ConfigError: an official option that does not exist.
            CheckpointError: an option that is not that of the file.
        """
        for name in options:
            if name not in OPTIONS and name not in WITHOUT_EFFECT:
                known = (*OPTIONS, *HANDLED)
                raise ConfigError(
                    f"The official program of AllScAIP has no option {name!r}.{did_you_mean(name, known)}"
                )
        given = {OPTIONS[name]: value for name, value in options.items() if name in OPTIONS}
        found = _found(state_dict, given)
        radial = found["num_frequencies"]
        if use_sincx_mask is not None and found["use_node_path"]:
            given["num_frequencies"] = (attn_num_freq or radial or 32) if use_sincx_mask else None
        if direct_forces is not None and regress_forces is not False:
            given["forces"] = "direct" if direct_forces else "conservative"
        for name, value in found.items():
            if given.get(name, value) != value:
                raise CheckpointError(f"The checkpoint has {name}={value!r}, not {given[name]!r}.")
        if regress_forces is False and found["forces"] == "conservative":
            found["forces"] = None
        turned = radial is not None if use_freq_mask is None else use_freq_mask
        return (
            {"num_heads": found["hidden_size"] // HEAD_WIDTH, "stress": False}
            | given
            | found
            | {"frequency_list": list(freequency_list or FREQUENCIES) if turned else None}
            | ({"max_neighbours": knn_pad_size} if use_padding else {})
            | ({"stress": True} if regress_stress and found["forces"] == "conservative" else {})
        )

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        weights = {}
        for ours, official in _names(model).items():
            parts = [state_dict[name] for name in official]
            weights[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return weights | fitted_scale(state_dict, model)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        names, out = _names(model), {}
        for ours, value in state_dict.items():
            if len(official := names.get(ours, ())) > 1:
                out |= dict(zip(official, value.chunk(len(official)), strict=True))
            elif official:
                out[official[0]] = value
        return out

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """With the heads called as in the model."""
        theirs, ours = head_names(state_dict), head_names(expected)
        for old, new in zip(theirs, ours, strict=False):
            old, new = f"output_heads.{old}.", f"output_heads.{new}."
            state_dict = {
                new + name.removeprefix(old) if name.startswith(old) else name: value
                for name, value in state_dict.items()
            }
        return state_dict


def head_names(state: Mapping[str, Tensor]) -> list[str]:
    """What the heads of energy, and of forces where there is one, are called.

    Raises:
        CheckpointError: there is none for the energy, or several.
    """
    names = []
    for kind in ("energy", "force"):
        pattern = re.compile(rf"output_heads\.(.+)\.{kind}_ffn\.")
        names.append(sorted({found[1] for name in state if (found := pattern.match(name))}))
    energy, forces = names
    if len(energy) != 1 or len(forces) > 1:
        raise CheckpointError(
            f"The checkpoint has {len(energy)} heads for energies ({', '.join(energy) or 'none'}) and "
            f"{len(forces)} for forces ({', '.join(forces) or 'none'}); a model here has one for energies, "
            "and at most one for forces."
        )
    return energy + forces


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our tensor names -> the official tensors that they hold, one after the other."""
    if model.sizes.attention is not None:  # pyright: ignore[reportAttributeAccessIssue]
        raise CheckpointError(
            "No official AllScAIP has attention=...: such weights are read and written in our own layout "
            "(zoo.save_model, zoo.load_model) only."
        )
    heads: Any = model.head_names
    names, known = {}, model.state_dict().keys()
    for ours in known:
        if ours.startswith(SCALE):
            continue
        official = _official(ours.removeprefix("network."), heads)
        if ".fc1." in ours and ours.replace(".fc1.", ".fc2.") not in known:
            # An MLP without hidden layer is a list of one.
            official = tuple(name.replace("ffn.0.0.", "ffn.0.") for name in official)
        names[ours] = official
    return names


def _official(name: str, heads: tuple[str, ...]) -> tuple[str, ...]:
    if found := re.fullmatch(r"embedding\.(\w+)\.(\w+)", name):
        return (f"{INPUT}.{EMBEDDING[found[1]]}.{found[2]}",)
    if found := re.fullmatch(r"blocks\.(\d+)\.(\w+)\.(.+)", name):
        return tuple(f"{BLOCK}.{found[1]}.{inside}" for inside in _in_block(found[2], found[3]))
    part, _, inside = name.partition(".")
    head = f"output_heads.{heads[0 if part == 'energy' else 1]}"
    if inside.startswith("norm."):
        return (f"{head}.node_{inside}",)
    return (f"{head}.{'energy' if part == 'energy' else 'force'}_{_layers(inside)}",)


def _in_block(part: str, inside: str) -> list[str]:
    if inside == "res_scale":
        return [SCALES[part]]
    if part not in ATTENTION:
        mlp = part.replace("mlp", "ffn")
        return [f"{mlp}.ffn_{inside}" if inside.startswith("norm.") else f"{mlp}.{_layers(inside)}"]
    place, norm = ATTENTION[part]
    if inside.startswith("norm."):
        return [f"{norm}{inside}"]
    kind = inside.rpartition(".")[2]
    if inside.startswith("qkv."):
        return [f"{place}.{name}.{kind}" for name in QKV]
    return [f"{place}.attn_out_proj.{kind}" if inside.startswith("proj.") else f"{place}.{inside}"]


def _layers(name: str) -> str:
    """`ffn.fc1` and `ffn.fc2` are steps 0 and 1, each the first of its own list."""
    return re.sub(r"fc(\d)", lambda found: f"{int(found[1]) - 1}.0", name)


def _found(state: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
    """Our constructor arguments that the names and shapes of an official file tell."""
    layers = {int(found[1]) for name in state if (found := re.match(rf"{re.escape(BLOCK)}\.(\d+)\.", name))}
    elements, width = state[FIRST].shape
    heads = head_names(state)
    head = f"output_heads.{heads[0]}.energy_ffn"
    norm = f"{BLOCK}.0.neighborhood_attention.src_attn_norm"
    normalization = "skip"
    if f"{norm}.weight" in state:
        normalization = "layernorm" if f"{norm}.bias" in state else "rmsnorm"
    radial = state.get(f"{BLOCK}.0.node_attention.radial_weight")
    found = {
        "forces": "direct" if len(heads) > 1 else "conservative",
        "head_names": heads,
        "num_layers": len(layers),
        "hidden_size": width,
        "max_num_elements": elements,
        "node_direction_expansion_size": state[f"{INPUT}.node_direction_embedding.0.weight"].shape[1],
        "use_node_path": f"{BLOCK}.0.node_attention.attn_out_proj.weight" in state,
        "num_frequencies": None if radial is None else radial.shape[1],
        "ffn_multiplier": _multiplier(state, f"{BLOCK}.0.node_ffn.ffn", width),
        "output_multiplier": _multiplier(state, head, width),
        "normalization": normalization,
    }
    if radial is not None:
        found["num_heads"] = len(radial)
    inputs = state[f"{INPUT}.edge_attr_linear.0.weight"].shape[1]
    return found | _expansions(inputs, given)


def _expansions(inputs: int, given: Mapping[str, Any]) -> dict[str, int]:
    """How the inputs of an edge's attributes divide into its distance and its direction."""
    names = "edge_distance_expansion_size", "edge_direction_expansion_size"
    distance, degrees = (given.get(name) for name in names)
    if degrees is None:
        degrees = DIRECTION_SIZE if distance is None else isqrt(max(0, inputs - distance))
    return dict(zip(names, (inputs - degrees**2, degrees), strict=True))


def _multiplier(state: Mapping[str, Tensor], place: str, width: int) -> int:
    if f"{place}.1.0.weight" not in state:
        return 0
    return len(state[f"{place}.0.0.weight"]) // width
