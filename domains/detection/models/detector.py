"""What the box detectors with groups of queries have in common."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NotRequired, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from domains.detection.boxes import to_corners
from domains.detection.models.common import MLP, best_pairs, full
from domains.detection.models.denoising import Denoised
from zoo.errors import ConfigError, DataError


class Prediction(TypedDict):
    """Of one decoder layer."""

    logits: Tensor
    """`(B, Q, C)`, before the sigmoid."""
    boxes: Tensor
    """`(B, Q, 4)`: cx, cy, w, h in [0, 1]."""


class Outputs(Prediction):
    """Of the last decoder layer, and of those before it where they were asked for."""

    auxiliary: list[Prediction]
    denoised: NotRequired[Denoised]


class Detections(TypedDict):
    """Of one image, best first."""

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    """x1, y1, x2, y2 in pixels, not clipped."""


class Checkpointed(nn.Module):
    """A model whose layers may be computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: layers are computed again in the backward pass."""
        self.grad_checkpointing = enable

    def fuse(self) -> Self:
        """A copy for inference with equal outputs: every module that has a method `fuse_` has run it."""
        fused = copy.deepcopy(self).eval()
        fused.__dict__.pop("zoo_config", None)  # its weights are no longer those of the named model
        for module in reversed(list(fused.modules())):
            if hasattr(module, "fuse_"):
                module.fuse_()  # pyright: ignore[reportCallIssue]
        return fused.requires_grad_(False)

    def run(self, layer: Callable[..., Tensor], *args: Any) -> Tensor:
        """A layer, checkpointed where that is asked for."""
        if self.grad_checkpointing and self.training:
            out = checkpoint(layer, *args, use_reentrant=False)
            assert isinstance(out, Tensor)
            return out
        return layer(*args)


class GroupDetector(Checkpointed):
    """Queries in G groups of N, of which evaluation uses the first (Chen et al. 2022).

    Args:
        num_classes: C.
        num_queries: N.
        groups: G.
    """

    head_modules: tuple[str, ...] = ("class_embed", "bbox_embed")
    """What fine-tuning of the heads alone trains."""

    def __init__(self, num_classes: int, num_queries: int, groups: int) -> None:
        super().__init__()
        for name, value in {
            "num_classes": num_classes,
            "num_queries": num_queries,
            "groups": groups,
        }.items():
            if value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}.")
        self.num_classes, self.num_queries, self.groups = num_classes, num_queries, groups
        self.denoising = 0

    @property
    def active_groups(self) -> int:
        """Groups in the outputs of a forward now: what the loss is to be told."""
        return self.groups if self.training else 1

    def postprocess(
        self, outputs: Outputs, sizes: Tensor | Sequence[Sequence[int]], k: int = 100
    ) -> list[Detections]:
        """The k best pairs of query and class of each image; no suppression of overlaps, no threshold.

        Args:
            outputs: of `forward`.
            sizes: `(B, 2)`, height and width of each image in pixels, without padding.

        Raises:
            DataError: another number of sizes than images.
        """
        best = best_pairs(outputs["logits"], k)
        size = checked_sizes(sizes, best.scores)
        corners = to_corners(full(outputs["boxes"]))
        chosen = corners.gather(1, best.queries[..., None].expand(-1, -1, 4))
        pixels = chosen * size.flip(1).repeat(1, 2)[:, None]
        return [
            {"scores": scores, "labels": labels, "boxes": boxes}
            for scores, labels, boxes in zip(best.scores, best.labels, pixels, strict=True)
        ]


def box_heads(dim: int, num_classes: int) -> tuple[nn.Linear, MLP]:
    """Of classes, which start at a probability of 1 %, and of boxes, which start at their references."""
    classes, boxes = nn.Linear(dim, num_classes), MLP(dim, dim, 4, 3)
    nn.init.constant_(classes.bias, -math.log(99))
    last = boxes.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return classes, boxes


def pack(logits: Tensor, boxes: Tensor) -> Outputs:
    """Outputs of L layers, `(L, B, Q, ...)`, the last as the result."""
    parts: list[Prediction] = [
        {"logits": a, "boxes": b} for a, b in zip(logits.unbind(), boxes.unbind(), strict=True)
    ]
    return {**parts[-1], "auxiliary": parts[:-1]}


def layers(outputs: Outputs) -> list[dict[str, Tensor]]:
    """The predictions of each layer, the last one last: what `SetLoss` takes."""
    return [{"logits": p["logits"], "boxes": p["boxes"]} for p in (*outputs["auxiliary"], outputs)]


def checked_sizes(sizes: Tensor | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Heights and widths `(B, 2)` on the device of results `(B, ...)`.

    Raises:
        DataError: another number of sizes than images.
    """
    size = torch.as_tensor(sizes, device=like.device)
    if size.shape != (len(like), 2):
        raise DataError(f"{len(like)} images have sizes (B, 2), not {tuple(size.shape)}.")
    return size


def check_width(dim: int, num_heads: int) -> None:
    """Raises `ConfigError` where heads or position encodings do not divide the width."""
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"A width of {dim} is not divisible by {num_heads} heads.")
    if dim % 4:
        raise ConfigError(f"Sine encodings of two coordinates need a width divisible by 4, not {dim}.")
