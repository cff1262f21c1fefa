"""Official MALA checkpoints <-> ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.weights.renamed import RenamedLayout
from zoo.errors import CheckpointError

PATCHES = (0, 3, 6, 9)
"""Places of the convolutions in the official stem; the norms follow them."""


class MALAOfficial(RenamedLayout):
    """State dicts of the classifier. The angles of the rotary positions, which they hold, are constants."""

    first_conv = "patch_embed.proj.0.weight"
    head = ("head.*", "proj.*", "norm.*")
    renames = (
        (r"^stem\.(\d+)\.conv", lambda m: f"patch_embed.proj.{PATCHES[int(m[1]) // 2]}"),
        (r"^stem\.(\d+)\.norm", lambda m: f"patch_embed.proj.{PATCHES[int(m[1]) // 2] + 1}"),
        (r"^stages\.(\d+)\.0\.conv", lambda m: f"layers.{int(m[1]) - 1}.downsample.reduction"),
        (r"^stages\.(\d+)\.0\.norm\.", lambda m: f"layers.{int(m[1]) - 1}.downsample.norm."),
        (r"^stages\.(\d+)\.(\d+)", lambda m: f"layers.{m[1]}.blocks.{int(m[2]) - (m[1] != '0')}"),
        (r"norm([12])\.", r"norm\1.norm."),
        (r"gamma([12])", r"gamma_\1"),
        (r"^pre_head\.0\.conv", "proj"),
        (r"^pre_head\.0\.norm", "norm"),
    )
    maps = ("*.qkvo.weight", "*.attn.proj.weight", "*.fc[12].weight", "head.weight")
    vectors = ("*.gamma_[12]",)

    @classmethod
    def constants(cls, model: nn.Module) -> dict[str, Tensor]:
        return {f"layers.{i}.RoPE.angle": rotary_angles(width) for i, width in enumerate(model.head_dims)}  # type: ignore[arg-type]

    @classmethod
    def to_zoo(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        for name, angles in cls.constants(model).items():
            if name in state_dict and not torch.allclose(state_dict[name].cpu(), angles, rtol=1e-4):
                raise CheckpointError(f"{name} does not hold the angles of MALA, 10000^-linspace(0, 1).")
        return super().to_zoo(state_dict, model)

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        in_chans: int | None = None,
        num_classes: int | None = None,
        embed_dims: Sequence[int] | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        mlp_ratios: Sequence[float] | None = None,
        projection: int | None = None,
        layerscales: Sequence[bool] | None = None,
        layer_init_values: float | Sequence[float] | None = None,
        drop_path_rate: float | None = None,
    ) -> dict[str, Any]:
        """All but drop_path_rate is in the file: the angles tell the width of heads."""
        stages = range(sum(name.endswith(".RoPE.angle") for name in state_dict))
        weights = [state_dict[f"layers.{i}.blocks.0.ffn.fc1.weight"] for i in stages]
        dims = [weight.shape[1] for weight in weights]
        widths = [2 * len(state_dict[f"layers.{i}.RoPE.angle"]) for i in stages]
        scaled = [f"layers.{i}.blocks.0.gamma_1" in state_dict for i in stages]
        config: dict[str, Any] = {
            "in_chans": state_dict[MALAOfficial.first_conv].shape[1],
            "embed_dims": dims,
            "depths": [_blocks(state_dict, i) for i in stages],
            "num_heads": [dim // width for dim, width in zip(dims, widths, strict=True)],
            "mlp_ratios": [len(weight) / dim for weight, dim in zip(weights, dims, strict=True)],
            "layer_scales": [1.0 if found else None for found in scaled],
        }
        if "head.weight" in state_dict:
            classes, width = state_dict["head.weight"].shape[:2]
            config |= {"num_classes": classes, "projection": width}
        else:
            config["num_classes"] = 0
        asked = {
            "in_chans": in_chans,
            "num_classes": num_classes,
            "embed_dims": embed_dims,
            "depths": depths,
            "num_heads": num_heads,
            "mlp_ratios": mlp_ratios,
            "projection": projection,
            "drop_path_rate": drop_path_rate,
        }
        if layer_init_values is not None or layerscales is not None:
            flags = scaled if layerscales is None else layerscales
            values = layer_init_values if isinstance(layer_init_values, Sequence) else [layer_init_values] * 4
            asked["layer_scales"] = [
                (1.0 if value is None else value) if flag else None
                for flag, value in zip(flags, values, strict=True)
            ]
        return config | {name: value for name, value in asked.items() if value is not None}


def _blocks(state_dict: dict[str, Tensor], stage: int) -> int:
    prefix = f"layers.{stage}.blocks."
    return len({name.removeprefix(prefix).split(".")[0] for name in state_dict if name.startswith(prefix)})


def rotary_angles(width: int) -> Tensor:
    """Of the channels of one axis, for heads of this width, `(width / 2,)`: each for a pair of channels."""
    return (10_000.0 ** -torch.linspace(0, 1, width // 4)).repeat_interleave(2)
