"""Checkpoints of DaViT <-> ours: timm's names, those of the official program, and those of Florence-2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from domains.vision.weights.layout import VisionLayout, check_published_attention
from zoo.errors import ConfigError

PAIRS = {"kv": ("0", "1"), "qk": ("spatial_block", "channel_block")}
"""What timm calls the two blocks of a pair, by the affinity of channels; `qk` is that of Florence-2."""

_OFFICIAL = (
    (r"^patch_embeds\.(\d+)\.", r"stages.\1.downsample."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^head\.", "head.fc."),
    (r"^norms\.", "head.norm."),
)
_FLORENCE = (
    (r"^vision_tower\.convs\.(\d+)\.", r"stages.\1.downsample."),
    (r"^vision_tower\.blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.(window|channel)_attn\.norm\.", ".norm1."),
    (r"\.(window|channel)_attn\.fn\.", ".attn."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".mlp."),
    (r"\.conv([12])\.fn\.dw\.", r".cpe\1.proj."),
)
_BOTH = ((r"\.downsample\.proj\.", ".downsample.conv."), (r"^stages\.0\.downsample\.", "stem."))
"""Patterns in the names of other programs and what timm has in their place, one after the other."""


def _official_name(ours: str, pair: tuple[str, str]) -> str:
    parts = ours.split(".")
    if parts[0] in ("head", "pre_head"):
        return f"head.{'fc' if parts[0] == 'head' else 'norm'}.{parts[1]}"
    if parts[0] != "stages":
        return ours
    stage, number, rest = parts[1], int(parts[2]), ".".join(parts[3:])
    if stage != "0":
        if number == 0:
            return f"stages.{stage}.downsample.{rest}"
        number -= 1
    rest = re.sub(r"^(cpe\d)\.", r"\1.proj.", rest)
    return f"stages.{stage}.blocks.{number // 2}.{pair[number % 2]}.{rest}"


def _names(model: nn.Module) -> dict[str, str]:
    """Our tensor names -> timm's."""
    check_published_attention(model)
    pair = PAIRS[str(model.affinity)]
    return {name: _official_name(name, pair) for name in model.state_dict()}


class DaViTOfficial(VisionLayout):
    """State dicts of timm's DaViT."""

    first_conv = "stem.conv.weight"

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The names of the official program, and of Florence-2 without its language model, as timm's."""
        if any(name.startswith("vision_tower.") for name in state_dict):
            state_dict = {n: t for n, t in state_dict.items() if n.startswith("vision_tower.")}
            return _renamed(state_dict, (*_FLORENCE, *_BOTH))
        if any(name.startswith("patch_embeds.") for name in state_dict):
            return _renamed(state_dict, (*_OFFICIAL, *_BOTH))
        return VisionLayout.canonical(state_dict)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        depths: Sequence[int] | None = None,
        embed_dims: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        window_size: int | None = None,
        mlp_ratio: float | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        drop_path_rate: float | None = None,
        drop_rate: float | None = None,
        attn_types: Sequence[str] = ("spatial", "channel"),
        ffn: bool = True,
        cpe_act: bool = False,
        head_norm_first: bool = False,
        down_kernel_size: int | None = None,
        channel_attn_v2: bool | None = None,
        named_blocks: bool | None = None,
    ) -> dict[str, Any]:
        """Widths and depths are read from the tensors, heads from their options: by default 32 channels."""
        unused = {
            "attn_types": tuple(attn_types) != ("spatial", "channel"),
            "ffn": not ffn,
            "cpe_act": cpe_act,
            "head_norm_first": head_norm_first,
        }
        if any(unused.values()):
            wrong = ", ".join(name for name, used in unused.items() if used)
            raise ConfigError(f"No published DaViT uses {wrong} this way, and this one cannot.")
        florence = any(".spatial_block." in name for name in state_dict)
        if named_blocks not in (None, florence) or channel_attn_v2 not in (None, florence):
            raise ConfigError(
                "named_blocks and channel_attn_v2 go together: the towers of Florence-2 have both."
            )
        numbers = [re.match(r"stages\.(\d+)\.blocks\.(\d+)\.", name) for name in state_dict]
        blocks = {(int(found[1]), int(found[2])) for found in numbers if found}
        levels = 1 + max(stage for stage, _ in blocks)
        first = "spatial_block" if florence else "0"
        dims = [len(state_dict[f"stages.{i}.blocks.0.{first}.norm1.weight"]) for i in range(levels)]
        hidden = len(state_dict[f"stages.0.blocks.0.{first}.mlp.fc1.weight"])
        config: dict[str, Any] = {
            "depths": depths or [sum(stage == i for stage, _ in blocks) for i in range(levels)],
            "embed_dims": embed_dims or dims,
            "num_heads": num_heads or [max(1, dim // 32) for dim in dims],
            "mlp_ratio": mlp_ratio or hidden / dims[0],
            "affinity": "qk" if florence else "kv",
            "in_chans": in_chans or state_dict["stem.conv.weight"].shape[1],
            "num_classes": num_classes or len(state_dict.get("head.fc.weight", ())),
        }
        if levels > 1:
            config["down_kernel_size"] = (
                down_kernel_size or state_dict["stages.1.downsample.conv.weight"].shape[-1]
            )
        given = {"window_size": window_size, "drop_path_rate": drop_path_rate, "drop_rate": drop_rate}
        return config | {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {ours: state_dict[name] for ours, name in _names(model).items()}

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {name: state_dict[ours] for ours, name in _names(model).items() if ours in state_dict}


def _renamed(state_dict: dict[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
