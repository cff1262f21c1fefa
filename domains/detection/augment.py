"""Random views of a training image, as DETR and its relatives are trained (Carion et al. 2020), and its size.

Shapes: T objects, K keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from domains.detection.annotations import SMALLEST
from domains.detection.keypoints import Skeleton
from domains.detection.keypoints import mirrored as mirror_points
from domains.detection.models.common import PIXEL_MEAN, PIXEL_STD
from zoo.errors import ConfigError


@dataclass(frozen=True, eq=False)
class View:
    """An image and its objects, cut and scaled alike."""

    image: Image.Image
    boxes: np.ndarray
    """`(T, 4)` x1, y1, x2, y2 in pixels of this image."""
    labels: np.ndarray
    area: np.ndarray
    keypoints: np.ndarray | None = None
    """`(T, K, 3)`"""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    def only(self, mask: np.ndarray) -> View:
        """With the objects of a mask `(T,)`: of all fields, or objects would get the keypoints of others."""
        fields = {name: getattr(self, name)[mask] for name in ("boxes", "labels", "area")}
        return replace(self, **fields, keypoints=None if self.keypoints is None else self.keypoints[mask])


@dataclass(frozen=True)
class Augment:
    """Mirror, then scale; for every second image, cut out a part before.

    Args:
        flip: share of images that are mirrored.
        scales: lengths of the shorter side, one of which is drawn.
        long: the longer side is at most this.
        crop: share of images that a part is cut out of.
        crop_scales: of an image that is cut, the shorter side before.
        crop_size: smallest and largest side of the part.
        colour: strength of random brightness, contrast and saturation.

    Raises:
        ConfigError: a number out of its range.
    """

    flip: float = 0.5
    scales: tuple[int, ...] = tuple(range(480, 801, 32))
    long: int = 1333
    crop: float = 0.5
    crop_scales: tuple[int, ...] = (400, 500, 600)
    crop_size: tuple[int, int] = (384, 600)
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name in ("scales", "crop_scales", "crop_size"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        for name in ("flip", "crop", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.augment.{name}={getattr(self, name)}: 0 to 1.")
        if not self.scales or min(self.scales) < 1 or self.long < max(self.scales):
            raise ConfigError(f"data.augment.scales={list(self.scales)}: 1 to data.augment.long={self.long}.")
        if self.crop and (len(self.crop_size) != 2 or not self.crop_scales or min(self.crop_size) < 1):
            raise ConfigError(
                "data.augment.crop_size is [smallest, largest], crop_scales are sides in pixels."
            )

    def __call__(self, view: View, kind: Skeleton | None, draw: np.random.Generator) -> View:
        """A random view; objects that a cut leaves no area of are left out."""
        if draw.random() < self.flip:
            view = mirrored(view, kind)
        if self.colour:
            view = replace(view, image=_recoloured(view.image, self.colour, draw))
        if draw.random() < self.crop:
            short = int(draw.choice(self.crop_scales))
            view = resized(view, target_size(view.size, short, self.long))
            view = cropped(view, *self._part(view.size, draw))
        return resized(view, target_size(view.size, int(draw.choice(self.scales)), self.long))

    def _part(self, size: Sequence[int], draw: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height, width."""
        least, most = self.crop_size
        sides = [int(draw.integers(min(least, side), min(most, side) + 1)) for side in size]
        top, left = (int(draw.integers(whole - part + 1)) for whole, part in zip(size, sides, strict=True))
        return top, left, sides[0], sides[1]


def target_size(size: Sequence[int], short: int, long: int) -> tuple[int, int]:
    """Height and width: the shorter side becomes `short`, or less where the longer would exceed `long`."""
    height, width = size
    low, high = min(size), max(size)
    if high / low * short > long:
        short = round(long * low / high)
    if low == short:
        return height, width
    other = max(1, int(short * high / low))
    return (short, other) if height <= width else (other, short)


def resized(view: View, size: tuple[int, int]) -> View:
    """Bilinear with antialiasing; areas grow with the image."""
    if size == view.size:
        return view
    down, right = size[0] / view.size[0], size[1] / view.size[1]
    keypoints = None if view.keypoints is None else view.keypoints * [right, down, 1]
    return View(
        v2.functional.resize(cast(Any, view.image), list(size)),  # pyright: ignore[reportArgumentType]
        view.boxes * [right, down, right, down],
        view.labels,
        view.area * (down * right),
        keypoints,
    )


def mirrored(view: View, kind: Skeleton | None) -> View:
    """Left and right exchanged; keypoints count pixel centres, boxes their borders."""
    width = view.image.width
    boxes = view.boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [width, 0, width, 0]
    keypoints = view.keypoints
    if keypoints is not None and kind is not None:
        keypoints = mirror_points(torch.from_numpy(keypoints), width, kind).numpy()
    image = v2.functional.horizontal_flip(cast(Any, view.image))
    return View(image, boxes, view.labels, view.area, keypoints)  # pyright: ignore[reportArgumentType]


def cropped(view: View, top: int, left: int, height: int, width: int) -> View:
    """A part; boxes are clipped to it and give the areas, keypoints are moved to its border."""
    image = v2.functional.crop(cast(Any, view.image), top, left, height, width)
    limits = [width, height, width, height]
    boxes = (view.boxes - [left, top, left, top]).clip(0, limits)
    keypoints = view.keypoints
    if keypoints is not None:
        places = (keypoints[..., :2] - [left, top]).clip(0, [width, height])
        keypoints = np.concatenate([places, keypoints[..., 2:]], -1)
    sides = boxes[:, 2:] - boxes[:, :2]
    part = View(image, boxes, view.labels, sides.prod(1), keypoints)  # pyright: ignore[reportArgumentType]
    return part.only(np.all(sides > SMALLEST, axis=1))


def clipped(view: View) -> View:
    """Boxes end at the border of the image; areas stay."""
    height, width = view.size
    boxes = view.boxes.clip(0, [width, height, width, height])
    sides = boxes[:, 2:] - boxes[:, :2]
    return replace(view, boxes=boxes).only(np.all(sides > 0, axis=1))


def normalised(image: Image.Image) -> Tensor:
    """`(3, H, W)` float32."""
    pixels = v2.functional.pil_to_tensor(image).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def _recoloured(image: Image.Image, strength: float, draw: np.random.Generator) -> Image.Image:
    functions = (
        v2.functional.adjust_brightness,
        v2.functional.adjust_contrast,
        v2.functional.adjust_saturation,
    )
    for function in functions:
        image = function(cast(Any, image), float(draw.uniform(1 - strength, 1 + strength)))  # pyright: ignore[reportAssignmentType]
    return image
