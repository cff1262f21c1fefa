"""Official SReT checkpoints <-> ours.

The official list of a stage holds a block once for each pass through it, so its tensors stand under several
names; here they stand once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.resizing import resized_table
from domains.vision.weights.renamed import RenamedLayout
from zoo.errors import CheckpointError, ConfigError

_PART = re.compile(r"^transformers\.(\d+)\.blocks\.(\d+)\.(.+)$")


class SReTOfficial(RenamedLayout):
    """State dicts of the classifier, with all copies of the shared blocks, or with the first ones only."""

    first_conv = "patch_embed.conv1.weight"
    head = ("head.*", "norm.*")
    renames = (
        (r"^stem\.pos_embed", "pos_embed"),
        (r"^stem\.convs\.(\d)\.conv", lambda m: f"patch_embed.conv{int(m[1]) + 1}"),
        (r"^stem\.convs\.(\d)\.norm", lambda m: f"patch_embed.bn{int(m[1]) + 1}"),
        (r"^stages\.(\d)\.0\.(weight|bias)", lambda m: f"pools.{int(m[1]) - 1}.conv.{m[2]}"),
        (r"^pre_head\.", "norm."),
        (r"(coefficient\d)$", r"\1.bias"),
    )

    @staticmethod
    def canonical(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every copy of the shared blocks under its own name."""
        inside = RenamedLayout.canonical(state_dict)
        state = dict(inside)
        for stage in range(_count(inside, r"^transformers\.(\d+)\.")):
            shared: dict[str, Tensor] = {}
            for i in range(0, _count(inside, rf"^transformers\.{stage}\.blocks\.(\d+)\."), 2):
                prefix = f"transformers.{stage}.blocks.{i}."
                own = {n.removeprefix(prefix): t for n, t in inside.items() if n.startswith(prefix)}
                shared = own or shared
                state |= {f"{prefix}{name}": tensor for name, tensor in shared.items()}
        return state

    @classmethod
    def fitted(
        cls, state_dict: dict[str, Tensor], expected: dict[str, Tensor], model: nn.Module
    ) -> dict[str, Tensor]:
        """Position embeddings are resized to the grid of the model."""
        state = super().fitted(state_dict, expected, model)
        table, own = state.get("pos_embed"), expected["pos_embed"]
        if table is not None and table.ndim == 4 and table.shape[1] == own.shape[1]:
            state["pos_embed"] = resized_table(table, own.shape[2:])
        return state

    @classmethod
    def to_zoo(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        places = cls._places(model)
        first = {}
        for name, tensor in state_dict.items():
            found = _PART.match(name)
            if found is None:
                first[name] = tensor
                continue
            ours = f"{places[found[1], found[2]]}.{found[3]}"
            if not torch.equal(first.setdefault(ours, tensor), tensor):
                raise CheckpointError(
                    f"{name} differs from the pass before, whose weights a block of SReT shares."
                )
        return super().to_zoo(first, model)

    @classmethod
    def to_official(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out, names = {}, {}
        for (stage, i), place in cls._places(model).items():
            names.setdefault(place, []).append(f"transformers.{stage}.blocks.{i}")
        for name, tensor in super().to_official(state_dict, model).items():
            place = next((p for p in names if name.startswith(f"{p}.")), None)
            copies = [name] if place is None else [f"{p}{name.removeprefix(place)}" for p in names[place]]
            out |= {copy: tensor if i == 0 else tensor.clone() for i, copy in enumerate(copies)}
        return out

    @staticmethod
    def _places(model: nn.Module) -> dict[tuple[str, str], str]:
        """Stage and place in its official list -> our module; blocks stand in the list once for each pass."""
        places = {}
        for s, stage in enumerate(model.stages):  # type: ignore[arg-type]
            i = 0
            for b, recursion in list(enumerate(stage))[int(s > 0) :]:
                for step in range(len(recursion.steps)):
                    places[str(s), str(i)] = f"stages.{s}.{b}.block"
                    places[str(s), str(i + 1)] = f"stages.{s}.{b}.steps.{step}"
                    i += 2
        return places

    @staticmethod
    def config(
        state_dict: dict[str, Tensor],
        *,
        image_size: int | None = None,
        patch_size: int = 16,
        stride: int = 8,
        base_dims: Sequence[int] | None = None,
        depth: Sequence[int] | None = None,
        recursive_num: Sequence[int] | None = None,
        groups1: Sequence[int] | None = None,
        groups2: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        mlp_ratio: float | None = None,
        np_mlp_ratio: float | None = None,
        num_classes: int | None = None,
        in_chans: int | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
    ) -> dict[str, Any]:
        """What a file does not tell: heads, groups and the rates.

        Raises:
            ConfigError: patches of other than 16 pixels at a stride of 8.
        """
        if (patch_size, stride) != (16, 8):
            raise ConfigError(f"The stem of SReT has patch_size=16, stride=8, not {patch_size} and {stride}.")
        stages = range(_count(state_dict, r"^transformers\.(\d+)\."))
        blocks = [f"transformers.{i}.blocks" for i in stages]
        dims = [len(state_dict[f"{b}.0.norm1.weight"]) for b in blocks]
        passes = [_count(state_dict, rf"^transformers\.{i}\.blocks\.(\d+)\.") // 2 for i in stages]
        weights = [
            [state_dict[f"{b}.{2 * i}.attn.qkv.weight"] for i in range(n)]
            for b, n in zip(blocks, passes, strict=True)
        ]
        config: dict[str, Any] = {
            "img_size": 8 * state_dict["pos_embed"].shape[2],
            "in_chans": state_dict[SReTOfficial.first_conv].shape[1],
            "embed_dims": dims,
            "depths": passes,
            "num_blocks": [1 + sum(not torch.equal(a, b) for a, b in pairwise(w)) for w in weights],
            "num_classes": len(state_dict["head.weight"]) if "head.weight" in state_dict else 0,
            "mlp_ratio": _ratio(state_dict, blocks, dims, 0),
            "step_ratio": _ratio(state_dict, blocks, dims, 1),
        }
        if base_dims is not None and heads is not None:
            config["embed_dims"] = [base * n for base, n in zip(base_dims, heads, strict=True)]
        asked = {
            "img_size": image_size,
            "in_chans": in_chans,
            "depths": depth,
            "num_blocks": recursive_num,
            "groups": groups1,
            "recursive_groups": groups2,
            "num_heads": heads,
            "mlp_ratio": mlp_ratio,
            "step_ratio": np_mlp_ratio,
            "num_classes": num_classes,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
        }
        return config | {name: value for name, value in asked.items() if value is not None}


def _count(state_dict: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that a pattern finds in the names."""
    found = (re.match(pattern, name) for name in state_dict)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _ratio(state_dict: dict[str, Tensor], blocks: list[str], dims: list[int], i: int) -> float:
    """Hidden width over width of the MLPs at a place of each list, where widths are rounded down."""
    hidden = [len(state_dict[f"{prefix}.{i}.mlp.fc1.weight"]) for prefix in blocks]
    low = max(h / dim for h, dim in zip(hidden, dims, strict=True))
    high = min((h + 1) / dim for h, dim in zip(hidden, dims, strict=True))
    rounded = round((low + high) / 2, 1)
    return rounded if low <= rounded < high else low
