"""Boxes, names and skeletons on pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from domains.detection.keypoints import Skeleton
from zoo.plots import BLUE, GREEN, PURPLE, SKY, VERMILION

COLOURS = (VERMILION, BLUE, GREEN, PURPLE, SKY, "#E69F00", "#F0E442")
"""By class, in turn."""


class Shown(NamedTuple):
    """An object to draw."""

    text: str
    label: int
    box: Sequence[float] | None = None
    """x1, y1, x2, y2 in pixels."""
    keypoints: np.ndarray | None = None
    """`(K, 2)`, NaN where one is not to be drawn."""


def drawn(
    image: Image.Image,
    objects: Sequence[Shown],
    kind: Skeleton | None = None,
    *,
    scale: float = 1.0,
    colours: Sequence[str] = COLOURS,
) -> Image.Image:
    """A copy of an RGB picture, enlarged `scale` times, with objects on it, the last above the others."""
    size = round(image.width * scale), round(image.height * scale)
    picture = image.resize(size) if size != image.size else image.copy()
    pen = ImageDraw.Draw(picture)
    width = max(1, round(max(picture.size) / 320))
    font = ImageFont.load_default(max(10, round(max(picture.size) / 45)))
    for entry in objects:
        colour = colours[entry.label % len(colours)]
        corner = None
        if entry.box is not None:
            x1, y1, x2, y2 = (float(value) * scale for value in entry.box)
            pen.rectangle([min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)], outline=colour, width=width)
            corner = (x1, y1)
        if entry.keypoints is not None:
            points = np.asarray(entry.keypoints, np.float64) * scale
            _pose(pen, points, kind, colour, width)
            known = points[np.isfinite(points).all(1)]
            if len(known):
                corner = (float(known[:, 0].min()), float(known[:, 1].min()))
        if entry.text and corner is not None:
            _caption(pen, corner, entry.text, colour, font)
    return picture


def _pose(
    pen: ImageDraw.ImageDraw, points: np.ndarray, kind: Skeleton | None, colour: str, width: int
) -> None:
    for a, b in kind.links if kind else ():
        ends = points[[a, b]]
        if np.isfinite(ends).all():
            pen.line([tuple(end) for end in ends], fill=colour, width=width)
    radius = width + 0.5
    for x, y in points[np.isfinite(points).all(1)]:
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill="white", outline=colour)


def _caption(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    colour: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """White on the colour, above the corner or, at the upper border, below it."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0.0, corner[0])
    y = corner[1] - height if corner[1] >= height else max(0.0, corner[1])
    pen.rectangle([x, y, x + width, y + height], fill=colour)
    pen.text((x + 2 - left, y + 2 - top), text, fill="white", font=font)
