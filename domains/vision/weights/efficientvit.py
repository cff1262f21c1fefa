"""EfficientViT: names of the official program (microsoft/Cream) and of timm <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.models.efficientvit_blocks import resized_table
from domains.vision.weights.layout import VisionLayout
from zoo.errors import CheckpointError

_PARTS = (
    (r"^stem\.(\d+)", lambda m: f"patch_embed.{2 * int(m[1])}"),
    (r"^stages\.(\d+)", lambda m: f"blocks{int(m[1]) + 1}"),
    (r"attention\.cascade\.heads\.(\d+)\.qkv", r"mixer.m.attn.qkvs.\1"),
    (r"attention\.cascade\.heads\.(\d+)\.query", r"mixer.m.attn.dws.\1"),
    (r"attention\.cascade\.proj", r"mixer.m.attn.proj.1"),
    (r"attention\.cascade\.table", r"mixer.m.attn.attention_biases"),
    (r"attention\.cascade\.offsets", r"mixer.m.attn.attention_bias_idxs"),
    (r"depthwise_(\d)\.conv", lambda m: f"dw{int(m[1]) - 1}.m"),
    (r"ffn_(\d)", lambda m: f"ffn{int(m[1]) - 1}.m"),
    (r"\.depthwise\.conv", r".0.m"),
    (r"\.ffn\.", r".1.m."),
    (r"\.m\.expand", r".m.pw1"),
    (r"\.m\.reduce", r".m.pw2"),
    (r"\.gate\.reduce", r".se.fc1"),
    (r"\.gate\.expand", r".se.fc2"),
    (r"(blocks\d\.1)\.expand", r"\1.conv1"),
    (r"(blocks\d\.1)\.stride", r"\1.conv2"),
    (r"(blocks\d\.1)\.reduce", r"\1.conv3"),
    (r"^head\.label\.", r"head."),
    (r"^head\.teacher\.", r"head_dist."),
    (r"\.linear\.", r".l."),
    (r"\.conv\.", r".c."),
    (r"\.norm\.", r".bn."),
)
"""From our names to the official ones, one after the other."""

_TIMM = (
    (r"^patch_embed\.conv(\d)", lambda m: f"patch_embed.{2 * int(m[1]) - 2}"),
    (r"^stages\.0\.blocks", r"blocks1"),
    (r"^stages\.(\d+)\.blocks\.(\d+)", lambda m: f"blocks{int(m[1]) + 1}.{int(m[2]) + 3}"),
    (r"^stages\.(\d+)\.downsample\.res1", lambda m: f"blocks{int(m[1]) + 1}.0"),
    (r"^stages\.(\d+)\.downsample\.patchmerge", lambda m: f"blocks{int(m[1]) + 1}.1"),
    (r"^stages\.(\d+)\.downsample\.res2", lambda m: f"blocks{int(m[1]) + 1}.2"),
    (r"\.linear\.", r".l."),
    (r"\.conv\.", r".c."),
)
"""From timm's names to the official ones."""

_TO_TIMM = (
    (r"^patch_embed\.(\d)", lambda m: f"patch_embed.conv{int(m[1]) // 2 + 1}"),
    (r"^blocks1\.", r"stages.0.blocks."),
    (r"^blocks(\d)\.0\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.res1."),
    (r"^blocks(\d)\.1\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.patchmerge."),
    (r"^blocks(\d)\.2\.", lambda m: f"stages.{int(m[1]) - 1}.downsample.res2."),
    (r"^blocks(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{int(m[2]) - 3}."),
    (r"\.l\.", r".linear."),
    (r"\.c\.", r".conv."),
)


