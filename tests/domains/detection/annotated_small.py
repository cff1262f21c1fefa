"""Small annotated images for the tests of detection data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from domains.detection.keypoints import COCO

PERSON = {"id": 1, "name": "person", "keypoints": list(COCO.names), "skeleton": [[1, 2]]}


def write_image(path: Path, size: tuple[int, int] = (40, 60), mode: str = "RGB", seed: int = 0) -> Path:
    """An image of random pixels, height and width first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    if mode == "I;16":
        Image.fromarray(draw.integers(0, 65536, size).astype(np.uint16)).save(path)
        return path
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    Image.fromarray(draw.integers(0, 256, (*size, *channels)).astype(np.uint8)).save(path)
    return path


def box(number: int, image: int, bbox: Sequence[float], category: int = 1, **more: Any) -> dict[str, Any]:
    """An annotation of COCO."""
    found = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0}
    return found | {"area": bbox[2] * bbox[3]} | more


def pose(number: int, image: int, bbox: Sequence[float], labelled: int = 17, **more: Any) -> dict[str, Any]:
    """With keypoints along the diagonal of the box, of which the first ones are labelled."""
    x, y, width, height = bbox
    points = [(x + width * i / 16, y + height * i / 16, 2) if i < labelled else (0, 0, 0) for i in range(17)]
    flat = [value for point in points for value in point]
    return box(number, image, bbox) | {"keypoints": flat, "num_keypoints": labelled} | more


def write_coco(
    folder: Path,
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    *,
    images: int = 2,
    file: str = "annotations/instances_val2017.json",
    image_folder: str = "val2017",
    **more: Any,
) -> Path:
    """Images 1, 2, ... of 40 x 60 pixels, and their annotations."""
    entries = []
    for number in range(1, images + 1):
        name = f"{number:03d}.png"
        write_image(folder / image_folder / name, seed=number)
        entries.append({"id": number, "file_name": name, "height": 40, "width": 60, **more})
    content = {"images": entries, "annotations": list(annotations), "categories": list(categories)}
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    return folder


SHAPES = ({"id": 3, "name": "cat"}, {"id": 17, "name": "dog"})
"""Category ids with holes."""


def two_images(folder: Path) -> Path:
    """A cat and a dog on the first image, a dog on the second."""
    annotations = [
        box(1, 1, (5, 6, 20, 10), 3),
        box(2, 1, (30, 10, 15, 20), 17),
        box(3, 2, (0, 0, 30, 30), 17),
    ]
    return write_coco(folder, annotations, SHAPES)
