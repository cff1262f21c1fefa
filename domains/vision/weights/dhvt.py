"""Official DHVT checkpoints <-> ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.weights.renamed import RenamedLayout
from zoo.errors import ConfigError


class DHVTOfficial(RenamedLayout):
    """State dicts of the classifier."""

    first_conv = "patch_embed.proj.0.0.weight"
    same = (
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "drop_rate",
        "drop_path_rate",
    )
    renames = (
        (r"^stem\.cls_token", "cls_token"),
        (r"^stem\.convs\.(\d+)\.conv", r"patch_embed.proj.\1.0"),
        (r"^stem\.convs\.(\d+)\.norm", r"patch_embed.proj.\1.1"),
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d+)\.0\.", r"blocks.\1."),
        (r"mlp\.conv_(\d)\.conv", r"mlp.conv\1"),
        (r"mlp\.conv_(\d)\.norm", r"mlp.bn\1"),
    )

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """One channel also gets the mean of the affine maps of the published ones, more get them in turn."""
        state = super().fitted(state_dict, expected, model)
        for name in ("patch_embed.pre_affine.alpha", "patch_embed.pre_affine.beta"):
            tensor, channels = state.get(name), model.in_chans
            if tensor is not None and tensor.shape[1] == 3 != channels:
                turns = torch.arange(int(channels)) % 3  # type: ignore[arg-type]
                state[name] = tensor.mean(1, keepdim=True) if channels == 1 else tensor[:, turns]
        return state

    @staticmethod
    def config(state_dict: dict[str, Tensor], *, apply_dhvt: bool = True) -> dict[str, Any]:
        """All but img_size and the rates is in the file.

        Raises:
            ConfigError: apply_dhvt=False, which makes the official program a plain ViT.
        """
        if not apply_dhvt:
            raise ConfigError(
                "With apply_dhvt=False the official program is a plain ViT: timm.create_model has it."
            )
        convolutions = [
            n for n in state_dict if n.startswith("patch_embed.proj.") and n.endswith(".0.weight")
        ]
        dim = state_dict["cls_token"].shape[2]
        blocks = {name.split(".")[1] for name in state_dict if name.startswith("blocks.")}
        return {
            "patch_size": 2 ** len(convolutions),
            "in_chans": state_dict[DHVTOfficial.first_conv].shape[1],
            "num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0,
            "embed_dim": dim,
            "depth": len(blocks),
            "num_heads": state_dict["blocks.0.attn.pos_embed"].shape[1],
            "mlp_ratio": len(state_dict["blocks.0.mlp.conv1.weight"]) / dim,
        }
