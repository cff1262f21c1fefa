"""What a trained detector must beat: mean boxes and poses, and itself before training."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import nn

from domains.detection.annotations import Annotated, Collection
from zoo.create import create_model


def mean_results(train: Collection, test: Collection, *, pose: bool) -> list[dict[str, Any]]:
    """For every image of `test` the same results, in parts of its size.

    Of each class the mean box (or pose) of the training part, scored by the share of images that have it.
    """
    found: list[dict[str, Any]] = []
    means = {label: _mean(train, label, pose=pose) for label in range(len(train.classes))}
    for image in test.images:
        for label, mean in means.items():
            if mean is None:
                continue
            share, values = mean
            entry = {"image_id": image.id, "category_id": train.category_ids[label], "score": share}
            found.append(entry | _scaled(values, image, pose=pose))
    return found


def _mean(train: Collection, label: int, *, pose: bool) -> tuple[float, np.ndarray] | None:
    """Share of images with the class, and its mean box `(4,)` or keypoints `(K, 2)`."""
    chosen = [image.only((image.labels == label) & ~image.crowd) for image in train.images]
    chosen = [image for image in chosen if len(image)]
    if not chosen:
        return None
    share = len(chosen) / len(train)
    if not pose:
        boxes = [image.boxes / [image.width, image.height, image.width, image.height] for image in chosen]
        return share, np.concatenate(boxes).mean(0)
    points = np.concatenate([_relative_points(image) for image in chosen])
    return share, np.nan_to_num(np.nanmean(points, 0), nan=0.5)


def _relative_points(image: Annotated) -> np.ndarray:
    """`(T, K, 2)`, NaN where not labelled."""
    assert image.keypoints is not None
    places = image.keypoints[..., :2] / [image.width, image.height]
    return np.where(image.keypoints[..., 2:] > 0, places, np.nan)


def _scaled(values: np.ndarray, image: Annotated, *, pose: bool) -> dict[str, Any]:
    if pose:
        points = values * [image.width, image.height]
        return {"keypoints": np.concatenate([points, np.ones((len(points), 1))], 1).reshape(-1).tolist()}
    x1, y1, x2, y2 = values * [image.width, image.height, image.width, image.height]
    return {"bbox": [x1, y1, x2 - x1, y2 - y1]}


def untrained_like(model: nn.Module) -> nn.Module:
    """A model of the same config with new weights, in eval mode; the random state stays as it is."""
    built = cast(Any, model).zoo_config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(f"{built['domain']}/{built['name']}", **built["config"]).eval()
