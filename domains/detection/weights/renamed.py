"""Layouts that differ from ours in names, and in matrices that lie above each other here."""

from __future__ import annotations

import re
import warnings
from typing import ClassVar

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.weights.checkpoint import matches
from zoo.weights.official import OfficialLayout

RESNETS = {
    (False, 2): "resnet18",
    (False, 6): "resnet34",
    (True, 6): "resnet50",
    (True, 23): "resnet101",
    (True, 36): "resnet152",
}
"""By whether blocks are bottlenecks, and how many stage 3 has."""


class DetectionLayout(OfficialLayout):
    """A subclass lists its `renames`; a fused matrix has several official names, separated by a bar."""

    wrapper = "model"
    ignored = unofficial = ("*.num_batches_tracked",)
    renames: ClassVar[tuple[tuple[str, str], ...]]
    """(pattern of our names, replacement), of which the first that matches counts."""

    @classmethod
    def official(cls, name: str) -> list[str]:
        """The official name of a tensor of ours, or those of its parts from top to bottom."""
        for pattern, replacement in cls.renames:
            if re.match(pattern, name):
                name = re.sub(pattern, replacement, name, count=1)
                break
        head, bar, tail = name.partition("{")
        if not bar:
            return [name]
        parts, _, tail = tail.partition("}")
        return [f"{head}{part}{tail}" for part in parts.split("|")]

    @classmethod
    def to_zoo(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        names = [name for name in model.state_dict() if not matches(name, cls.unofficial)]
        return {ours: _joined([state_dict[name] for name in cls.official(ours)]) for ours in names}

    @classmethod
    def to_official(cls, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        out = {}
        for ours, value in state_dict.items():
            if not matches(ours, cls.unofficial):
                names = cls.official(ours)
                parts = value.chunk(len(names)) if len(names) > 1 else [value]
                out |= dict(zip(names, parts, strict=True))
        return out


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def resnet_name(state_dict: dict[str, Tensor], prefix: str = "backbone.0.body.") -> str:
    """Which ResNet the tensors below `prefix` are.

    Raises:
        CheckpointError: none of torchvision's.
    """
    blocks = {n.split(".")[1] for n in _below(state_dict, prefix) if n.startswith("layer3.")}
    bottleneck = f"{prefix}layer1.0.conv3.weight" in state_dict
    name = RESNETS.get((bottleneck, len(blocks)))
    if name is None:
        raise CheckpointError(
            f"The backbone below {prefix!r} is none of {', '.join(RESNETS.values())}: stage 3 has "
            f"{len(blocks)} blocks."
        )
    return name


def _below(state_dict: dict[str, Tensor], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)]


def count_layers(state_dict: dict[str, Tensor], prefix: str) -> int:
    """How many numbers follow `prefix`."""
    return len({name.split(".")[0] for name in _below(state_dict, prefix)})


def fitted_queries(given: Tensor, own: Tensor, num_queries: int, what: str) -> Tensor:
    """Query rows `(G N, d)` for a model with another number of groups.

    Fewer groups take the first rows. Further groups start as the model has drawn them: copies of a group
    would be matched alike and stay copies.

    Raises:
        CheckpointError: the file's rows are no whole number of groups of `num_queries`.
    """
    if given.shape == own.shape or given.shape[1:] != own.shape[1:]:
        return given
    if len(given) % num_queries:
        raise CheckpointError(
            f"{what} has {len(given)} queries, which are no groups of the model's {num_queries}: set "
            f"num_queries={len(given)} or a divisor of it."
        )
    groups, have = len(own) // num_queries, len(given) // num_queries
    if have < groups:
        warnings.warn(
            f"{what} has {have} group{'s' * (have > 1)} of queries, the model {groups}: the others start "
            "anew.",
            stacklevel=2,
        )
    return torch.cat([given[: len(own)], own[len(given) :]])


def fitted_classes(state: dict[str, Tensor], expected: dict[str, Tensor], head: str) -> None:
    """A class head `HEAD.weight`, `HEAD.bias` for other classes starts anew, which is said: in place."""
    weight, own = state.get(f"{head}.weight"), expected.get(f"{head}.weight")
    if weight is None or own is None or weight.shape[1:] != own.shape[1:] or len(weight) == len(own):
        return
    warnings.warn(
        f"The checkpoint tells {len(weight)} classes apart, the model {len(own)}: {head} starts anew. To "
        f"keep its classes, build the model with num_classes={len(weight)}.",
        stacklevel=2,
    )
    state |= {f"{head}.{kind}": expected[f"{head}.{kind}"] for kind in ("weight", "bias")}
