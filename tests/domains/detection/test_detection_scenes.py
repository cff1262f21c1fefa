"""The embedded scenes and figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from domains.detection.figures import figure_points
from domains.detection.keypoints import COCO
from domains.detection.scenes import KINDS, SIDE, annotation_file, draw_scene, scene_files
from domains.detection.sources.layouts import read_parts
from zoo.errors import ConfigError


@pytest.mark.parametrize("kind", KINDS)
def test_a_scene_depends_on_its_seed_alone(kind: str) -> None:
    first, objects = draw_scene(kind, 0, "train", 3)
    again, same = draw_scene(kind, 0, "train", 3)
    assert first.tobytes() == again.tobytes()
    assert objects == same
    for other in (draw_scene(kind, 1, "train", 3), draw_scene(kind, 0, "val", 3)):
        assert other[0].tobytes() != first.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_lie_inside_and_hold_the_visible_object(kind: str) -> None:
    counts = []
    for place in range(12):
        _, objects = draw_scene(kind, 0, "train", place)
        counts.append(len(objects))
        for entry in objects:
            x, y, width, height = entry["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + width <= SIDE
            assert y + height <= SIDE
            assert 0 < entry["area"] <= width * height
    assert min(counts) >= 1
    assert max(counts) > 1


def test_a_lone_shape_fills_its_box_to_the_border() -> None:
    """The pixels at the four sides of the box differ from the background around it."""
    for place in range(40):
        image, objects = draw_scene("scenes", 0, "train", place)
        if len(objects) == 1:
            break
    pixels = np.asarray(image, np.float64)
    x, y, width, height = objects[0]["bbox"]
    inside = pixels[y : y + height, x : x + width].reshape(-1, 3).mean(0)
    ring = [pixels[max(y - 3, 0) : y, x : x + width], pixels[y + height : y + height + 3, x : x + width]]
    around = np.concatenate([part.reshape(-1, 3) for part in ring]).mean(0)
    assert np.abs(inside - around).max() > 10


def test_hidden_keypoints_are_marked_and_those_outside_are_not_labelled() -> None:
    flags = {0: 0, 1: 0, 2: 0}
    for place in range(30):
        _, objects = draw_scene("figures", 0, "train", place)
        for entry in objects:
            points = np.array(entry["keypoints"]).reshape(17, 3)
            for x, y, visible in points:
                flags[int(visible)] += 1
                assert 0 <= x < SIDE
                assert 0 <= y < SIDE
            assert entry["num_keypoints"] == (points[:, 2] > 0).sum()
    assert min(flags.values()) > 0


def test_left_is_on_the_right_of_the_picture() -> None:
    points = figure_points(np.random.default_rng(0), np.array([64.0, 64.0]), 90.0)
    for part in ("shoulder", "hip", "ear"):
        left, right = (points[COCO.names.index(f"{side}_{part}")] for side in ("left", "right"))
        assert left[0] > right[0]
    assert points[COCO.names.index("nose")][1] < points[COCO.names.index("left_hip")][1]


def test_files_are_made_once_and_read_as_coco(tmp_path: Path) -> None:
    counts = {"train": 3, "val": 1, "test": 2}
    folder = scene_files("figures", counts, output=tmp_path)
    stamps = {part: annotation_file(folder, "figures", part).stat().st_mtime_ns for part in counts}
    assert scene_files("figures", counts, output=tmp_path) == folder
    assert stamps == {part: annotation_file(folder, "figures", part).stat().st_mtime_ns for part in counts}
    found = read_parts("coco", folder, keypoints=True)
    assert {part: len(part_of) for part, part_of in found.items()} == counts
    assert found["train"].skeleton == COCO
    listed = json.loads(annotation_file(folder, "figures", "test").read_text())["annotations"]
    assert found["test"].objects == len(listed)


def test_unknown_kinds_and_empty_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no scenes of the kind 'shapes'"):
        scene_files("shapes", {"train": 1, "val": 1, "test": 1}, output=tmp_path)
    with pytest.raises(ConfigError, match="every part needs an image"):
        scene_files("scenes", {"train": 1, "val": 0, "test": 1}, output=tmp_path)
