"""NCPP under the names of its reference, which follow the layers of the published Keras program.

No weights are published; the names are those of the fixtures. Convolutions are `(out, in, kernel...)`, the
output matrix of attention reads the heads interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.weights.official import OfficialLayout

NUMERIC_NAMES = {"memory": "mem_num", "processor": "cpu_num", "system": "system_num"}
TEXT_NAMES = {"system_text": "System_info", "workload_text": "Workload_info"}
CONVS = (
    ("fix_convx1", "fix_conv2", "fix4", "fix6"),
    ("fix9", "fix10", "fix11", "fix12"),
    ("fix13", "fix14", "fix15"),
)


class NCPPOfficial(OfficialLayout):
    """The published program's layers; a group it does not have keeps its own name."""

    unofficial = ("*.num_batches_tracked",)
    own_modules = ("cross_attention",)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        n_mem: int,
        n_cpu: int,
        n_system: int,
        char_token_order: Mapping[str, Sequence[tuple[str, int]]],
        labels: Sequence[str] | None = None,
        n_feature_maps: int | None = None,
        multi_heads: int = 2,
        pooled_char_feature: int = 1,
    ) -> dict[str, Any]:
        """The options of the program: numbers of features, and the texts with their lengths."""
        targets, dim = state_dict["head.weight"].shape
        if labels is not None and len(labels) != targets:
            raise ConfigError(f"There are {len(labels)} labels, but the head gives {targets} scores.")
        if n_feature_maps not in (None, dim // 2):
            raise ConfigError(f"n_feature_maps={n_feature_maps}, but the weights have {dim // 2}.")
        if pooled_char_feature != 1:
            raise ConfigError(f"pooled_char_feature={pooled_char_feature}: only 1 per text is published.")
        ours = {official: name for name, official in TEXT_NAMES.items()}
        counts = {"memory": n_mem, "processor": n_cpu, "system": n_system}
        text = {
            ours.get(group, group): [int(length) for _, length in features]
            for group, features in char_token_order.items()
            if features
        }
        vocabulary, embed_dims = 100, 4
        for name, value in state_dict.items():
            if name.startswith("embed."):
                vocabulary, embed_dims = value.shape
        return {
            "numeric": {name: count for name, count in counts.items() if count},
            "text": text,
            "num_targets": targets,
            "width": dim // 2,
            "num_heads": multi_heads,
            "vocabulary": vocabulary,
            "embed_dims": embed_dims,
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for ours, official in _modules(model):
            for end in _tensors(official, state_dict):
                found[f"{ours}.{end}"] = state_dict[f"{official}.{end}"]
        for ours, official, heads in _attentions(model):
            parts = [state_dict[f"{official}.{part}.weight"] for part in "qkv"]
            found[f"{ours}.qkv.weight"] = torch.cat(parts)
            out = state_dict[f"{official}.out.weight"]
            found[f"{ours}.out.weight"] = out.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1)
        return found

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        found = {}
        for ours, official in _modules(model):
            for end in _tensors(ours, state_dict):
                found[f"{official}.{end}"] = state_dict[f"{ours}.{end}"]
        for ours, official, heads in _attentions(model):
            if (qkv := state_dict.get(f"{ours}.qkv.weight")) is not None:
                for part, weight in zip("qkv", qkv.chunk(3), strict=True):
                    found[f"{official}.{part}.weight"] = weight
            if (out := state_dict.get(f"{ours}.out.weight")) is not None:
                found[f"{official}.out.weight"] = out.unflatten(1, (heads, -1)).transpose(1, 2).flatten(1)
        return found


def _tensors(module: str, state_dict: Mapping[str, Tensor]) -> list[str]:
    ends = ("weight", "bias", "running_mean", "running_var")
    return [end for end in ends if f"{module}.{end}" in state_dict]


def _modules(model: Any) -> list[tuple[str, str]]:
    """Our name and the official one of every module whose tensors are the same in both."""
    pairs = [("head", "head")]
    if model.numeric:
        pairs += _net("numeric_trunk", "resnet.num")
    for i, name in enumerate(model.text):
        official = TEXT_NAMES.get(name, name)
        pairs += [(f"text_trunks.{i}.embed", f"embed.{official}")]
        pairs += _net(f"text_trunks.{i}.net", f"resnet.{official}")
    for ours, official, _ in _attentions(model):
        pairs += [(f"{ours}.norm", f"{official}.norm"), (f"{ours}.linear", f"{official}.ffn")]
    return pairs


def _net(ours: str, official: str) -> list[tuple[str, str]]:
    pairs = []
    for b, convs in enumerate(CONVS):
        block = f"{ours}.block{b + 1}"
        places = [f"{block}.convs.{i}.conv" for i in range(3)] + [f"{block}.shortcut.conv"]
        pairs += [(place, f"{official}.{conv}") for place, conv in zip(places, convs, strict=False)]
        norms = [f"{block}.norms.{i}" for i in range(3)] + [f"{block}.shortcut_norm"]
        pairs += [(norm, f"{official}.bn{4 * b + i}") for i, norm in enumerate(norms)]
    return pairs


def _attentions(model: Any) -> list[tuple[str, str, int]]:
    """Our name, the official one and the heads of the attention of every group."""
    found = []
    if model.text_attention is not None:
        found.append(("text_attention", "attn.char", model.text_attention.num_heads))
    for i, (name, block) in enumerate(zip(model.numeric, model.numeric_attention, strict=True)):
        official = NUMERIC_NAMES.get(name, f"{name}_num")
        found.append((f"numeric_attention.{i}", f"attn.{official}", block.num_heads))
    return found