class EfficientViTOfficial(VisionLayout):
    """Checkpoints of the classifiers and of the detectors' backbones.

    Files with timm's names, of whole detectors, and old ones with matrices for 1x1 convolutions are read too.
    """

    ignored = ("*.attention_bias_idxs",)
    optional = ("*.num_batches_tracked",)
    first_conv = "patch_embed.0.c.weight"
    head = ("head.*", "head_dist.*")

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(".op_list." in name or ".context_module." in name for name in state_dict):
            raise CheckpointError(
                "This checkpoint is of the EfficientViT of MIT Han Lab: another model of the same name."
            )
        state = {
            name.removeprefix("backbone."): tensor
            for name, tensor in state_dict.items()
            if name.startswith("backbone.") or "backbone.patch_embed.0.c.weight" not in state_dict
        }
        if any(name.startswith("stages.0.blocks.") for name in state):
            state = {_renamed(name, _TIMM): tensor for name, tensor in state.items()}
        return {
            name: tensor[:, :, None, None] if name.endswith(".c.weight") and tensor.ndim == 2 else tensor
            for name, tensor in state.items()
        }

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        img_size: int | Sequence[int] = 224,
        window_size: Sequence[int] = (7, 7, 7),
        patch_size: int = 16,
        in_chans: int | None = None,
        num_classes: int | None = None,
        embed_dim: Sequence[int] | None = None,
        key_dim: Sequence[int] | None = None,
        depth: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        kernels: Sequence[int] | None = None,
        distillation: bool | None = None,
    ) -> dict[str, Any]:
        """All but `img_size` and `window_size` is read from the tensors; what is told has to agree."""
        found = _read(state_dict)
        told = {
            "patch_size": (patch_size, 16),
            "in_chans": (in_chans, found["in_chans"]),
            "num_classes": (num_classes, found.get("num_classes", num_classes)),
            "embed_dim": (embed_dim, found["dims"]),
            "key_dim": (key_dim, found["key_dim"]),
            "depth": (depth, found["depths"]),
            "num_heads": (num_heads, found["num_heads"]),
            "kernels": (kernels and kernels[: len(found["kernels"])], found["kernels"]),
            "distillation": (distillation, found["distillation"]),
        }
        for option, (value, own) in told.items():
            if value is not None and (value if isinstance(value, int) else list(value)) != own:
                raise CheckpointError(f"The checkpoint has {option} = {own}, not {value}.")
        windows = found.pop("windows")
        sizes = list(window_size)[: len(windows)]
        if "num_classes" not in found:  # a detector's backbone, unless its windows are those of a classifier
            found |= {"features_only": True} if windows == sizes else {"num_classes": 0}
        return found | {
            "img_size": img_size,
            "window_size": sizes,
            "shrink_windows": windows != sizes,
        }

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for ours, own in model.state_dict().items():
            tensor = state_dict.get(official_name(ours))
            if tensor is None:  # an optional counter
                tensor = torch.zeros_like(own)
            out[ours] = tensor.reshape(own.shape)
        return out

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for ours, tensor in state_dict.items():
            gate = ours.endswith(".weight") and ".gate." in ours
            out[official_name(ours)] = tensor[:, :, None, None] if gate else tensor
            attention = ours.removesuffix(".table")
            if ours.endswith(".table") and f"{attention}.proj.norm.running_mean" in state_dict:
                offsets = model.get_buffer(f"{attention}.offsets")
                out[official_name(f"{attention}.offsets")] = offsets
        return out

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Position tables are interpolated, bicubic, to windows of another size."""
        state = super().fitted(state_dict, expected, model)
        for name, own in expected.items():
            if name.endswith(".attention_biases") and name in state and state[name].shape != own.shape:
                state[name] = resized_table(state[name], round(own.shape[1] ** 0.5))
        return state


def official_name(ours: str) -> str:
    """Of a tensor of our model."""
    return _renamed(ours, _PARTS)


def to_timm(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `zoo.to_official` gives, under the names of timm's `efficientvit_m0` to `m5`."""
    return {
        _renamed(name, _TO_TIMM): tensor
        for name, tensor in official.items()
        if not name.endswith(".attention_bias_idxs")
    }


def _renamed(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _read(state_dict: dict[str, Tensor]) -> dict[str, Any]:
    """The arguments of the model that the tensors tell, and the sides of the windows."""
    in_chans = state_dict["patch_embed.0.c.weight"].shape[1]
    tables: dict[str, list[Tensor]] = {}
    for name, tensor in state_dict.items():
        if name.endswith(".attention_biases"):
            tables.setdefault(name.split(".")[0], []).append(tensor)
    if not tables:
        raise KeyError("blocks1.0.mixer.m.attn.attention_biases")
    stages = sorted(tables)
    firsts = {stage: f"{stage}.{3 * (stage != 'blocks1')}" for stage in stages}
    heads = [len(tables[stage][0]) for stage in stages]
    widest = firsts[stages[heads.index(max(heads))]]
    found = {
        "dims": [len(state_dict[f"{first}.dw0.m.c.weight"]) for first in firsts.values()],
        "depths": [len(tables[stage]) for stage in stages],
        "num_heads": heads,
        "kernels": [
            state_dict[f"{widest}.mixer.m.attn.dws.{i}.c.weight"].shape[-1] for i in range(max(heads))
        ],
        "key_dim": [len(state_dict[f"{first}.mixer.m.attn.dws.0.c.weight"]) for first in firsts.values()],
        "in_chans": in_chans,
        "distillation": "head_dist.l.weight" in state_dict,
        "windows": [round(tables[stage][0].shape[1] ** 0.5) for stage in stages],
    }
    if "head.l.weight" in state_dict:
        found["num_classes"] = len(state_dict["head.l.weight"])
    return found
