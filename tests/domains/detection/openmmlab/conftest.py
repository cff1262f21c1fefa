"""mmdet, once for all tests that need it, and tiny data sets in COCO's format."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domains.detection.openmmlab import check_versions, enable_mmdet
from zoo.errors import ZooError

FEW = {"COCO": "", "COCO_VAL": ""}
"""What the configs of a few images read from the environment: the folder, and that of the images in it."""


@pytest.fixture(scope="session")
def mmdet() -> None:
    """mmdet with the zoo's parts; the test is skipped where the extra is not installed."""
    try:
        check_versions()
    except ZooError as error:
        pytest.skip(f"the extra mmdet: {error}")
    enable_mmdet()
    from mmdet.utils import register_all_modules  # pyright: ignore[reportMissingImports]

    register_all_modules()


@pytest.fixture(params=["drawn", "real"])
def people(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the layout of COCO with people on four images, named in the environment as configs expect.

    `drawn` are bright rectangles; `real` is a part of COCO beside the checkout, skipped where it is absent.
    """
    folder, images = tmp_path / "coco", "val2017/"
    if request.param == "real":
        folder, images = request.getfixturevalue("shared_data") / "detection" / "coco", "images/val2017/"
    else:
        draw_people(folder)
    for name, value in zip(FEW, (os.path.relpath(folder), images), strict=True):
        monkeypatch.setenv(name, value)
    return folder


def draw_people(folder: Path, count: int = 4) -> None:
    """Rectangles on dark images, with category ids that have a hole before the people."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    draw, images, annotations = np.random.default_rng(0), [], []
    for i in range(1, count + 1):
        height, width = (120, 160) if i % 2 else (160, 120)
        pixels = draw.integers(0, 40, (height, width, 3), np.uint8)
        for k in range(2):
            w, h = draw.integers(30, 60, 2)
            x, y = draw.integers(0, width - w), draw.integers(0, height - h)
            pixels[y : y + h, x : x + w] = (230, 60 + 120 * k, 90)
            box = [int(v) for v in (x, y, w, h)]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": 3, "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
        name = f"{i:012d}.jpg"
        Image.fromarray(pixels).save(folder / "val2017" / name)
        images.append({"id": i, "file_name": name, "height": height, "width": width})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "person"}]}
    (folder / "annotations" / "person_keypoints_val2017.json").write_text(json.dumps(content))
