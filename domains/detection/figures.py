"""Stick figures with the keypoints of COCO."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from domains.detection.keypoints import COCO

PLACE = {name: i for i, name in enumerate(COCO.names)}
LIMBS = {
    "arm": (("shoulder", "elbow", 0.17), ("elbow", "wrist", 0.16)),
    "leg": (("hip", "knee", 0.23), ("knee", "ankle", 0.22)),
}
"""From, to, and length in parts of the height."""
SIDES = {"left": 1, "right": -1}
"""A figure that faces the viewer has its left side on the right of the picture."""
LIMB_COLOURS = {"arm": (225, 75, 60), "leg": (60, 105, 225)}
"""Equal on both sides, so that a mirror image is a figure, too."""


def draw_figure(
    draw: np.random.Generator, mask: Image.Image, paint: Image.Image, centre: np.ndarray, height: float
) -> np.ndarray:
    """Draw a figure of this height in pixels into mask and paint; its keypoints `(17, 2)`."""
    points = figure_points(draw, centre, height)
    width = max(3, round(0.055 * height))
    pens = ImageDraw.Draw(mask), ImageDraw.Draw(paint)
    torso = [points[PLACE[name]] for name in ("left_shoulder", "right_shoulder", "right_hip", "left_hip")]
    pens[0].polygon([tuple(point) for point in torso], fill=255)
    for side in ("right", "left"):
        for limb, parts in LIMBS.items():
            for start, end, _ in parts:
                ends = [tuple(points[PLACE[f"{side}_{name}"]]) for name in (start, end)]
                _stroke(pens[0], ends, width, 255)
                _stroke(pens[1], ends, width, LIMB_COLOURS[limb])
    shoulders = (points[PLACE["left_shoulder"]] + points[PLACE["right_shoulder"]]) / 2
    _stroke(pens[0], [tuple(shoulders), tuple(points[PLACE["nose"]])], width, 255)
    _head(pens, points, 0.085 * height)
    return points


def figure_points(draw: np.random.Generator, centre: np.ndarray, height: float) -> np.ndarray:
    """Keypoints `(17, 2)` of a figure whose hips are at `centre`, leaning and moving at random."""
    points = np.zeros((len(PLACE), 2))
    lean = draw.normal(0, 0.12)
    up = np.array([np.sin(lean), -np.cos(lean)])
    across = np.array([np.cos(lean), np.sin(lean)])
    neck = centre + 0.3 * height * up
    for side, sign in SIDES.items():
        points[PLACE[f"{side}_hip"]] = centre + sign * 0.075 * height * across
        points[PLACE[f"{side}_shoulder"]] = neck + sign * 0.115 * height * across
        angles = {
            "arm": (draw.uniform(-0.2, 2.6), draw.normal(0, 0.6)),
            "leg": (abs(draw.normal(0.12, 0.25)), draw.normal(0, 0.3)),
        }
        for limb, (first, bend) in angles.items():
            for (start, end, length), angle in zip(LIMBS[limb], (first, first + bend), strict=True):
                step = sign * np.sin(angle) * across - np.cos(angle) * up
                points[PLACE[f"{side}_{end}"]] = points[PLACE[f"{side}_{start}"]] + length * height * step
        head = neck + 0.13 * height * up
        points[PLACE["nose"]] = head
        points[PLACE[f"{side}_eye"]] = head + height * (0.03 * sign * across + 0.025 * up)
        points[PLACE[f"{side}_ear"]] = head + height * (0.075 * sign * across + 0.01 * up)
    return points


def _stroke(pen: ImageDraw.ImageDraw, ends: list[tuple[float, ...]], width: int, fill: object) -> None:
    """A line with round ends."""
    pen.line(ends, fill=fill, width=width)  # pyright: ignore[reportArgumentType]
    for x, y in ends:
        radius = width / 2
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=fill)  # pyright: ignore[reportArgumentType]


def _head(pens: tuple[ImageDraw.ImageDraw, ...], points: np.ndarray, radius: float) -> None:
    middle = points[PLACE["nose"]]
    box = [*(middle - radius), *(middle + radius)]
    pens[0].ellipse(box, fill=255)
    pens[1].ellipse(box, fill=(240, 205, 170))
    for name, colour in (("left_eye", (20, 20, 20)), ("right_eye", (20, 20, 20)), ("nose", (200, 60, 60))):
        x, y = points[PLACE[name]]
        size = max(1.0, 0.14 * radius)
        pens[1].ellipse([x - size, y - size, x + size, y + size], fill=colour)
