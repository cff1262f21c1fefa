"""Official LITv2 checkpoints <-> ours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout, check_published_attention, counters

_MERGING = {"conv": "dconv", "offset": "dconv.conv_offset", "norm": "norm_layer"}


def _official_name(ours: str) -> str:
    parts = ours.split(".")
    if parts[0] == "stem":
        return f"patch_embed.{'proj' if parts[1] == 'conv' else 'norm'}.{parts[2]}"
    if parts[0] != "stages":
        return ours
    stage, number, rest = int(parts[1]), int(parts[2]), ".".join(parts[3:])
    if stage and number == 0:
        return f"layers.{stage - 1}.downsample.{_MERGING[parts[3]]}.{parts[4]}"
    rest = rest.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
    return f"layers.{stage}.blocks.{number - (stage > 0)}.{rest}"


def _names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> official ones."""
    check_published_attention(model)
    names = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    return {name: _official_name(name) for name in names}


class LITv2Official(VisionLayout):
    """State dicts of the classifier."""

    first_conv = "patch_embed.proj.weight"

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        num_heads: Sequence[int] | None = None,
        alpha: float | None = None,
        local_ws: Sequence[int] | None = None,
        img_size: int | None = None,
        embed_dim: int | None = None,
        depths: Sequence[int] | None = None,
        mlp_ratio: float | None = None,
        qkv_bias: bool | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
    ) -> dict[str, Any]:
        """Heads, alpha and windows are not in the tensors: without their options those of the named variant
        are taken."""
        numbers = [re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name) for name in state_dict]
        blocks = {(int(found[1]), int(found[2])) for found in numbers if found}
        levels = 1 + max(stage for stage, _ in blocks)
        dim, channels = state_dict["patch_embed.proj.weight"].shape[:2]
        attends = [f"layers.{i}.blocks.0.norm1.weight" in state_dict for i in range(levels)]
        biased = any(name.endswith(("l_q.bias", "h_qkv.bias")) for name in state_dict)
        config: dict[str, Any] = {
            "embed_dim": embed_dim or dim,
            "depths": depths or [sum(stage == i for stage, _ in blocks) for i in range(levels)],
            "mlp_ratio": mlp_ratio or len(state_dict["layers.0.blocks.0.mlp.fc1.weight"]) / dim,
            "in_chans": in_chans or channels,
            "num_classes": num_classes or len(state_dict.get("head.weight", ())),
        }
        if any(attends):
            config["qkv_bias"] = biased if qkv_bias is None else qkv_bias
        given = {
            "num_heads": num_heads,
            "alpha": alpha,
            "local_ws": local_ws and [size * has for size, has in zip(local_ws, attends, strict=True)],
            "img_size": img_size,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
        }
        return config | {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        tensors = {ours: state_dict[name] for ours, name in _names(model).items()}
        return tensors | counters(tensors)

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        tensors = {name: state_dict[ours] for ours, name in _names(model).items() if ours in state_dict}
        return tensors | counters(tensors)
