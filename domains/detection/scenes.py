"""The embedded data: rendered scenes with exact boxes, and figures with exact keypoints.

A scene depends on (kind, seed, part, place) alone. Files are made on first use, in the layout of COCO.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageStat

from domains.detection.annotations import CROWDPOSE_AREA
from domains.detection.figures import draw_figure
from domains.detection.keypoints import COCO
from zoo.errors import ConfigError
from zoo.files import atomic_path, atomic_write
from zoo.paths import cache_dir

SHAPES = ("circle", "square", "triangle", "star")
KINDS = {"scenes": SHAPES, "figures": ("person",)}
"""Classes of each kind of scene."""
PARTS = {"train": 0, "val": 1, "test": 2}
SIDE = 128
VERSIONS = {"scenes": 2, "figures": 1}
"""Of what is drawn; files of another are not used."""
VISIBLE = 0.4
"""Of an object that is less visible, nothing is drawn."""

DARKER, SHIFTED = ([value // 2 for value in range(256)], [value ^ 128 for value in range(256)])
"""Other values of a paint: of the same hue, or of another."""
CONTRAST = 50
"""Least difference, in one colour of 256 steps, between an object and what it covers."""


class Drawn(NamedTuple):
    """An object on its own."""

    label: int
    mask: Image.Image
    """Grey: its pixels."""
    paint: Image.Image
    """RGB."""
    keypoints: np.ndarray | None = None
    """`(K, 2)`"""


def scene_files(kind: str, counts: Mapping[str, int], seed: int = 0, output: Path | None = None) -> Path:
    """The folder of scenes, which are drawn where it is not complete.

    Args:
        kind: `scenes` or `figures`.
        counts: images of train, val and test.
        output: instead of the cache folder of the zoo.

    Raises:
        ConfigError: no such kind, or a part without images.
    """
    if kind not in KINDS:
        raise ConfigError(f"There are no scenes of the kind {kind!r}: {', '.join(KINDS)}.")
    if min(counts.values()) < 1:
        raise ConfigError(f"data.images={dict(counts)}: every part needs an image.")
    name = f"{kind}-v{VERSIONS[kind]}-{seed}-" + "-".join(str(counts[part]) for part in PARTS)
    folder = output or cache_dir() / "detection" / name
    for part in PARTS:
        file = annotation_file(folder, kind, part)
        if not file.is_file():
            _write_part(folder, kind, part, counts[part], seed)
    return folder


def annotation_file(folder: Path, kind: str, part: str) -> Path:
    """Where the annotations of a part are."""
    return folder / "annotations" / f"{'instances' if kind == 'scenes' else 'person_keypoints'}_{part}.json"


def _write_part(folder: Path, kind: str, part: str, count: int, seed: int) -> None:
    """Images first: a file of annotations tells that its part is complete."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for place in range(count):
        image, objects = draw_scene(kind, seed, part, place)
        name = f"{place:06d}.png"
        with atomic_path(folder / part / name) as target:
            image.save(target, format="PNG")
        images.append({"id": place + 1, "file_name": name, "height": image.height, "width": image.width})
        for found in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": place + 1, **found})
    points = {
        "keypoints": list(COCO.names),
        "skeleton": [[a + 1, b + 1] for a, b in COCO.links],
    }
    categories = [
        {"id": i + 1, "name": name, **(points if kind == "figures" else {})}
        for i, name in enumerate(KINDS[kind])
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    with atomic_write(annotation_file(folder, kind, part), "w") as file:
        json.dump(content, file)


def draw_scene(kind: str, seed: int, part: str, place: int) -> tuple[Image.Image, list[dict[str, Any]]]:
    """A scene, and its objects as COCO annotations without ids: later objects hide earlier ones."""
    draw = np.random.default_rng((VERSIONS[kind], seed, list(KINDS).index(kind), PARTS[part], place))
    make, most, colour = (_shape, 6, 0.25) if kind == "scenes" else (_figure, 3, 1.0)
    told = DARKER if kind == "scenes" else SHIFTED
    objects = _apart([make(draw) for _ in range(int(draw.integers(1, most + 1)))])
    image = _background(draw, colour)
    for entry in objects:
        image.paste(_contrasting(entry, image, told), (0, 0), entry.mask)
    image = _noisy(image, draw)
    visible = _visible_masks(objects)
    return image, [_annotation(objects, visible, i) for i in range(len(objects))]


def _contrasting(entry: Drawn, image: Image.Image, told: list[int]) -> Image.Image:
    """The paint, of which a table makes other values where it is hardly told from what it covers."""
    under, paint = (ImageStat.Stat(picture, entry.mask).mean for picture in (image, entry.paint))
    if max(abs(a - b) for a, b in zip(under, paint, strict=True)) > CONTRAST:
        return entry.paint
    return entry.paint.point(told * 3)


def _apart(objects: list[Drawn]) -> list[Drawn]:
    """Without objects that those before them would be hidden by, drawn one by one."""
    kept: list[Drawn] = []
    for entry in objects:
        trial = [*kept, entry]
        full = [_area(other.mask) for other in trial]
        seen = [_area(mask) for mask in _visible_masks(trial)]
        if all(part > VISIBLE * whole for part, whole in zip(seen, full, strict=True)):
            kept = trial
    return kept or objects[:1]


def _visible_masks(objects: list[Drawn]) -> list[Image.Image]:
    found, above = [], Image.new("L", (SIDE, SIDE))
    for entry in reversed(objects):
        found.append(ImageChops.subtract(entry.mask, above))
        above = ImageChops.lighter(above, entry.mask)
    return found[::-1]


def _area(mask: Image.Image) -> int:
    return int((np.asarray(mask) > 127).sum())


def _annotation(objects: list[Drawn], visible: list[Image.Image], i: int) -> dict[str, Any]:
    inside = np.asarray(visible[i]) > 127
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    x, y = int(columns[0]), int(rows[0])
    width, height = int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y
    found: dict[str, Any] = {
        "category_id": objects[i].label + 1,
        "bbox": [x, y, width, height],
        "area": int(inside.sum()),
        "iscrowd": 0,
    }
    points = objects[i].keypoints
    if points is not None:
        covered = np.zeros_like(inside)
        for entry in objects[i + 1 :]:
            covered |= np.asarray(entry.mask) > 127
        triplets = [_triplet(point, covered) for point in points]
        found["area"] = CROWDPOSE_AREA * width * height
        found["keypoints"] = [value for triplet in triplets for value in triplet]
        found["num_keypoints"] = sum(triplet[2] > 0 for triplet in triplets)
    return found


def _triplet(point: np.ndarray, covered: np.ndarray) -> tuple[float, float, int]:
    """x, y and 2: visible, 1: behind another figure; zeros outside of the image."""
    x, y = (round(float(value), 2) for value in point)
    if not (0 <= x < SIDE and 0 <= y < SIDE):
        return 0.0, 0.0, 0
    return x, y, 1 if covered[int(y), int(x)] else 2


# ---- what is drawn -----------------------------------------------------------------------------------------


def _shape(draw: np.random.Generator) -> Drawn:
    label = int(draw.integers(len(SHAPES)))
    radius = float(draw.uniform(9, 28))
    centre = draw.uniform(0.6 * radius, SIDE - 0.6 * radius, 2)
    mask = Image.new("L", (SIDE, SIDE))
    pen = ImageDraw.Draw(mask)
    if SHAPES[label] == "circle":
        pen.ellipse([*(centre - radius), *(centre + radius)], fill=255)
    else:
        corners = centre + radius * _corners(SHAPES[label], float(draw.uniform(0, 2 * np.pi)))
        pen.polygon([tuple(corner) for corner in corners], fill=255)
    return Drawn(label, mask, _paint(label, draw))


def _corners(name: str, turn: float) -> np.ndarray:
    """On the unit circle, of a star every second one inside."""
    count = {"square": 4, "triangle": 3, "star": 10}[name]
    angles = turn + 2 * np.pi * np.arange(count) / count
    reach = np.where(np.arange(count) % 2, 0.45, 1.0) if name == "star" else np.ones(count)
    return reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)


