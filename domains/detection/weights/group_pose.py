"""Official checkpoints of Group Pose <-> ours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from domains.detection.models.swin import SWINS
from domains.detection.weights.renamed import DetectionLayout, count_layers, fitted_classes, resnet_name
from zoo.errors import CheckpointError

ENCODER, DECODER = "transformer.encoder.layers", "transformer.decoder.layers"
SWIN = "backbone.0.layers."


class GroupPoseOfficial(DetectionLayout):
    """State dicts of the official program, which lists the heads of the decoder twice."""

    ignored = (
        *DetectionLayout.ignored,
        "transformer.decoder.class_embed.*",
        "transformer.decoder.pose_embed.*",
    )
    renames = (
        (r"backbone\.(patch_embed|layers|norm\d)\.", r"backbone.0.\1."),
        (r"backbone\.(body\.)?", "backbone.0.body."),
        (r"encoder\.(\d+)\.ffn\.fc", rf"{ENCODER}.\1.linear"),
        (r"encoder\.", f"{ENCODER}."),
        (r"decoder\.(\d+)\.(within|across)_attn\.qkv\.", rf"{DECODER}.\1.\2_attn.in_proj_"),
        (r"decoder\.(\d+)\.(within|across)_attn\.out\.", rf"{DECODER}.\1.\2_attn.out_proj."),
        (r"decoder\.(\d+)\.ffn\.fc", rf"{DECODER}.\1.linear"),
        (r"decoder\.", f"{DECODER}."),
        (r"ref_point_head\.", "transformer.decoder.half_pose_ref_point_head."),
        (r"enc_class_embed\.", "transformer.enc_out_class_embed."),
        (r"(enc_\w+|keypoint_embedding|instance_embedding)\.", r"transformer.\1."),
        (r"level_embed", "transformer.level_embed"),
    )

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture."""
        return "transformer.decoder.half_pose_ref_point_head.layers.0.weight" in state_dict

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        num_queries: int = 100,
        nheads: int = 8,
        dropout: float = 0.0,
        dilation: bool = False,
        pe_temperatureH: float = 20,
        pe_temperatureW: float = 20,
        hidden_dim: int | None = None,
        dim_feedforward: int | None = None,
        enc_layers: int | None = None,
        dec_layers: int | None = None,
        enc_n_points: int | None = None,
        dec_n_points: int | None = None,
        num_classes: int | None = None,
        num_body_points: int | None = None,
        num_feature_levels: int | None = None,
        dec_pred_class_embed_share: bool = False,
        dec_pred_pose_embed_share: bool = False,
        transformer_activation: str = "relu",
        two_stage_type: str = "standard",
        two_stage_class_embed_share: bool = False,
        pre_norm: bool = False,
        learnable_tgt_init: bool = False,
        cls_no_bias: bool = False,
    ) -> dict[str, Any]:
        """Everything that shapes tell is read from them. Not in a file, and as published unless given:
        queries, heads, dropout, dilation, the temperature, and whether layers share heads.

        Raises:
            CheckpointError: an option that is not that of the file, or that we do not have.
        """
        if pe_temperatureH != pe_temperatureW:
            raise CheckpointError(
                f"Rows and columns have one temperature, not {pe_temperatureH} and {pe_temperatureW}."
            )
        unpublished = {
            "transformer_activation": transformer_activation != "relu",
            "two_stage_type": two_stage_type != "standard",
            "two_stage_class_embed_share": two_stage_class_embed_share,
            "pre_norm": pre_norm,
            "learnable_tgt_init": learnable_tgt_init,
            "cls_no_bias": cls_no_bias,
        }
        for name in (name for name, set_otherwise in unpublished.items() if set_otherwise):
            raise CheckpointError(f"Models with another {name} than the published ones are not built here.")
        levels, width = state_dict["transformer.level_embed"].shape
        projections = [state_dict[f"input_proj.{i}.0.weight"] for i in range(levels)]
        points = {
            f"{kind}_points": len(state_dict[f"{prefix}.0.{attention}.attention_weights.bias"])
            // (levels * nheads)
            for kind, prefix, attention in (("enc", ENCODER, "self_attn"), ("dec", DECODER, "cross_attn"))
            if f"{prefix}.0.{attention}.attention_weights.bias" in state_dict
        }
        found = points | {
            "num_keypoints": len(state_dict["transformer.keypoint_embedding.weight"]),
            "num_classes": len(state_dict["class_embed.0.weight"]),
            "embed_dim": width,
            "ffn_dim": len(state_dict[f"{DECODER}.0.linear1.weight"]),
            "enc_layers": count_layers(state_dict, f"{ENCODER}."),
            "dec_layers": count_layers(state_dict, f"{DECODER}."),
            "num_levels": levels,
        }
        given = {
            "num_keypoints": num_body_points,
            "num_classes": num_classes,
            "embed_dim": hidden_dim,
            "ffn_dim": dim_feedforward,
            "enc_layers": enc_layers,
            "dec_layers": dec_layers,
            "enc_points": enc_n_points,
            "dec_points": dec_n_points,
            "num_levels": num_feature_levels,
        }
        for name, value in given.items():
            if value is not None and name in found and value != found[name]:
                raise CheckpointError(f"The checkpoint has {name}={found[name]}, not {value}.")
        return found | {
            **_backbone(state_dict, dilation),
            "backbone_levels": sum(weight.shape[-1] == 1 for weight in projections),
            "num_queries": num_queries,
            "num_heads": nheads,
            "dropout": dropout,
            "temperature": float(pe_temperatureH),
            "share_class_head": dec_pred_class_embed_share,
            "share_pose_head": dec_pred_pose_embed_share,
        }

    @classmethod
    def to_official(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """With the second names of the heads."""
        out = super().to_official(state_dict, model)
        heads = {
            name: value for name, value in out.items() if name.startswith(("class_embed.", "pose_embed."))
        }
        return out | {f"transformer.decoder.{name}": value for name, value in heads.items()}

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Heads for other classes start anew."""
        state = dict(state_dict)
        for name in expected:
            if re.fullmatch(r"(class_embed\.\d+|transformer\.enc_out_class_embed)\.bias", name):
                fitted_classes(state, expected, name.removesuffix(".bias"))
        return state


def _backbone(state_dict: dict[str, Tensor], dilation: bool) -> dict[str, Any]:
    """Name and options."""
    if "backbone.0.patch_embed.proj.weight" not in state_dict:
        options = {"dilation": True} if dilation else None
        return {"backbone": resnet_name(state_dict), "backbone_options": options}
    stages = range(count_layers(state_dict, SWIN))
    tables = [state_dict[f"{SWIN}{i}.blocks.0.attn.relative_position_bias_table"] for i in stages]
    sizes = {
        "embed_dim": len(state_dict["backbone.0.patch_embed.proj.weight"]),
        "depths": tuple(count_layers(state_dict, f"{SWIN}{i}.blocks.") for i in stages),
        "num_heads": tuple(table.shape[1] for table in tables),
        "window_size": (math.isqrt(len(tables[0])) + 1) // 2,
    }
    name = next((name for name, published in SWINS.items() if published == sizes), None)
    if name is not None:
        return {"backbone": name, "backbone_options": None}
    return {"backbone": "swin_t", "backbone_options": sizes}
