"""Reading LabelMe: shapes to boxes, points to keypoints, what is left out and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated_small import write_image

from domains.detection.annotations import Collection
from domains.detection.data import DetectionData
from domains.detection.keypoints import COCO
from domains.detection.sources.layouts import read_parts
from zoo.errors import DataError


def shape(label: str, points: Any, kind: str | None = "rectangle", group: Any = None) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, "group_id": group, "flags": {}}


def write(folder: Path, shapes: list[dict[str, Any]], name: str = "a", /, **more: Any) -> Path:
    """An image of 40 x 60 pixels and its json file."""
    write_image(folder / f"{name}.png")
    content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": f"{name}.png"}
    content |= {"imageData": None, "imageHeight": 40, "imageWidth": 60}
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content | more))
    return file


def whole(folder: Path, **options: Any) -> Collection:
    return read_parts("labelme", folder, **options)["all"]


CAT = shape("cat", [[25, 16], [5, 6]])


def test_every_kind_of_outline_becomes_a_box(tmp_path: Path) -> None:
    shapes = [
        CAT,
        shape("dog", [[10, 10], [20, 10], [20, 30]], "polygon"),
        shape("ball", [[30, 20], [33, 24]], "circle"),
        shape("cat", [[2, 3], [11, 7]], "mask") | {"mask": "..."},
        shape("dog", [[0, 0], [4, 0], [4, 4]], None),
    ]
    write(tmp_path, shapes)
    part = whole(tmp_path)
    assert part.classes == ("ball", "cat", "dog")
    assert part.category_ids == (1, 2, 3)
    image = part.images[0]
    assert (image.file, image.height, image.width) == (tmp_path / "a.png", 40, 60)
    assert image.labels.tolist() == [1, 2, 0, 1, 2]
    assert image.boxes.tolist() == [
        [5, 6, 25, 16],
        [10, 10, 20, 30],
        [25, 15, 35, 25],
        [2, 3, 12, 8],
        [0, 0, 4, 4],
    ]
    np.testing.assert_allclose(image.area, [200, 100, 25 * math.pi, 50, 8])
    assert len(set(image.ids.tolist())) == 5


def test_shapes_of_a_label_and_group_are_one_object(tmp_path: Path) -> None:
    pieces = [[[0, 0], [10, 0], [10, 10], [0, 10]], [[20, 5], [30, 5], [30, 25], [20, 25]]]
    shapes = [shape("dog", points, "polygon", group=4) for points in pieces]
    write(tmp_path, [*shapes, shape("cat", [[1, 1], [5, 5]], group=4)])
    image = whole(tmp_path).images[0]
    assert image.boxes.tolist() == [[0, 0, 30, 25], [1, 1, 5, 5]]
    assert image.area.tolist() == [300, 16]


def test_parts_share_their_classes_and_hidden_files_are_no_annotations(tmp_path: Path) -> None:
    write(tmp_path / "train", [CAT])
    write(tmp_path / "valid", [shape("dog", [[1, 1], [9, 9]])])
    (tmp_path / "train" / "._a.json").write_bytes(b"\x00\xff")
    found = read_parts("labelme", tmp_path)
    assert list(found) == ["train", "val"]
    assert found["train"].classes == found["val"].classes == ("cat", "dog")
    assert found["val"].images[0].labels.tolist() == [1]


def test_images_are_found_by_path_by_name_and_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "jsons", [CAT], "a", imagePath="..\\photos\\a.png")
    write(tmp_path / "jsons", [CAT], "b", imagePath="C:/gone/other.jpg")
    write_image(tmp_path / "photos" / "a.png")
    (tmp_path / "jsons" / "a.png").unlink()
    files = [image.file for image in whole(tmp_path / "jsons").images]
    assert [file.resolve() for file in files] == [tmp_path / "photos/a.png", tmp_path / "jsons/b.png"]
    write_image(tmp_path / "elsewhere" / "a.png")
    moved = whole(tmp_path / "jsons", images=tmp_path / "elsewhere").images[0]
    assert moved.file == tmp_path / "elsewhere" / "a.png"


def test_without_a_size_the_image_is_asked(tmp_path: Path) -> None:
    write(tmp_path, [CAT], imageHeight=None)
    assert (whole(tmp_path).images[0].height, whole(tmp_path).images[0].width) == (40, 60)


# ---- keypoints ---------------------------------------------------------------------------------------------


def worm(group: int | None, **points: list[float]) -> list[dict[str, Any]]:
    return [shape(name, [point], "point", group) for name, point in points.items()]


def test_points_of_a_group_are_the_keypoints_of_its_box(tmp_path: Path) -> None:
    shapes = [
        shape("worm", [[5, 5], [25, 15]], group=1),
        shape("worm", [[30, 5], [50, 15]], group=2),
        shape("stone", [[0, 0], [4, 4]]),
        *worm(1, right_end=[24, 14], left_end=[6, 7]),
        *worm(2, left_end=[31, 6]),
    ]
    write(tmp_path, shapes)
    part = whole(tmp_path, keypoints=True)
    assert part.classes == ("worm",)
    assert part.skeleton is not None
    assert part.skeleton.names == ("left_end", "right_end")
    assert part.skeleton.pairs == ((0, 1),)
    points = part.images[0].keypoints
    assert points is not None
    assert points.tolist() == [[[6, 7, 2], [24, 14, 2]], [[31, 6, 2], [0, 0, 0]]]
    assert part.findings.counts == {"objects of categories without keypoints are left out": 1}


def test_the_names_of_coco_keep_their_order(tmp_path: Path) -> None:
    points = {name: [float(i), 1.0] for i, name in enumerate(COCO.names)}
    write(tmp_path, [shape("person", [[0, 0], [20, 9]], group=0), *worm(0, **points)])
    part = whole(tmp_path, keypoints=True)
    assert part.skeleton == COCO
    keypoints = part.images[0].keypoints
    assert keypoints is not None
    assert keypoints[0, :, 0].tolist() == list(range(17))


def test_points_without_one_box_are_counted(tmp_path: Path) -> None:
    shapes = [
        shape("worm", [[5, 5], [25, 15]], group=1),
        shape("worm", [[5, 5], [9, 9]], group=3),
        shape("stone", [[5, 5], [9, 9]], group=3),
        *worm(1, tip=[6, 6]),
        *worm(None, tip=[1, 1]),
        *worm(None, tip=[2, 2]),
        *worm(2, tip=[3, 3], end=[4, 4]),
        *worm(3, tip=[6, 6]),
    ]
    write(tmp_path, shapes)
    counts = whole(tmp_path, keypoints=True).findings.counts
    assert counts["points without a group_id are left out"] == 2
    assert counts["points whose group_id no box has are left out"] == 2
    assert counts["points whose group_id several objects have are left out"] == 1
    with pytest.raises(DataError, match=r"=false reads boxes\. all: 2 points without a group_id"):
        whole(write(tmp_path / "b", [CAT, *shapes[4:6]]), keypoints=True)
    write(tmp_path / "c", [CAT, *worm(1, tip=[1, 1], end=[2, 2])])
    (line,) = whole(tmp_path / "c").findings.lines()
    assert line.startswith("2 points are left out (data.keypoints=true reads those of a group_id): ")


# ---- bad files ---------------------------------------------------------------------------------------------


def test_what_has_no_box_or_no_json_file_is_counted(tmp_path: Path) -> None:
    shapes = [
        CAT,
        shape("wire", [[1, 1], [9, 9]], "line"),
        shape("wire", [[1, 1], [9, 9]], "line"),
        shape("cat", [[1, 1], [9, 9]], "polygon"),
    ]
    write(tmp_path, shapes)
    write_image(tmp_path / "unseen.png")
    part = whole(tmp_path)
    assert part.classes == ("cat",)
    assert part.findings.counts == {
        "shapes of the kind line have no box and are left out": 2,
        "shapes of the kind polygon with too few points are left out": 1,
        "images without a json file are left out": 1,
    }
    assert any("unseen.png" in line for line in part.findings.lines())
    with pytest.raises(DataError, match=r"1 shapes of the kind polygon .*a\.json, shape 4"):
        part.findings.refuse()


@pytest.mark.parametrize(
    ("shapes", "more", "message"),
    [
        ([shape("", [[1, 1], [2, 2]])], {}, r"a\.json, shape 1 has no 'label'"),
        ([CAT, shape("cat", [[1, 1], [2]])], {}, r"shape 2 \('cat'\): points are no list"),
        ([shape("cat", [[1, 1], [2, math.nan]])], {}, r"shape 1 \('cat'\): points are no list of finite"),
        ([shape("cat", [[1, 1], [2, 3]], group=[1])], {}, r"group_id=\[1\] is no number"),
        ([CAT], {"imageHeight": "tall"}, r"a\.json: imageHeight=tall"),
        ([CAT], {"shapes": None}, r"a\.json has no list 'shapes': is it of LabelMe"),
        ([shape("wire", [[1, 1], [9, 9]], "line")], {}, r"No object in 1 json files .* all: 1 shapes of the"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, shapes: Any, more: Any, message: str) -> None:
    write(tmp_path, shapes, **more)
    with pytest.raises(DataError, match=message):
        whole(tmp_path)


def test_a_point_named_twice_in_a_group_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [shape("worm", [[0, 0], [9, 9]], group=1), *worm(1, tip=[1, 1]), *worm(1, tip=[2, 2])])
    with pytest.raises(DataError, match="shape 3: the group_id 1 has the point 'tip' twice"):
        whole(tmp_path, keypoints=True)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, [CAT])
    file.write_text(file.read_text()[:-30])
    with pytest.raises(DataError, match=r"a\.json is no whole json file"):
        whole(tmp_path)


def test_a_folder_without_json_files_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="has no json files, as LabelMe writes them"):
        whole(tmp_path)


def test_a_missing_image_is_named_or_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(5):
        write(tmp_path, [CAT], f"{i}")
    (tmp_path / "3.png").unlink()
    with pytest.raises(DataError, match=r"There is no image .*3\.png \(image id 4\)"):
        DetectionData("labelme", tmp_path).setup()
    data = DetectionData("labelme", tmp_path, corrupt="skip", short=40, long=60)
    data.setup()
    assert "Left out: 1 images cannot be used" in capsys.readouterr().out
    assert sum(map(len, data.parts.values())) == 4
    assert data.train_set[0]["target"]["boxes"].shape == (1, 4)