def _figure(draw: np.random.Generator) -> Drawn:
    mask = Image.new("L", (SIDE, SIDE))
    paint = Image.new("RGB", (SIDE, SIDE), _colour(draw))
    height = float(draw.uniform(60, 112))
    centre = draw.uniform([0.18 * SIDE, 0.35 * SIDE], [0.82 * SIDE, 0.65 * SIDE])
    return Drawn(0, mask, paint, draw_figure(draw, mask, paint, centre, height))


def _colour(draw: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in draw.integers(0, 256, 3))
    return red, green, blue


def _hued(label: int, draw: np.random.Generator) -> tuple[int, int, int]:
    """A colour of the class: its hue, more or less, of any brightness."""
    hue = (label / len(SHAPES) + draw.normal(0, 0.04)) % 1
    red, green, blue = hsv_to_rgb(hue, draw.uniform(0.55, 1), draw.uniform(0.4, 1))
    return round(255 * red), round(255 * green), round(255 * blue)


def _paint(label: int, draw: np.random.Generator) -> Image.Image:
    """One colour of the class, or stripes of two."""
    paint = Image.new("RGB", (SIDE, SIDE), _hued(label, draw))
    if draw.random() < 0.3:
        pen, other = ImageDraw.Draw(paint), _hued(label, draw)
        step = int(draw.integers(4, 9))
        for x in range(0, 2 * SIDE, 2 * step):
            pen.line([(x, 0), (x - SIDE, SIDE)], fill=other, width=step // 2 + 1)
    return paint


def _background(draw: np.random.Generator, colour: float) -> Image.Image:
    """A gradient between two pale or dark colours, with thin lines that are no objects.

    Args:
        colour: 0 of greys, 1 of any colours.
    """
    ends = draw.uniform(0, 255, (2, 1, 1, 3)) * 0.5 + draw.uniform(0, 127)
    ends = colour * ends + (1 - colour) * ends.mean(-1, keepdims=True)
    along = np.linspace(0, 1, SIDE)[:, None, None]
    pixels = np.broadcast_to(ends[0] * along + ends[1] * (1 - along), (SIDE, SIDE, 3))
    image = Image.fromarray(np.ascontiguousarray(pixels).astype(np.uint8))
    if draw.random() < 0.5:
        image = image.transpose(Image.Transpose.ROTATE_90)
    pen = ImageDraw.Draw(image)
    for _ in range(int(draw.integers(0, 5))):
        ends = draw.uniform(0, SIDE, 4)
        pen.line([tuple(ends[:2]), tuple(ends[2:])], fill=_colour(draw), width=1)
    return image


def _noisy(image: Image.Image, draw: np.random.Generator) -> Image.Image:
    if draw.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(0.6))
    noise = draw.normal(0, draw.uniform(2, 10), (SIDE, SIDE, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
