"""What a set of predictions is compared with its targets by, in matching and in the loss alike.

Shapes: L outputs (decoder layers), B images, Q queries of all groups, C classes, T targets of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from domains.detection.boxes import centred_giou, centred_iou, coordinates
from zoo.errors import DataError

Fields = Mapping[str, Tensor]
"""Predictions or targets by name: `logits`, `labels`, `boxes`, `keypoints`, ..."""


@dataclass(frozen=True)
class Term:
    """A distance between a prediction and a target: its cost in matching, and what the loss adds up."""

    name: str
    """The loss is reported as `loss_NAME`."""
    weight: float
    distance: Callable[[Fields, Fields], Tensor]
    """From predicted and target fields with axes that broadcast, to the distances `(...)`."""
    fields: tuple[str, ...]
    """What it reads of a prediction."""
    target_fields: tuple[str, ...] = ()
    """What it reads of a target, where that is more than `fields`."""
    cost_weight: float | None = None
    """In matching, where that is not `weight`."""

    @property
    def cost(self) -> float:
        return self.weight if self.cost_weight is None else self.cost_weight

    @property
    def reads(self) -> tuple[str, ...]:
        """Fields of a target."""
        return self.target_fields or self.fields


def l1_distance(predicted: Fields, target: Fields) -> Tensor:
    """Sum of |differences| of (cx, cy, w, h)."""
    a, b = coordinates(predicted["boxes"]), coordinates(target["boxes"])
    x, y, w, h = ((a[i] - b[i]).abs() for i in range(4))
    return x + y + w + h


def giou_distance(predicted: Fields, target: Fields) -> Tensor:
    """`1 - GIoU`."""
    return 1 - centred_giou(predicted["boxes"], target["boxes"])


def box_terms(
    l1: float = 5.0, giou: float = 2.0, *, cost_l1: float | None = None, cost_giou: float | None = None
) -> tuple[Term, ...]:
    """DETR's terms for boxes."""
    return (
        Term("bbox", l1, l1_distance, ("boxes",), cost_weight=cost_l1),
        Term("giou", giou, giou_distance, ("boxes",), cost_weight=cost_giou),
    )


@dataclass(frozen=True)
class Focal:
    """Classification by sigmoids (Lin et al. 2017)."""

    weight: float = 2.0
    """In the loss."""
    cost: float = 2.0
    """In matching."""
    alpha: float = 0.25
    """In the loss; matching keeps the published `cost_alpha`, as the official programs do."""
    gamma: float = 2.0
    cost_alpha: float = 0.25

    def pair_costs(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`(..., Q, C)` and `(T,)` to `(..., Q, T)`: what a target of its class would add to the loss, less
        what it takes away."""
        p = logits[..., labels].sigmoid()
        positive = self.cost_alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        negative = (1 - self.cost_alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        return positive - negative

    def aim(self, logits: Tensor, predicted: Fields, found: Fields) -> Tensor:
        """What the scores of the matched classes are to reach, `(...)` as their logits."""
        return torch.ones_like(logits)

    def loss(self, logits: Tensor, aims: Tensor) -> Tensor:
        """Of each entry; `aims` is 0 where nothing is matched."""
        return sigmoid_focal_loss(logits, aims, alpha=self.alpha, gamma=self.gamma)


@dataclass(frozen=True)
class IoUAware(Focal):
    """A score that says how well its box fits (LW-DETR, Chen et al. 2024, equation 2): matched classes aim at
    `score^alpha IoU^(1 - alpha)` instead of 1."""

    def aim(self, logits: Tensor, predicted: Fields, found: Fields) -> Tensor:
        with torch.no_grad():
            overlap = centred_iou(predicted["boxes"], found["boxes"]).clamp(min=0)
            return (logits.sigmoid() ** self.alpha * overlap ** (1 - self.alpha)).clamp(min=0.01)

    def loss(self, logits: Tensor, aims: Tensor) -> Tensor:
        error = F.binary_cross_entropy_with_logits(logits, aims, reduction="none")
        return torch.where(aims > 0, error, logits.sigmoid() ** self.gamma * error)


def check_targets(targets: Sequence[Fields], num_classes: int, fields: Sequence[str]) -> None:
    """Raises `DataError` for the first target that cannot be trained on, naming image and object."""
    for i, target in enumerate(targets):
        missing = [name for name in ("labels", *fields) if name not in target]
        if missing:
            raise DataError(f"The target of image {i} has no {missing[0]!r}; it has {', '.join(target)}.")
        labels = target["labels"]
        for name in fields:
            if len(target[name]) != len(labels):
                raise DataError(f"Image {i} has {len(labels)} labels and {len(target[name])} of {name!r}.")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            wrong = next(int(x) for x in labels if not 0 <= int(x) < num_classes)
            raise DataError(
                f"Image {i} has an object of class {wrong}, but the model has classes 0 to {num_classes - 1}."
            )
        if "boxes" in fields:
            _check_boxes(i, target["boxes"])


def _check_boxes(image: int, boxes: Tensor) -> None:
    bad = ~((boxes[:, 2:] > 0).all(-1) & boxes.isfinite().all(-1))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise DataError(
            f"Object {at} of image {image} has the box (cx, cy, w, h) = {boxes[at].tolist()}: it needs "
            "finite numbers and a size above zero."
        )


def mean_over_ranks(count: Tensor) -> Tensor:
    """A number, averaged over the processes that train together."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    count = count.clone()
    dist.all_reduce(count)
    return count / dist.get_world_size()


def wide(fields: Fields) -> dict[str, Tensor]:
    """Predictions in float32 or wider."""
    return {name: x.to(torch.promote_types(x.dtype, torch.float32)) for name, x in fields.items()}
