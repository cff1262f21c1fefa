"""Annotated images as tensors with targets, and batches of them.

Shapes: T objects of an image, K keypoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domains.detection.annotations import Annotated, Collection
from domains.detection.augment import Augment, View, clipped, normalised, resized, target_size
from domains.detection.boxes import to_centres
from domains.detection.models.common import ImageBatch
from domains.detection.pictures import read_rgb
from zoo.errors import DataError


class DetectionSet(Dataset):
    """Images as tensors, with their targets.

    A training view depends on (seed, epoch, index) alone. Targets are `labels` `(T,)`, `boxes` `(T, 4)` as
    cx, cy, w, h, `area` `(T,)`, and of poses `keypoints` `(T, K, 2)` and `visible` `(T, K)`, all in parts of
    the image; crowds are left out, and of poses objects without a labelled keypoint.

    Args:
        logits: `(C,)` the model's class number of each label.
        pose: targets have keypoints.
        augment: random views; None: whole images.
    """

    def __init__(
        self,
        part: Collection,
        logits: np.ndarray,
        size: tuple[int, int],
        *,
        pose: bool,
        augment: Augment | None,
        seed: int,
    ) -> None:
        self.part, self.logits, self.size, self.pose = part, logits, size, pose
        self.augment, self.seed, self.epoch = augment, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.part.images[index]
        view = _view(found, pose=self.pose)
        if self.augment is None:
            view = resized(view, target_size(view.size, *self.size))
        else:
            draw = np.random.default_rng((self.seed, self.epoch, index))
            view = self.augment(view, self.part.skeleton, draw)
        return {
            "image": normalised(view.image),
            "target": self._target(clipped(view)),
            "index": index,
            "size": (found.height, found.width),
            "whole": self.augment is None,
        }

    def _target(self, view: View) -> dict[str, Tensor]:
        height, width = view.size
        boxes = torch.from_numpy(view.boxes / [width, height, width, height]).float()
        target = {
            "labels": torch.from_numpy(self.logits[view.labels]),
            "boxes": to_centres(boxes),
            "area": torch.from_numpy(view.area / (height * width)).float(),
        }
        if view.keypoints is not None:
            target["keypoints"] = torch.from_numpy(view.keypoints[..., :2] / [width, height]).float()
            target["visible"] = torch.from_numpy(view.keypoints[..., 2] > 0).float()
        return target


def _view(found: Annotated, *, pose: bool) -> View:
    """The image with the objects that are trained on."""
    image = read_rgb(found.file, (found.height, found.width))
    if (image.height, image.width) != (found.height, found.width):
        raise DataError(
            f"{found} has {image.width}x{image.height} pixels; its annotations are of "
            f"{found.width}x{found.height}."
        )
    kept = found.only(trained_objects(found, pose=pose))
    sides = (kept.boxes[:, 2:] - kept.boxes[:, :2]).prod(1)
    area = np.where(kept.area > 0, kept.area, sides)
    return View(image, kept.boxes, kept.labels, area, kept.keypoints if pose else None)


def trained_objects(found: Annotated, *, pose: bool) -> np.ndarray:
    """Mask `(T,)`: no crowds; of poses, none without a labelled keypoint."""
    mask = ~found.crowd
    if pose and found.keypoints is not None:
        mask &= (found.keypoints[..., 2] > 0).any(1)
    return mask


def padded(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch of samples: `images`, `mask`, `targets`, `index`, and the `sizes` of the files."""
    batch = ImageBatch.pad([sample["image"] for sample in samples])
    return {
        "images": batch.images,
        "mask": batch.mask,
        "targets": [sample["target"] for sample in samples],
        "index": [sample["index"] for sample in samples],
        "sizes": torch.tensor([sample["size"] for sample in samples]),
    }
