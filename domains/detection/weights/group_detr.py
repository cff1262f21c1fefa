"""Official checkpoints of Conditional and Group DETR <-> ours."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from domains.detection.weights import openmmlab
from domains.detection.weights.renamed import (
    DetectionLayout,
    count_layers,
    fitted_classes,
    fitted_queries,
    resnet_name,
)
from zoo.errors import CheckpointError

ENCODER, DECODER = "transformer.encoder.layers", "transformer.decoder.layers"
PUBLISHED_QUERIES = 300
POSITIONS = {"v2": "sine", "v3": "learned"}
"""Further names of the official option."""


class GroupDETROfficial(DetectionLayout):
    """State dicts of both programs; Conditional DETR is the case of one group. mmdet's are read as well."""

    others: ClassVar[dict[str, str]] = {"mmdet": "domains.detection.weights.openmmlab:exported"}
    renames = (
        (r"backbone\.", "backbone.0.body."),
        (r"position\.", "backbone.1."),
        (r"encoder\.(\d+)\.attention\.qkv\.", rf"{ENCODER}.\1.self_attn.in_proj_"),
        (r"encoder\.(\d+)\.attention\.out\.", rf"{ENCODER}.\1.self_attn.out_proj."),
        (r"encoder\.(\d+)\.ffn\.fc", rf"{ENCODER}.\1.linear"),
        (r"encoder\.", f"{ENCODER}."),
        (
            r"decoder\.layers\.(\d+)\.self_attention\.content\.",
            rf"{DECODER}.\1.sa_{{qcontent|kcontent|v}}_proj.",
        ),
        (r"decoder\.layers\.(\d+)\.self_attention\.pos\.", rf"{DECODER}.\1.sa_{{qpos|kpos}}_proj."),
        (r"decoder\.layers\.(\d+)\.self_attention\.out\.", rf"{DECODER}.\1.self_attn.out_proj."),
        (
            r"decoder\.layers\.(\d+)\.cross_attention\.kv_content\.",
            rf"{DECODER}.\1.ca_{{kcontent|v}}_proj.",
        ),
        (r"decoder\.layers\.(\d+)\.cross_attention\.q_sine\.", rf"{DECODER}.\1.ca_qpos_sine_proj."),
        (r"decoder\.layers\.(\d+)\.cross_attention\.out\.", rf"{DECODER}.\1.cross_attn.out_proj."),
        (r"decoder\.layers\.(\d+)\.cross_attention\.(\w)_(\w+)\.", rf"{DECODER}.\1.ca_\2\3_proj."),
        (r"decoder\.layers\.(\d+)\.ffn\.fc", rf"{DECODER}.\1.linear"),
        (r"decoder\.", "transformer.decoder."),
    )

    @classmethod
    def official(cls, name: str) -> list[str]:
        if re.match(r"encoder\.\d+\.attention\.layer\.", name):
            raise CheckpointError(
                "No official Group DETR has attention=...: such weights are kept in our own layout "
                "(zoo.save_model, zoo.load_model) only."
            )
        return super().official(name)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of mmdet's own Conditional DETR."""
        return openmmlab.to_official(state_dict) if openmmlab.is_mmdet(state_dict) else state_dict

    @staticmethod
    def facts(model: nn.Module, metadata: Mapping[str, str]) -> dict[str, Any]:
        return openmmlab.facts_of(json.loads(metadata["classes"])) if "classes" in metadata else {}

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture (DAB-DETR has the same layers, but boxes as queries)."""
        return f"{DECODER}.0.sa_qcontent_proj.weight" in state_dict and "query_embed.weight" in state_dict

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        group_detr: int | None = None,
        num_queries: int | None = None,
        num_classes: int | None = None,
        backbone: str | None = None,
        dilation: bool = False,
        hidden_dim: int | None = None,
        nheads: int = 8,
        enc_layers: int | None = None,
        dec_layers: int | None = None,
        dim_feedforward: int | None = None,
        dropout: float = 0.1,
        position_embedding: str | None = None,
        pre_norm: bool = False,
    ) -> dict[str, Any]:
        """Everything that shapes tell is read from them. Not in a file: dilation, heads, dropout, and how
        many groups the queries are; without `group_detr` and `num_queries` groups of 300 if they can be.

        Raises:
            CheckpointError: an option that is not that of the file, or that no published model has.
        """
        if pre_norm:
            raise CheckpointError("The official decoder has its norms after the branches: pre_norm=False.")
        rows, width = state_dict["query_embed.weight"].shape
        queries, groups = _queries(rows, num_queries, group_detr)
        found = {
            "num_classes": len(state_dict["class_embed.weight"]),
            "backbone": resnet_name(state_dict),
            "embed_dim": width,
            "enc_layers": count_layers(state_dict, f"{ENCODER}."),
            "dec_layers": count_layers(state_dict, f"{DECODER}."),
            "ffn_dim": len(state_dict[f"{DECODER}.0.linear1.weight"]),
            "position": "learned" if "backbone.1.row_embed.weight" in state_dict else "sine",
        }
        given = {
            "num_classes": num_classes,
            "backbone": backbone,
            "embed_dim": hidden_dim,
            "enc_layers": enc_layers,
            "dec_layers": dec_layers,
            "ffn_dim": dim_feedforward,
            "position": POSITIONS.get(position_embedding or "", position_embedding),
        }
        for name, value in given.items():
            if value not in (None, found[name]):
                raise CheckpointError(f"The checkpoint has {name}={found[name]}, not {value}.")
        free = {"dilation": dilation, "num_heads": nheads, "dropout": dropout}
        return found | free | {"num_queries": queries, "groups": groups}

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """For another number of groups see `fitted_queries`; a head for other classes starts anew."""
        state = dict(state_dict)
        fitted_classes(state, expected, "class_embed")
        if "query_embed.weight" in state:
            state["query_embed.weight"] = fitted_queries(
                state["query_embed.weight"],
                expected["query_embed.weight"],
                int(model.num_queries),  # pyright: ignore[reportArgumentType]
                "The checkpoint",
            )
        return state


def _queries(rows: int, num_queries: int | None, groups: int | None) -> tuple[int, int]:
    """N and G of N G rows."""
    if num_queries is None and groups is None:
        num_queries = PUBLISHED_QUERIES if rows % PUBLISHED_QUERIES == 0 else rows
    if num_queries is None:
        num_queries = rows // (groups or 1)
    groups = rows // num_queries if groups is None else groups
    if num_queries * groups != rows:
        raise CheckpointError(
            f"The checkpoint has {rows} queries, not {groups} group{'s' * (groups > 1)} of {num_queries}."
        )
    return num_queries, groups
