"""Official checkpoints of Agent-PVT and InLine-PVT <-> ours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout, check_published_attention
from zoo.attention.layers.agent import resized
from zoo.errors import CheckpointError

_TABLE_AXES = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""The axis of an agent's table that goes with the size of the map."""


def _official_name(ours: str) -> str:
    """But for the one matrix of queries, keys and values, which is two there."""
    parts = ours.split(".")
    if parts[0] == "head":
        return ours
    stage, rest = ("1", parts[1:]) if parts[0] == "stem" else (str(int(parts[1]) + 1), parts[3:])
    embeds = parts[0] == "stem" or (stage != "1" and parts[2] == "0")
    if embeds:
        return f"pos_embed{stage}" if rest[0] == "position" else f"patch_embed{stage}.{'.'.join(rest)}"
    return f"block{stage}.{int(parts[2]) - (stage != '1')}.{'.'.join(rest)}"


class PVTOfficial(VisionLayout):
    """What both families share; tables of another size are resized, as for images of another size."""

    first_conv = "patch_embed1.proj.weight"
    same = (
        "num_heads",
        "sr_ratios",
        "img_size",
        "patch_size",
        "embed_dims",
        "mlp_ratios",
        "depths",
        "qkv_bias",
        "num_classes",
        "in_chans",
        "drop_rate",
        "drop_path_rate",
    )

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        check_published_attention(model)
        tensors = {}
        for ours, own in model.state_dict().items():
            name = _official_name(ours)
            if ".qkv." in name:
                parts = [state_dict[name.replace(".qkv.", part)] for part in (".q.", ".kv.")]
                tensors[ours] = torch.cat(parts)
            elif ours.endswith("position"):
                tensors[ours] = state_dict[name].mT.reshape(own.shape)
            else:
                tensors[ours] = state_dict[name]
        return tensors

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        check_published_attention(model)
        out = {}
        for ours, tensor in state_dict.items():
            name = _official_name(ours)
            if ".qkv." in name:
                third = len(tensor) // 3
                out[name.replace(".qkv.", ".q.")], out[name.replace(".qkv.", ".kv.")] = tensor.split(
                    [third, 2 * third]
                )
            elif ours.endswith("position"):
                out[name] = tensor.flatten(2).mT
            else:
                out[name] = tensor
        return {name: tensor.contiguous() for name, tensor in out.items()}

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        state = fitted_tables(super().fitted(state_dict, expected, model), expected)
        shapes = {
            _official_name(name): tensor.shape[2:]
            for name, tensor in model.state_dict().items()
            if name.endswith("position")
        }
        for name, shape in shapes.items():
            table = state.get(name)
            if table is not None and table.shape != expected[name].shape:
                state[name] = _resized_positions(name, table, shape)
        return state


def fitted_tables(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tables of agents, resized where a model has others."""
    for name, tensor in state.items():
        axis = _TABLE_AXES.get(name.rpartition(".")[2])
        if axis is not None and name in expected and tensor.ndim == 5:
            state[name] = resized(tensor, axis, expected[name].shape[axis])
    return state


def _resized_positions(name: str, table: Tensor, shape: Sequence[int]) -> Tensor:
    """Positions `(1, N, C)` of a square map for another one."""
    side = math.isqrt(table.shape[1])
    if side**2 != table.shape[1]:
        raise CheckpointError(
            f"{name} has {table.shape[1]} positions, of a map that is no square: build "
            "the model with its img_size=(height, width)."
        )
    square = table.mT.unflatten(2, (side, side))
    return F.interpolate(square, tuple(shape), mode="bilinear").flatten(2).mT


def _config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """What the tensors of both families tell."""
    numbers = [re.match(r"block(\d+)\.(\d+)\.", name) for name in state_dict]
    blocks = {(int(found[1]), int(found[2])) for found in numbers if found}
    levels = max(stage for stage, _ in blocks)
    dims = [state_dict[f"pos_embed{i}"].shape[2] for i in range(1, levels + 1)]
    hidden = [len(state_dict[f"block{i}.0.mlp.fc1.weight"]) for i in range(1, levels + 1)]
    first = state_dict[PVTOfficial.first_conv]
    side = math.isqrt(state_dict["pos_embed1"].shape[1])
    return {
        "embed_dims": dims,
        "depths": [sum(stage == i for stage, _ in blocks) for i in range(1, levels + 1)],
        "mlp_ratios": [width / dim for width, dim in zip(hidden, dims, strict=True)],
        "qkv_bias": "block1.0.attn.q.bias" in state_dict,
        "patch_size": first.shape[2],
        "in_chans": first.shape[1],
        "num_classes": len(state_dict.get("head.weight", ())),
        "img_size": first.shape[2] * side,
    }


def _digits(ratios: str | Sequence[int] | None) -> list[int] | None:
    """`"1111"`, as the official programs take it, or numbers."""
    return None if ratios is None else [int(ratio) for ratio in ratios]


class AgentPVTOfficial(PVTOfficial):
    """State dicts of Agent-PVT."""

    same = (*PVTOfficial.same, "agent_num")

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        attn_type: str | None = None,
        agent_sr_ratios: str | Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Most is read from the tensors; heads from the tables of agents, where there are any."""
        config = _config(state_dict)
        levels = range(1, 1 + len(config["depths"]))
        tables = {i: state_dict.get(f"block{i}.0.attn.an_bias") for i in levels}
        patches = {i: state_dict.get(f"block{i}.0.attn.sr.weight") for i in levels}
        letters = "".join("B" if table is None else "A" for table in tables.values())
        ratios = [1 if weight is None else weight.shape[2] for weight in patches.values()]
        found: dict[str, Any] = {
            "attn_types": attn_type or letters,
            "agent_num": [9 if t is None else t.shape[1] for t in tables.values()],
            "agent_sr_ratios": _digits(agent_sr_ratios) or ratios,
            "sr_ratios": ratios,
        }
        if "B" not in letters:
            found["num_heads"] = [len(table) for table in tables.values() if table is not None]
        return config | found


class InLinePVTOfficial(PVTOfficial):
    """State dicts of InLine-PVT."""

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        attn_type: str | None = None,
        la_sr_ratios: str | Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Most is read from the tensors; the official program fails with other `la_sr_ratios` than 1."""
        if set(_digits(la_sr_ratios) or [1]) != {1}:
            raise CheckpointError(
                f"la_sr_ratios={la_sr_ratios!r}: the official program itself fails unless 1."
            )
        config = _config(state_dict)
        levels = range(1, 1 + len(config["depths"]))
        groups = {i: state_dict.get(f"block{i}.0.attn.residual.0.weight") for i in levels}
        letters = "".join("B" if weight is None else "I" for weight in groups.values())
        patches = {i: state_dict.get(f"block{i}.0.attn.sr.weight") for i in levels}
        found: dict[str, Any] = {
            "attn_types": attn_type or letters,
            "sr_ratios": [1 if w is None else w.shape[2] for w in patches.values()],
        }
        if "B" not in letters:
            found["num_heads"] = [len(w) // w.shape[1] for w in groups.values() if w is not None]
        return config | found
