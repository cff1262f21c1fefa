"""Official SpectFormer checkpoints <-> ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from domains.vision.resizing import resized_table
from domains.vision.spectrum import resized_filter
from domains.vision.weights.renamed import RenamedLayout


class SpectFormerOfficial(RenamedLayout):
    """State dicts of the classifier. Position embeddings and filters are resized to the model's grid."""

    first_conv = "patch_embed.proj.weight"
    same = (
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "embed_dim",
        "depth",
        "mlp_ratio",
        "drop_rate",
        "drop_path_rate",
    )
    renames = (
        (r"^stem\.pos_embed", "pos_embed"),
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d+)\.0\.", r"blocks.\1."),
    )

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        state = super().fitted(state_dict, expected, model)
        grid: Any = model.stem.grid  # type: ignore[union-attr]
        for name, tensor in state.items():
            other = name in expected and expected[name].shape != tensor.shape
            if other and name == "pos_embed" and tensor.ndim == 3:
                side = int(tensor.shape[1] ** 0.5)
                state[name] = resized_table(tensor.mT.unflatten(2, (side, -1)), grid).flatten(2).mT
            elif other and name.endswith("complex_weight") and tensor.ndim == 4:
                state[name] = resized_filter(tensor.movedim(-1, 0), grid, len(tensor)).movedim(0, -1)
        return state

    @staticmethod
    def config(state_dict: dict[str, Tensor]) -> dict[str, Any]:
        """All but the rates is in the file, if the grid is square."""
        dim, channels, patch, _ = state_dict["patch_embed.proj.weight"].shape
        blocks = {name.split(".")[1] for name in state_dict if name.startswith("blocks.")}
        return {
            "img_size": patch * int(state_dict["pos_embed"].shape[1] ** 0.5),
            "patch_size": patch,
            "in_chans": channels,
            "num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0,
            "embed_dim": dim,
            "depth": len(blocks),
            "num_spectral": sum(name.endswith("complex_weight") for name in state_dict),
            "mlp_ratio": len(state_dict["blocks.0.mlp.fc1.weight"]) / dim,
        }
