"""Keypoints: skeletons, the object keypoint similarity (OKS), and the loss of poses.

Shapes: K keypoints, T targets of an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from domains.detection.losses import Fields, Focal, Term
from domains.detection.matching import SetLoss
from zoo.errors import ConfigError, DataError, did_you_mean

UNIFORM_SIGMA = 0.067
"""Of keypoints whose spread between annotators is not known: the mean of COCO's."""
VISIBILITY = 0.7310585786300049
"""The third number of a COCO keypoint in results: sigmoid(1), a constant of the official program."""


@dataclass(frozen=True)
class Skeleton:
    """Which keypoints an object has, K in all."""

    names: tuple[str, ...]
    sigmas: tuple[float, ...]
    """Spread of each between annotators, in parts of the square root of the object's area."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Left and right, which a mirror image swaps."""
    links: tuple[tuple[int, int], ...] = ()
    """What a drawing joins."""

    def __post_init__(self) -> None:
        count = len(self.names)
        if count < 1 or len(self.sigmas) != count or min(self.sigmas) <= 0:
            raise ConfigError(
                f"A skeleton has one sigma above zero for each keypoint: {count} names, sigmas {self.sigmas}."
            )
        for kind, ends in (("pair", self.pairs), ("link", self.links)):
            for a, b in ends:
                if not (0 <= a < count and 0 <= b < count and a != b):
                    raise ConfigError(f"The {kind} ({a}, {b}) does not join two of {count} keypoints.")
        swapped = [i for pair in self.pairs for i in pair]
        if len(set(swapped)) != len(swapped):
            raise ConfigError(f"A keypoint is in two of the pairs {self.pairs}.")

    @property
    def mirror(self) -> tuple[int, ...]:
        """For each keypoint, the one that takes its place in a mirror image."""
        order = list(range(len(self.names)))
        for a, b in self.pairs:
            order[a], order[b] = b, a
        return tuple(order)


def _sides(*parts: str) -> tuple[str, ...]:
    return tuple(f"{side}_{part}" for part in parts for side in ("left", "right"))


def _each_twice(*sigmas: float) -> tuple[float, ...]:
    return tuple(sigma for sigma in sigmas for _ in range(2))


COCO = Skeleton(
    ("nose", *_sides("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")),
    (0.026, *_each_twice(0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089)),
    tuple((i, i + 1) for i in range(1, 17, 2)),
    (
        *((0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10)),
        *((5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)),
    ),
)
"""Lin et al. 2014; sigmas of the COCO evaluation."""
CROWDPOSE = Skeleton(
    (*_sides("shoulder", "elbow", "wrist", "hip", "knee", "ankle"), "head", "neck"),
    _each_twice(0.079, 0.072, 0.062, 0.107, 0.087, 0.089, 0.079),
    tuple((i, i + 1) for i in range(0, 12, 2)),
    (
        *((12, 13), (13, 0), (13, 1), (0, 2), (2, 4), (1, 3), (3, 5), (0, 6), (1, 7), (6, 7)),
        *((6, 8), (8, 10), (7, 9), (9, 11)),
    ),
)
"""Li et al. 2019; sigmas of the CrowdPose evaluation."""
SKELETONS = {"coco": COCO, "crowdpose": CROWDPOSE}


