"""Official checkpoints of Agent-DeiT and InLine-DeiT <-> ours: DeiT's names, and those of the attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.resizing import resized_table
from domains.vision.weights.pvt import fitted_tables
from domains.vision.weights.renamed import RenamedLayout
from zoo.errors import ConfigError


class DeiTOfficial(RenamedLayout):
    """State dicts of the classifier; tables of another size are resized, as for images of another size."""

    first_conv = "patch_embed.proj.weight"
    same = ("num_heads", "img_size", "num_classes", "drop_rate", "drop_path_rate")
    renames = (
        (r"^stem\.proj", "patch_embed.proj"),
        (r"^stem\.", ""),
        (r"^stages\.(\d+)\.0\.", r"blocks.\1."),
    )

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        state = fitted_tables(super().fitted(state_dict, expected, model), expected)
        table, stem = state.get("pos_embed"), model.stem
        side = 0 if table is None else math.isqrt(table.shape[1] - 1)
        if table is not None and side**2 + 1 == table.shape[1] != expected["pos_embed"].shape[1]:
            map = resized_table(table[:, 1:].mT.unflatten(2, (side, side)), stem.grid)  # type: ignore[arg-type]
            state["pos_embed"] = torch.cat([table[:, :1], map.flatten(2).mT], 1)
        return state

    @staticmethod
    def shared_config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """What the tensors of both families tell."""
        first = state_dict["patch_embed.proj.weight"]
        return {
            "patch_size": first.shape[2],
            "in_chans": first.shape[1],
            "embed_dim": first.shape[0],
            "depth": len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
            "mlp_ratio": len(state_dict["blocks.0.mlp.fc1.weight"]) / first.shape[0],
            "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
            "num_classes": len(state_dict.get("head.weight", ())),
            "img_size": first.shape[2] * math.isqrt(state_dict["pos_embed"].shape[1] - 1),
        }


class AgentDeiTOfficial(DeiTOfficial):
    """State dicts of Agent-DeiT."""

    @staticmethod
    def config(
        state_dict: dict[str, Tensor], *, agent_num: int | Sequence[int] | None = None
    ) -> dict[str, Any]:
        """All but the rates is in the file, if its images were squares."""
        heads, agents = state_dict["blocks.0.attn.an_bias"].shape[:2]
        if not isinstance(agent_num, int | None) and set(agent_num) != {agents}:
            raise ConfigError(f"agent_num={agent_num}: blocks that differ in their agents are not here.")
        found = {"agent_num": agent_num if isinstance(agent_num, int) else agents, "num_heads": heads}
        return DeiTOfficial.shared_config(state_dict) | found


class InLineDeiTOfficial(DeiTOfficial):
    """State dicts of InLine-DeiT."""

    @staticmethod
    def config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """All but the rates is in the file, if its images were squares."""
        groups = state_dict["blocks.0.attn.residual.0.weight"]
        return DeiTOfficial.shared_config(state_dict) | {"num_heads": len(groups) // groups.shape[1]}
