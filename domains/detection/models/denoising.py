"""Contrastive denoising (Zhang et al. 2023, DINO, section 3.3): training also decodes noised objects.

Each of D groups holds every object of an image twice: moved a little, to find its object, and moved further,
to find nothing. The groups see neither each other nor the queries that are matched.

Shapes: B images, T objects of the image that has most, D groups of 2 T queries, first the T that are to find.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.detection.boxes import to_centres, to_corners
from zoo.attention import EqualGroups, Padding, Pattern

LABEL_NOISE = 0.5
"""Half of this share of the objects get another class, drawn from all."""
BOX_NOISE = 1.0
"""A corner moves by up to this times half the side; in the second half of a group by up to twice as much."""


class Noised(NamedTuple):
    """Queries made from objects."""

    labels: Tensor
    """`(B, D 2 T)`"""
    boxes: Tensor
    """(cx, cy, w, h), `(B, D 2 T, 4)`."""
    real: Tensor
    """Bool `(B, D 2 T)`; the others fill up images with fewer objects."""
    groups: int
    """D"""

    @property
    def pattern(self) -> Pattern:
        """Who sees whom."""
        return EqualGroups(self.labels.shape[1] // self.groups) & Padding(self.real)


class Denoised(TypedDict):
    """What became of them."""

    noised: Noised
    outputs: list[dict[str, Tensor]]
    """Of each decoder layer: `logits` `(B, D 2 T, C)` and `boxes` `(B, D 2 T, 4)`."""


def noised_objects(targets: Sequence[Mapping[str, Tensor]], num_classes: int, pairs: int) -> Noised:
    """As many groups as `pairs` allows for the image with most objects, at least one.

    Args:
        targets: of each image, `labels` `(T,)` and `boxes` `(T, 4)`.
        num_classes: C.
        pairs: of a query that is to find its object and one that is not, in all groups.
    """
    most = max(1, *(len(target["labels"]) for target in targets))
    groups = max(1, pairs // most)
    labels, boxes, real = zip(*(_filled(target, most) for target in targets), strict=True)
    labels, boxes, real = (torch.stack(parts).repeat(1, 2 * groups) for parts in (labels, boxes, real))
    return Noised(_flipped(labels, num_classes), _moved(boxes.view(len(real), -1, 4), most), real, groups)


def _filled(target: Mapping[str, Tensor], most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `(T,)`, boxes `(4 T,)` and which are real `(T,)`; what fills up is a box in the middle."""
    labels, boxes = target["labels"], target["boxes"].float()
    room = most - len(labels)
    real = F.pad(torch.ones_like(labels, dtype=torch.bool), (0, room))
    return F.pad(labels, (0, room)), F.pad(boxes.flatten(), (0, 4 * room), value=0.5), real


def _flipped(labels: Tensor, num_classes: int) -> Tensor:
    flip = torch.rand(labels.shape, device=labels.device) < LABEL_NOISE / 2
    return torch.where(flip, torch.randint_like(labels, num_classes), labels)


def _moved(boxes: Tensor, most: int) -> Tensor:
    """Boxes `(B, D 2 T, 4)` with corners moved, kept in the image and in order."""
    part = torch.rand_like(boxes).unflatten(1, (-1, 2, most))
    part = part + part.new_tensor([0.0, 1.0])[:, None, None]
    sign = torch.randint_like(boxes, 2) * 2 - 1
    step = sign * part.flatten(1, 3) * boxes[..., 2:].repeat(1, 1, 2) / 2 * BOX_NOISE
    corners = (to_corners(boxes) + step).clamp(0, 1).unflatten(-1, (2, 2))
    return to_centres(torch.cat([corners.amin(-2), corners.amax(-2)], -1))
