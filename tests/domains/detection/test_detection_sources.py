"""Reading COCO, CrowdPose, YOLO and Pascal VOC; what bad files are answered with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from annotated_small import PERSON, SHAPES, box, pose, two_images, write_coco, write_image

from domains.detection.annotations import Collection, skeleton_of
from domains.detection.keypoints import COCO, CROWDPOSE
from domains.detection.pictures import read_rgb
from domains.detection.sources.coco import read_coco
from domains.detection.sources.layouts import check_agree, read_parts
from zoo.errors import DataError


def one(found: dict[str, Collection]) -> Collection:
    (part,) = found.values()
    return part


def edited(folder: Path, change: Any) -> Path:
    """The file of annotations after a change of its content."""
    file = folder / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


# ---- COCO --------------------------------------------------------------------------------------------------


def test_category_ids_with_holes_become_class_numbers_and_back(tmp_path: Path) -> None:
    part = one(read_parts("coco", two_images(tmp_path)))
    assert part.classes == ("cat", "dog")
    assert part.category_ids == (3, 17)
    first, second = part.images
    assert first.labels.tolist() == [0, 1]
    assert first.boxes.tolist() == [[5, 6, 25, 16], [30, 10, 45, 30]]
    assert [entry["category_id"] for entry in part.as_coco()["annotations"]] == [3, 17, 17]
    assert second.file == tmp_path / "val2017" / "002.png"


def test_ground_truth_is_given_back_as_it_was_read(tmp_path: Path) -> None:
    folder = two_images(tmp_path)
    content = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    again = one(read_parts("coco", folder)).as_coco()
    keys = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    assert [{key: entry[key] for key in keys} for entry in again["annotations"]] == content["annotations"]


@pytest.mark.parametrize("layout", ["images/val2017", "val2017"])
def test_both_layouts_of_coco_are_found(tmp_path: Path, layout: str) -> None:
    write_coco(tmp_path, [box(1, 1, (1, 1, 9, 9), 3)], SHAPES, image_folder=layout)
    found = read_parts("coco", tmp_path)
    assert list(found) == ["val"]
    assert one(found).images[0].file == tmp_path / layout / "001.png"


def test_the_export_of_roboflow_is_found_and_its_heading_is_no_class(tmp_path: Path) -> None:
    heading = {"id": 0, "name": "pets", "supercategory": "none"}
    cat = {"id": 1, "name": "cat", "supercategory": "pets"}
    for part in ("train", "valid", "test"):
        file = f"{part}/_annotations.coco.json"
        write_coco(tmp_path, [box(1, 1, (1, 1, 9, 9))], [heading, cat], file=file, image_folder=part)
    found = read_parts("coco", tmp_path)
    assert list(found) == ["train", "val", "test"]
    assert found["val"].classes == ("cat",)
    assert found["val"].findings.counts["headings of categories are no classes"] == 1


def test_crowdpose_has_areas_from_boxes_and_its_own_skeleton(tmp_path: Path) -> None:
    points = [value for i in range(14) for value in (i + 2.0, i + 3.0, 2)]
    person = {"id": 1, "name": "person", "keypoints": list(CROWDPOSE.names), "skeleton": [[16, 14]]}
    entry = box(1, 1, (2, 3, 20, 10)) | {"keypoints": points, "num_keypoints": 14}
    del entry["area"]
    file = "json/crowdpose_train.json"
    write_coco(tmp_path, [entry], [person], file=file, image_folder="images", crowdIndex=0.5)
    part = read_parts("coco", tmp_path, keypoints=True)["train"]
    assert part.crowdpose
    assert part.skeleton == CROWDPOSE
    assert part.images[0].area.tolist() == [200.0]
    assert part.images[0].crowd_index == 0.5


def test_keypoints_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    write_coco(
        tmp_path,
        [pose(1, 1, (5, 5, 20, 20)), box(2, 2, (1, 1, 5, 5), 2)],
        [PERSON, {"id": 2, "name": "cat"}],
        file="annotations/person_keypoints_val2017.json",
    )
    part = one(read_parts("coco", tmp_path, keypoints=True))
    assert part.classes == ("person",)
    points = part.images[0].keypoints
    assert points is not None
    np.testing.assert_allclose(points[0, 16], [25, 25, 2])
    assert part.findings.counts["objects of categories without keypoints are left out"] == 1
    boxes = one(read_parts("coco", tmp_path / "annotations" / "person_keypoints_val2017.json"))
    assert boxes.images[0].keypoints is None


def test_nothing_is_dropped_in_silence(tmp_path: Path) -> None:
    annotations = [
        box(1, 1, (5, 5, 0, 10), 3),
        box(2, 1, (70, 5, 10, 10), 3),
        box(3, 1, (50, 30, 30, 30), 3),
        box(4, 1, (5, 5, 10, 10), 3, iscrowd=1),
    ]
    part = one(read_parts("coco", write_coco(tmp_path, annotations, SHAPES)))
    assert part.findings.counts == {
        "boxes of no size are left out": 1,
        "boxes outside of their image are left out": 1,
        "boxes reach over the border of their image; training clips them": 1,
        "crowds are neither trained on nor judged": 1,
        "images have no object": 1,
    }
    assert part.images[0].crowd.tolist() == [False, True]
    lines = part.findings.lines()
    assert any("001.png (image id 1), annotation 2" in line for line in lines)
    with pytest.raises(DataError, match=r"1 boxes of no size are left out: .*001.png \(image id 1\)"):
        part.findings.refuse()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][0].update(category_id=4), r"annotation 1 is of category 4; .*\[3, 17\]"),
        (lambda c: c["annotations"][1].update(image_id=9), "annotation 2 is of image 9, which the file does"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"bbox=\[1, 2, 3\] is not"),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3, math.nan]),
            r"annotation 1: bbox=\[1, 2, 3, nan\] .*finite",
        ),
        (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 has no 'bbox'"),
        (lambda c: c["categories"].append({"id": 3, "name": "cow"}), "category id 3 is there twice"),
        (lambda c: c.update(images=[]), "lists no images"),
        (lambda c: c.pop("categories"), "has no list 'categories'"),
        (lambda c: c["images"][0].pop("height"), "the image 1 has no 'height'"),
    ],
)
def test_files_that_contradict_themselves_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    file = edited(two_images(tmp_path), change)
    with pytest.raises(DataError, match=message):
        read_coco(file, tmp_path / "val2017")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("images",), 3, "no list 'images'"),
        (("images", 0), 3, "an image, 3, is not made of names and values"),
        (("images", 0, "id"), [1], r"an image: id=\[1\] is not a whole number"),
        (("images", 0, "height"), None, "the image 1: height=None is not a whole number"),
        (("images", 0, "width"), float("inf"), "the image 1: width=inf is not a whole number"),
        (("images", 0, "file_name"), 7, "the image 1 has no 'file_name'"),
        (("annotations", 0), "box", "annotation 0, 'box', is not made of names and values"),
        (("annotations", 0, "id"), "a", "annotation a: id='a' is not a whole number"),
        (("annotations", 0, "image_id"), [], r"annotation 1: image_id=\[\] is not a whole"),
        (("annotations", 0, "category_id"), {}, r"annotation 1: category_id=\{\} is not a whole"),
        (("annotations", 0, "bbox"), [1, 2, None, 4], r"annotation 1: bbox=\[1, 2, None, 4\] is not"),
        (("annotations", 0, "area"), float("nan"), "annotation 1: area=nan is not a finite number"),
        (("annotations", 0, "iscrowd"), "no", "annotation 1: iscrowd='no' is neither 0 nor 1"),
        (("annotations", 0, "keypoints"), "abc", "annotation 1: keypoints=abc are not numbers"),
        (("categories", 0, "keypoints"), 3, "the keypoints of 'person' are not a list of names: 3"),
    ],
)
def test_values_of_another_kind_are_named(
    tmp_path: Path, place: tuple[str | int, ...], value: object, message: str
) -> None:
    file = write_coco(tmp_path, [pose(1, 1, (5, 5, 20, 20))], [PERSON]) / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        read_parts("coco", file, keypoints=True)


def test_links_of_a_skeleton_are_pairs() -> None:
    with pytest.raises(DataError, match=r"f\.json: skeleton=\[3\] are not pairs of numbers"):
        skeleton_of(["tip", "tail"], cast(Any, [3]), "f.json")


def test_a_truncated_file_is_named_with_the_place(tmp_path: Path) -> None:
    file = two_images(tmp_path) / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=r"instances_val2017.json is no whole json file: .* character \d+"):
        read_parts("coco", tmp_path)


def test_keypoints_of_another_count_are_named(tmp_path: Path) -> None:
    entry = pose(7, 1, (5, 5, 20, 20))
    entry["keypoints"] = entry["keypoints"][:48]
    write_coco(tmp_path, [entry], [PERSON])
    with pytest.raises(DataError, match="annotation 7: 48 numbers of keypoints; 17 keypoints have 51"):
        read_coco(tmp_path / "annotations/instances_val2017.json", tmp_path / "val2017", keypoints=True)


def test_a_folder_without_layout_is_told_what_would_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations/instances_train2017\.json"):
        read_parts("coco", tmp_path)


def test_parts_with_other_categories_do_not_agree(tmp_path: Path) -> None:
    first = one(read_parts("coco", two_images(tmp_path / "a")))
    other = write_coco(tmp_path / "b", [box(1, 1, (1, 1, 9, 9), 3)], [{"id": 3, "name": "cow"}])
    with pytest.raises(DataError, match=r"val part has the category 3 'cow'; in the train part .* 'cat'"):
        check_agree({"train": first, "val": one(read_parts("coco", other))})


def test_unknown_skeletons_take_sides_from_names() -> None:
    kind = skeleton_of(["left_tip", "tail", "right_tip"], [[1, 2], [2, 3]], "f.json")
    assert kind.pairs == ((0, 2),)
    assert kind.links == ((0, 1), (1, 2))
    turned = skeleton_of(COCO.names[::-1], [], "f.json")
    assert turned.sigmas == COCO.sigmas[::-1]
    assert turned.mirror[15] == 14


# ---- YOLO --------------------------------------------------------------------------------------------------


def yolo(folder: Path, lines: str, **description: Any) -> Path:
    content = {"names": {0: "cat", 1: "dog"}, "train": "images/train", **description}
    write_image(folder / "images" / "train" / "a.png")
    (folder / "labels" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "labels" / "train" / "a.txt").write_text(lines)
    (folder / "data.yaml").write_text(json.dumps(content))
    return folder


def test_yolo_boxes_are_read_in_pixels(tmp_path: Path) -> None:
    part = read_parts("yolo", yolo(tmp_path, "1 0.5 0.5 0.5 0.25\n0 0.1 0.1 0.3 0.1 0.3 0.4\n"))["train"]
    assert part.classes == ("cat", "dog")
    np.testing.assert_allclose(part.images[0].boxes, [[15, 15, 45, 25], [6, 4, 18, 16]])
    assert part.images[0].labels.tolist() == [1, 0]


def test_yolo_poses_are_read(tmp_path: Path) -> None:
    folder = yolo(tmp_path, "0 0.5 0.5 1 1 0.5 0.5 2 0 0 0", kpt_shape=[2, 3], flip_idx=[1, 0])
    part = read_parts("yolo", folder, keypoints=True)["train"]
    assert part.skeleton is not None
    assert part.skeleton.pairs == ((0, 1),)
    points = part.images[0].keypoints
    assert points is not None
    assert points.tolist() == [[[30, 20, 2], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", "a.txt, line 1: class 2; there are 0 to 1"),
        ("0 0.5 0.5 0.5", "line 1: 3 numbers after the class"),
        ("0 0.5 0.5 0.5 0.5\n0 a b c d", "line 2: '0 a b c d' is not numbers"),
        ("nan 0.5 0.5 0.5 0.5", "a.txt, line 1: class nan; there are 0 to 1"),
    ],
)
def test_bad_lines_of_yolo_are_named(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_parts("yolo", yolo(tmp_path, lines))


@pytest.mark.parametrize("names", [None, 3, "[a", "abc", {"x": "a"}])
def test_yolo_without_names_is_refused(tmp_path: Path, names: object) -> None:
    with pytest.raises(DataError, match=r"data.yaml has no 'names'"):
        read_parts("yolo", yolo(tmp_path, "", names=names))


def test_a_text_file_of_other_bytes_is_named(tmp_path: Path) -> None:
    (yolo(tmp_path, "") / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.txt is no text file"):
        read_parts("yolo", tmp_path)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kpt_shape": 3}, "data.yaml has no kpt_shape"),
        ({"kpt_shape": ["a", 3]}, r"kpt_shape=\['a', 3\] starts with the number of keypoints"),
        ({"kpt_shape": [2, 3], "flip_idx": 5}, "flip_idx=5 does not name each of 2 keypoints once"),
        ({"kpt_shape": [2, 3], "flip_idx": [0, 5]}, r"flip_idx=\[0, 5\] does not name each"),
    ],
)
def test_wrong_descriptions_of_poses_are_explained(
    tmp_path: Path, description: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_parts("yolo", yolo(tmp_path, "", **description), keypoints=True)


# ---- Pascal VOC --------------------------------------------------------------------------------------------

XML = """<annotation><filename>a.png</filename><size><width>60</width><height>40</height></size>
<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object></annotation>"""


def test_voc_is_read_by_its_lists_and_counts_pixels_from_one(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("a", "b"):
        write_image(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations").mkdir(exist_ok=True)
        text = XML.format(name="cat" if name == "a" else "dog", difficult=int(name == "b"))
        (root / "Annotations" / f"{name}.xml").write_text(text.replace("a.png", f"{name}.png"))
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for part, name in (("train", "a"), ("val", "b")):
        (root / "ImageSets" / "Main" / f"{part}.txt").write_text(f"{name}\n")
    found = read_parts("voc", tmp_path)
    assert found["train"].classes == found["val"].classes == ("cat", "dog")
    assert found["train"].images[0].boxes.tolist() == [[0, 10, 30, 20]]
    assert found["val"].images[0].crowd.tolist() == [True]
    assert found["val"].images[0].file == root / "JPEGImages" / "b.png"


def test_a_truncated_xml_file_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.png")
    (tmp_path / "train" / "a.xml").write_text(XML[:60])
    with pytest.raises(DataError, match=r"a.xml is no whole xml file"):
        read_parts("voc", tmp_path)


@pytest.mark.parametrize("width", ["x", "nan", "inf"])
def test_a_size_that_is_no_number_is_named(tmp_path: Path, width: str) -> None:
    write_image(tmp_path / "train" / "a.png")
    text = XML.format(name="cat", difficult=0).replace(">60<", f">{width}<")
    (tmp_path / "train" / "a.xml").write_text(text)
    with pytest.raises(DataError, match=rf"a\.xml: width={width} is no number of pixels"):
        read_parts("voc", tmp_path)


# ---- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_grey_transparent_and_deep_images_become_rgb(tmp_path: Path, mode: str) -> None:
    image = read_rgb(write_image(tmp_path / "a.png", mode=mode))
    assert image.mode == "RGB"
    assert image.size == (60, 40)
    assert len(np.unique(np.asarray(image))) > 100


def test_a_corrupt_image_is_named(tmp_path: Path) -> None:
    file = write_image(tmp_path / "a.png")
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"a.png cannot be read as an image"):
        read_rgb(file)
