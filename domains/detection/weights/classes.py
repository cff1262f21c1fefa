"""Class heads between COCO's category ids, 1 to 90 with holes, and its 80 classes in that order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

IDS, CLASSES = 91, 80
"""Rows of a head that is numbered by category ids, and without holes."""
HEADS = "class_embed"
"""In the names of tensors whose rows are classes."""
NEVER = -math.log(1e9)
"""Logit of a class that there is not."""


def coco_names() -> list[str | None]:
    """By category id, None for the holes."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights as Weights

    names = Weights.COCO_V1.meta["categories"]
    return [None if name in ("__background__", "N/A") else name for name in names]


def coco_ids() -> list[int]:
    """The category id of each of the 80 classes."""
    return [i for i, name in enumerate(coco_names()) if name is not None]


def fit_classes(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    """A state dict whose heads of 91 ids or 80 classes of COCO are those of the other, if that is asked for.

    Ids without a class get a logit that is never chosen. Heads of any other size are left as they are.
    """
    sizes = {len(value) for name, value in state.items() if HEADS in name}
    if sizes == {IDS} and num_classes == CLASSES:
        return with_rows(state, coco_ids())
    if sizes == {CLASSES} and num_classes == IDS:
        order = {number: i for i, number in enumerate(coco_ids())}
        return with_rows(state, [order.get(i) for i in range(IDS)])
    return dict(state)


def with_rows(state: Mapping[str, Tensor], rows: Sequence[int | None]) -> dict[str, Tensor]:
    """A state dict whose class heads have these rows of the former ones; None: a class that there is not."""
    at = torch.tensor([0 if row is None else row for row in rows])
    empty = torch.tensor([row is None for row in rows])
    out = dict(state)
    for name, value in state.items():
        if HEADS in name:
            chosen = value[at]
            chosen[empty] = NEVER if value.ndim == 1 else 0.0
            out[name] = chosen
    return out
