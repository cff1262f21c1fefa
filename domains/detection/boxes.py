"""Boxes: (cx, cy, w, h) of the image's size inside of models, (x1, y1, x2, y2) at the door."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import box_convert

from zoo.errors import DataError


def to_corners(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2), `(..., 4)`."""
    return box_convert(boxes, "cxcywh", "xyxy")


def to_centres(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) to (cx, cy, w, h), `(..., 4)`."""
    return box_convert(boxes, "xyxy", "cxcywh")


def area(boxes: Tensor) -> Tensor:
    """Of (x1, y1, x2, y2) `(..., 4)`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """`IoU - (C - U) / C` with the smallest box C around both (Rezatofighi et al. 2019), broadcast.

    Args:
        a, b: (x1, y1, x2, y2), `(..., 4)` each; `a[:, None]` and `b` give all pairs.

    Returns:
        `(...)` in [-1, 1].

    Raises:
        DataError: a box with x2 < x1 or y2 < y1.
    """
    check_corners(a)
    check_corners(b)
    return _generalized_iou(a, b)


def centred_giou(a: Tensor, b: Tensor) -> Tensor:
    """`generalized_iou` of (cx, cy, w, h) with w, h of at least 0, which cannot be degenerate: no check."""
    return _generalized_iou(to_corners(a), to_corners(b))


def centred_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of (cx, cy, w, h) with w, h of at least 0, broadcast."""
    overlap, union = _overlap_and_union(to_corners(a), to_corners(b))
    return overlap / union


def _overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    sizes = area(a) + area(b)
    a, b = coordinates(a), coordinates(b)
    inner = [torch.minimum(a[i + 2], b[i + 2]) - torch.maximum(a[i], b[i]) for i in (0, 1)]
    overlap = inner[0].clamp(min=0) * inner[1].clamp(min=0)
    return overlap, sizes - overlap


def _generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    overlap, union = _overlap_and_union(a, b)
    a, b = coordinates(a), coordinates(b)
    outer = [torch.maximum(a[i + 2], b[i + 2]) - torch.minimum(a[i], b[i]) for i in (0, 1)]
    hull = outer[0] * outer[1]
    return overlap / union - (hull - union) / hull


def coordinates(boxes: Tensor) -> Tensor:
    """`(..., 4)` to `(4, ...)`, each in one piece: pairs in the innermost loop take a third of the time."""
    return boxes.movedim(-1, 0).contiguous()


def check_corners(boxes: Tensor) -> None:
    """Raises `DataError` for the first of `(..., 4)` that is NaN or has x2 < x1 or y2 < y1."""
    bad = ~(boxes[..., 2:] >= boxes[..., :2]).all(-1)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise DataError(f"Box {at} is {boxes[at].tolist()}: not (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2.")