def skeleton(kind: str | int | Skeleton) -> Skeleton:
    """By name, or of so many keypoints with equal sigmas and no sides.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(kind, Skeleton):
        return kind
    if isinstance(kind, int):
        return Skeleton(tuple(f"keypoint_{i}" for i in range(kind)), (UNIFORM_SIGMA,) * kind)
    if kind not in SKELETONS:
        raise ConfigError(
            f"There is no skeleton {kind!r}.{did_you_mean(kind, SKELETONS)} There are "
            f"{', '.join(SKELETONS)}; a number of keypoints gives equal sigmas."
        )
    return SKELETONS[kind]


def default_skeleton(num_keypoints: int) -> Skeleton:
    """COCO's for 17, CrowdPose's for 14, otherwise equal sigmas."""
    known = {len(found.names): found for found in SKELETONS.values()}
    return known.get(num_keypoints, skeleton(num_keypoints))


def mirrored(keypoints: Tensor, width: float, kind: Skeleton) -> Tensor:
    """Keypoints `(..., K, 2 or 3)` in pixels of an image of this width, flipped from left to right."""
    flipped = keypoints[..., list(kind.mirror), :].clone()
    flipped[..., 0] = width - 1 - flipped[..., 0]
    return flipped


# ---- similarity and loss -----------------------------------------------------------------------------------


def oks(predicted: Tensor, keypoints: Tensor, visible: Tensor, area: Tensor, sigmas: Tensor) -> Tensor:
    """Object keypoint similarity: mean over visible i of `exp(-d_i^2 / (2 area (2 sigma_i)^2))`.

    Distances and area are in one unit; in training, parts of the image, whose sides differ: the official
    approximation. At least 1e-6; the same for an object without a visible keypoint.

    Args:
        predicted, keypoints: `(..., K, 2)`, which broadcast.
        visible: `(..., K)`, 0 or 1.
        area: `(...)`, above zero.
        sigmas: `(K,)`.
    """
    squares = (predicted - keypoints).square().sum(-1)
    similar = torch.exp(-squares / (2 * area[..., None] * (2 * sigmas).square()))
    return ((similar * visible).sum(-1) / (visible.sum(-1) + 1e-6)).clamp(min=1e-6)


def keypoint_distance(predicted: Fields, target: Fields) -> Tensor:
    """Sum of |differences| of the visible keypoints."""
    gaps = (predicted["keypoints"] - target["keypoints"]).abs().sum(-1)
    return (gaps * target["visible"]).sum(-1)


def oks_distance(predicted: Fields, target: Fields, *, sigmas: Sequence[float]) -> Tensor:
    """`1 - OKS`."""
    values = predicted["keypoints"].new_tensor(sigmas)
    return 1 - oks(predicted["keypoints"], target["keypoints"], target["visible"], target["area"], values)


def keypoint_terms(
    sigmas: Sequence[float],
    l1: float = 10.0,
    similarity: float = 4.0,
    *,
    cost_l1: float | None = None,
    cost_similarity: float | None = None,
) -> tuple[Term, ...]:
    """Group Pose's terms: L1 of the visible keypoints and `1 - OKS`."""
    reads = ("keypoints", "visible", "area")
    near = partial(oks_distance, sigmas=tuple(sigmas))
    return (
        Term("keypoints", l1, keypoint_distance, ("keypoints",), reads, cost_l1),
        Term("oks", similarity, near, ("keypoints",), reads, cost_similarity),
    )


class PoseLoss:
    """The set loss of a pose model: of the last layer, of those before it, and of the encoder's proposals.

    Args:
        kind: the skeleton, by name, number of keypoints or itself.
        focal: classification.
        weights: of the terms, see `keypoint_terms`.
    """

    def __init__(
        self, kind: str | int | Skeleton = "coco", focal: Focal | None = None, **weights: float
    ) -> None:
        self.skeleton = skeleton(kind)
        self.losses = SetLoss(keypoint_terms(self.skeleton.sigmas, **weights), focal)

    def __call__(self, outputs: Any, targets: Sequence[Fields]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its unweighted parts `loss_NAME`: of layer i before the last with the suffix `_i`, of
        the proposals with `_interm`.

        Args:
            outputs: of a pose model.
            targets: of each image, `labels` `(T,)`, `keypoints` `(T, K, 2)` and `area` `(T,)` in parts of the
                image, `visible` `(T, K)`: zero where a keypoint is not labelled.

        Raises:
            DataError: targets that cannot be trained on; the message names image and object.
        """
        count = outputs["keypoints"].shape[-2]
        if count != len(self.skeleton.names):
            raise DataError(
                f"The model predicts {count} keypoints, the skeleton has {len(self.skeleton.names)}."
            )
        targets = [_checked(i, target, count) for i, target in enumerate(targets)]
        auxiliary = list(outputs["auxiliary"])
        total, parts = self.losses([*auxiliary, outputs["proposals"], outputs], targets)
        suffix = f"_{len(auxiliary)}"
        return total, {
            f"{name.removesuffix(suffix)}_interm" if name.endswith(suffix) else name: part
            for name, part in parts.items()
        }


def _checked(image: int, target: Fields, count: int) -> Fields:
    """The target with its visibility as 0 and 1."""
    if not {"keypoints", "visible", "area"} <= target.keys():
        return target  # the set loss names what is missing
    keypoints, visible, area = target["keypoints"], target["visible"], target["area"]
    shape = (len(keypoints), count)
    if keypoints.shape != (*shape, 2) or visible.shape != shape or area.shape != shape[:1]:
        raise DataError(
            f"Image {image} has keypoints {tuple(keypoints.shape)}, visible {tuple(visible.shape)} and area "
            f"{tuple(area.shape)}; for {count} keypoints they are (T, {count}, 2), (T, {count}) and (T,)."
        )
    good = (area > 0) & area.isfinite() & keypoints.isfinite().all(-1).all(-1)
    if not bool(good.all()):
        at = int((~good).nonzero()[0])
        raise DataError(
            f"Object {at} of image {image} has the area {float(area[at])} and the keypoints "
            f"{keypoints[at].tolist()}: it needs finite numbers and an area above zero."
        )
    return {**target, "visible": (visible > 0).to(keypoints.dtype)}
