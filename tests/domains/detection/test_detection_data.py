"""Targets, random views, batches, and the split of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotated_small import PERSON, SHAPES, box, pose, two_images, write_coco, write_image
from PIL import Image

from domains.detection.augment import Augment, View, clipped, cropped, mirrored, resized, target_size
from domains.detection.data import DetectionData
from domains.detection.keypoints import COCO
from zoo.errors import CheckpointError, ConfigError, DataError


def view(boxes: list[list[float]], keypoints: np.ndarray | None = None) -> View:
    image = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 60, 3))
    array = np.array(boxes, np.float64).reshape(-1, 4)
    areas = (array[:, 2:] - array[:, :2]).prod(1)
    return View(image, array, np.arange(len(array)), areas, keypoints)


def data(folder: Path, **options: Any) -> DetectionData:
    made = DetectionData(
        **({"name": "coco", "path": folder, "short": 40, "long": 60, "batch_size": 2} | options)
    )
    made.prepare_data()
    made.setup()
    return made


def files(folder: Path, count: int = 10, **options: Any) -> Path:
    annotations = [box(i, i, (5, 6, 20, 10), 3 if i % 2 else 17) for i in range(1, count + 1)]
    return write_coco(folder, annotations, SHAPES, images=count, **options)


# ---- views -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),
        ((640, 480), (1066, 800)),
        ((300, 900), (444, 1332)),
        ((427, 640), (800, 1199)),
        ((800, 1000), (800, 1000)),
    ],
)
def test_the_size_of_evaluation_is_the_published_rule(size: tuple[int, int], expected: Any) -> None:
    assert target_size(size, 800, 1333) == expected


def test_a_mirror_image_swaps_sides_and_moves_boxes() -> None:
    points = np.zeros((1, 17, 3))
    points[0, COCO.names.index("left_wrist")] = (10, 20, 2)
    flipped = mirrored(view([[5, 6, 25, 16]], points), COCO)
    assert flipped.boxes.tolist() == [[35, 6, 55, 16]]
    assert flipped.keypoints is not None
    assert flipped.keypoints[0, COCO.names.index("right_wrist")].tolist() == [49, 20, 2]
    assert flipped.keypoints[0, COCO.names.index("left_wrist"), 2] == 0
    original = np.asarray(view([]).image)
    assert (np.asarray(flipped.image)[:, ::-1] == original).all()


def test_a_cut_filters_boxes_labels_areas_and_keypoints_by_one_mask() -> None:
    points = np.stack([np.full((17, 3), value) for value in (8.0, 30.0, 50.0)])
    whole = view([[2, 2, 9, 9], [20, 10, 40, 30], [45, 20, 58, 38]], points)
    part = cropped(whole, 5, 25, 30, 30)
    assert part.labels.tolist() == [1, 2]
    assert part.boxes.tolist() == [[0, 5, 15, 25], [20, 15, 30, 30]]
    assert part.area.tolist() == [300.0, 150.0]
    assert part.keypoints is not None
    assert part.keypoints[:, 0, :2].tolist() == [[5, 25], [25, 30]]
    assert part.keypoints[:, 0, 2].tolist() == [30, 50]


def test_scaling_moves_everything_alike() -> None:
    points = np.full((1, 17, 3), 2.0)
    large = resized(view([[2, 4, 10, 20]], points), (80, 180))
    assert large.boxes.tolist() == [[6, 8, 30, 40]]
    assert large.area.tolist() == [128 * 6]
    assert large.keypoints is not None
    assert large.keypoints[0, 0].tolist() == [6, 4, 2]


def test_boxes_are_clipped_and_keep_their_area() -> None:
    inside = clipped(view([[-10, 0, 20, 20], [55, 35, 80, 50]]))
    assert inside.boxes.tolist() == [[0, 0, 20, 20], [55, 35, 60, 40]]
    assert inside.area.tolist() == [600.0, 375.0]


def test_random_views_hold_what_they_say() -> None:
    augment = Augment(scales=(32, 48), long=80, crop=0.5, crop_scales=(30, 40), crop_size=(15, 30))
    draw = np.random.default_rng(0)
    counts = set()
    for _ in range(60):
        found = augment(view([[5, 6, 25, 16], [40, 20, 60, 40]]), None, draw)
        assert min(found.size) in (32, 48) or max(found.size) in range(79, 81)
        assert found.boxes.min(initial=0) >= 0
        assert (found.boxes <= np.array([found.size[1], found.size[0]] * 2) + 1e-9).all()
        assert len(found.boxes) == len(found.labels) == len(found.area)
        counts.add(len(found.boxes))
    assert {1, 2} <= counts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 2.0}, "data.augment.flip=2.0"),
        ({"scales": [480], "long": 100}, "data.augment.scales"),
        ({"crop_size": [3]}, "data.augment.crop_size"),
    ],
)
def test_augmentation_out_of_range_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**options)


# ---- targets and batches -----------------------------------------------------------------------------------


def test_targets_are_parts_of_the_image(tmp_path: Path) -> None:
    made = data(files(tmp_path))
    target = made.test_set[0]["target"]
    torch.testing.assert_close(target["boxes"], torch.tensor([[15 / 60, 11 / 40, 20 / 60, 10 / 40]]))
    torch.testing.assert_close(target["area"], torch.tensor([200 / 2400]))
    assert made.extra()["category_ids"] == [3, 17]
    assert made.model_kwargs() == {"num_classes": 2}


def test_crowds_and_people_without_keypoints_are_no_targets(tmp_path: Path) -> None:
    annotations = [
        pose(1, 1, (5, 5, 20, 20)),
        pose(2, 1, (30, 5, 20, 20), labelled=0),
        pose(3, 1, (5, 5, 40, 30), iscrowd=1),
        pose(4, 2, (5, 5, 20, 20), labelled=5),
        pose(5, 3, (5, 5, 20, 20), labelled=0),
    ]
    folder = write_coco(tmp_path, annotations, [PERSON], images=3)
    file = folder / "annotations" / "instances_val2017.json"
    made = data(folder, path=None, train=file, val=file, test=file, keypoints=True)
    assert [len(image) for image in made.parts["train"].images] == [3, 1]
    assert made.parts["train"].findings.counts["images without a pose are not trained on"] == 1
    assert len(made.val_set) == 3
    target = made.train_set[0]["target"]
    assert target["keypoints"].shape == (1, 17, 2)
    assert made.val_set[1]["target"]["visible"].sum() == 5
    assert made.model_kwargs() == {"num_classes": 1, "num_keypoints": 17}


def test_training_views_depend_on_epoch_and_index_alone(tmp_path: Path) -> None:
    made = data(files(tmp_path), augment={"scales": [32, 40, 48], "long": 80, "crop": 0.0})
    first = [made.train_set[i]["image"] for i in range(len(made.train_set))]
    again = [made.train_set[i]["image"] for i in range(len(made.train_set))]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    made.train_set.set_epoch(1)
    other = [made.train_set[i]["image"] for i in range(len(made.train_set))]
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_training_batches_are_padded_and_tested_ones_parted_by_size(tmp_path: Path) -> None:
    made = data(files(tmp_path))
    large = made.test_set[0] | {"image": torch.ones(3, 50, 44)}
    tested = made.collate([made.test_set[0], large, made.test_set[0]])
    assert [len(part["images"]) for part in tested] == [2, 1]
    assert all(part["mask"] is None for part in tested)
    (trained,) = made.collate([made.train_set[0], large | {"whole": False}])
    assert trained["images"].shape == (2, 3, 50, 60)
    assert trained["mask"][1, 49, 43].item() is False
    assert trained["mask"][1, 49, 44].item() is True
    assert trained["mask"][0, 40, 0].item() is True


def test_data_without_parts_are_split_and_tested_as_a_whole(tmp_path: Path) -> None:
    folder = files(tmp_path)
    file = folder / "annotations" / "instances_val2017.json"
    made = data(file, split=[0.6, 0.2, 0.2])
    assert {part: len(found) for part, found in made.parts.items()} == {"train": 6, "val": 2, "test": 2}
    ids = [image.id for part in made.parts.values() for image in part.images]
    assert sorted(ids) == list(range(1, 11))
    tested = DetectionData("coco", file)
    tested.setup("test")
    assert len(tested.parts["test"]) == 10


def test_images_that_are_missing_corrupt_or_of_another_size_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = files(tmp_path)
    (folder / "val2017" / "001.png").unlink()
    (folder / "val2017" / "002.png").write_bytes(b"nothing")
    write_image(folder / "val2017" / "003.png", (30, 30))
    options = {"path": folder / "annotations/instances_val2017.json", "images": folder / "val2017"}
    with pytest.raises(DataError, match=r"There is no image .*001.png \(image id 1\)"):
        data(folder, **options)
    made = data(folder, **options, corrupt="skip")
    printed = capsys.readouterr().out
    assert "Left out: 3 images cannot be used" in printed
    assert "003.png (image id 3) has 30x30 pixels, its annotations are of 60x40" in printed
    assert sum(len(found) for found in made.parts.values()) == 7


def test_dropped_boxes_are_reported_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = [box(i, i, (5, 6, 20, 10), 3) for i in range(1, 6)] + [box(9, 1, (5, 6, -1, 4), 3)]
    folder = write_coco(tmp_path, annotations, SHAPES, images=5)
    data(folder, path=folder / "annotations/instances_val2017.json")
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 boxes of no size are left out:" in printed
    assert "annotation 9" in printed
    with pytest.raises(DataError, match="annotation 9"):
        data(folder, path=folder / "annotations/instances_val2017.json", invalid="error")


def test_a_part_with_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    folder = write_coco(tmp_path, [box(1, 1, (1, 1, 9, 9), 3)], SHAPES, images=4)
    with pytest.raises(DataError, match="has no objects to learn from"):
        data(folder, path=folder / "annotations/instances_val2017.json", split=[0.5, 0.25, 0.25])


def test_weights_number_the_classes(tmp_path: Path) -> None:
    made = data(files(tmp_path))
    facts = {"classes": [None, "dog", "bird", "cat"], "skeleton": None, "short": 40, "long": 60}
    made.follow(facts, "run")
    assert made.test_set[0]["target"]["labels"].tolist() == [3]
    assert made.extra()["classes"] == [None, "dog", None, "cat"]
    assert made.extra()["category_ids"] == [None, 17, None, 3]
    with pytest.raises(CheckpointError, match=r"run tells 1 classes apart \(dog\); the data also have cat"):
        made.follow(facts | {"classes": ["dog"]}, "run")
    with pytest.raises(DataError, match=r"data.keypoints=true"):
        made.follow(facts | {"skeleton": {"names": ["tip"]}}, "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cocoo"}, "data.name=cocoo is not one of .* Did you mean 'coco'"),
        ({"invalid": "skip"}, "data.invalid=skip"),
        ({"short": 100, "long": 50}, "1 <= short <= long"),
        ({"augment": {"flipp": 0.1}}, "data.augment.flipp. Did you mean 'flip'"),
        ({"split": [1.0]}, "three shares"),
        ({"count": [1, 0, 1]}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DetectionData(**options)


def test_files_are_described(tmp_path: Path) -> None:
    facts, rows = DetectionData.describe(two_images(tmp_path))
    assert facts["val"] == "2 images, 3 objects"
    assert rows == [{"class": "cat", "val": "1"}, {"class": "dog", "val": "2"}]
