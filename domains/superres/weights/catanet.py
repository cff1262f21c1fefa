"""Official CATANet checkpoints <-> ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.formats import PREFIXES
from zoo.weights.official import OfficialLayout

MODULES = {
    "tokens.norm": "0.norm",
    "tokens.proj": "0.iasa_attn.proj",
    "tokens.merge": "0.conv1x1",
    "tokens.mlp.norm": "0.mlp.norm",
    "tokens.mlp.fc1": "0.mlp.fn.fc1",
    "tokens.mlp.dwconv": "0.mlp.fn.dwconv.depthwise_conv.0",
    "tokens.mlp.fc2": "0.mlp.fn.fc2",
    "local.norm": "1.layer.0.norm",
    "local.proj": "1.layer.0.fn.proj",
    "local.mlp.norm": "1.layer.1.norm",
    "local.mlp.fc1": "1.layer.1.fn.fc1",
    "local.mlp.dwconv": "1.layer.1.fn.dwconv.depthwise_conv.0",
    "local.mlp.fc2": "1.layer.1.fn.fc2",
}
"""Modules of a block, ours and the official ones."""
FUSED = {
    "tokens.qkv": ("0.iasa_attn.to_q", "0.iasa_attn.to_k", "0.iasa_attn.to_v"),
    "tokens.centre_kv": ("0.irca_attn.to_k", "0.irca_attn.to_v"),
    "local.qkv": ("1.layer.0.fn.to_q", "1.layer.0.fn.to_k", "1.layer.0.fn.to_v"),
}
"""Projections that are one matrix here."""


class CATANetOfficial(OfficialLayout):
    """State dicts of BasicSR files; `read_state_dict` takes `params_ema` or `params` out of the file."""

    wrapper = "params"

    @staticmethod
    def matches(state_dict: Mapping[str, Tensor]) -> bool:
        """Whether a file is of this architecture."""
        return any(name.endswith("blocks.0.0.means") for name in state_dict)

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the prefix of wrappers, and with `initted` as a number without axes."""
        out = {}
        for name, value in state_dict.items():
            for prefix in PREFIXES:
                name = name.removeprefix(prefix)
            out[name] = value.reshape(()) if name.endswith(".initted") and value.numel() == 1 else value
        return out

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        setting: Mapping[str, Any] | None = None,
        in_chans: int | None = None,
        n_iters: Sequence[int] | None = None,
        num_tokens: Sequence[int] | None = None,
        group_size: Sequence[int] | None = None,
        upscale: int | None = None,
    ) -> dict[str, Any]:
        """Widths, blocks, token centres and scale are read from the tensors; heads (`setting.heads`), patches
        (`setting.patch_size`), groups and iterations are not in a file, and are the published ones unless
        they are given.

        Raises:
            CheckpointError: `upscale` is not the scale of the file.
        """
        scale = scale_of(state_dict)
        if upscale not in (None, scale):
            raise CheckpointError(f"The checkpoint enlarges {scale} times, not upscale={upscale}.")
        means = sorted(_blocks(state_dict))
        first_conv, query = state_dict["first_conv.weight"], state_dict["blocks.0.0.iasa_attn.to_q.weight"]
        given = {
            "num_heads": (setting or {}).get("heads"),
            "patch_sizes": (setting or {}).get("patch_size"),
            "n_iters": n_iters,
            "group_sizes": group_size,
        }
        return {
            "scale": scale,
            "dim": len(first_conv),
            "in_chans": first_conv.shape[1],
            "qk_dim": len(query),
            "mlp_dim": len(state_dict["blocks.0.0.mlp.fn.fc1.weight"]),
            "num_tokens": [len(state_dict[f"blocks.{i}.0.means"]) for i in means],
        } | {name: value for name, value in given.items() if value is not None}

    @staticmethod
    def to_zoo(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        return {
            ours: _one([state_dict[name] for name in official]) for ours, official in _names(model).items()
        }

    @staticmethod
    def to_official(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for ours, official in _names(model).items():
            if ours in state_dict:
                value = state_dict[ours]
                value = value[:, :, None, None] if ".merge." in ours else value
                out |= dict(zip(official, _parts(value, len(official)), strict=True))
        return out

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Raises `CheckpointError` for a file of another scale, naming both."""
        if cls.matches(state_dict) and (scale := scale_of(state_dict)) != scale_of(expected):
            raise CheckpointError(
                f"The checkpoint enlarges {scale} times, the model {scale_of(expected)} times. Use "
                f"catanet_x{scale}, or `zoo finetune model=catanet_x{scale} checkpoint=FILE "
                f"data.scale={scale_of(expected)}`, which starts from all but the up-sampler."
            )
        return state_dict


def scale_of(state_dict: Mapping[str, Tensor]) -> int:
    """The scale that an official file is for."""
    if "upconv1.weight" in state_dict:
        return 4
    if "upconv.weight" not in state_dict:
        return 1
    rows, dim = state_dict["upconv.weight"].shape[:2]
    return round((rows / dim) ** 0.5)


def _names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Our tensor names -> the official tensors that they hold, one after the other."""
    up = ["upconv1", "upconv2"] if model.scale == 4 else ["upconv"]
    names = {}
    for ours in model.state_dict():
        module, _, kind = ours.rpartition(".")
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
        if block is None:
            official = up[int(module[-1])] if module.startswith("upsampler.") else module
            names[ours] = (f"{official}.{kind}",)
            continue
        i, part = block.groups()
        if part.startswith("local.layer"):
            raise CheckpointError(
                "No official CATANet has attention=...: such weights are read and written in our own layout "
                "(zoo.save_model, zoo.load_model) only."
            )
        if part == "conv":
            names[ours] = (f"mid_convs.{i}.{kind}",)
        elif part == "tokens":
            names[ours] = (f"blocks.{i}.0.{kind}",)
        else:
            theirs = FUSED[part] if part in FUSED else (MODULES[part],)
            names[ours] = tuple(f"blocks.{i}.{name}.{kind}" for name in theirs)
    return names


def _one(tensors: list[Tensor]) -> Tensor:
    if len(tensors) > 1:
        return torch.cat(tensors)
    (tensor,) = tensors
    return tensor.flatten(1) if tensor.ndim == 4 and tensor.shape[2:] == (1, 1) else tensor


def _parts(value: Tensor, count: int) -> list[Tensor]:
    """The inverse: keys and queries have one width, values that of the model, which is the second axis."""
    if count == 1:
        return [value]
    width = (len(value) - value.shape[1]) // (count - 1)
    return list(value.split([*[width] * (count - 1), value.shape[1]]))


def _blocks(state_dict: Mapping[str, Tensor]) -> list[int]:
    found = (re.fullmatch(r"blocks\.(\d+)\.0\.means", name) for name in state_dict)
    return [int(match[1]) for match in found if match]
