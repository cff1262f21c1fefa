"""The data that a config of mmdet names, read and trained on by the zoo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import QUIET, zoo

from domains.detection.annotations import Collection
from domains.detection.data import DetectionData
from domains.detection.sources.openmmlab import read_mmdet
from zoo.errors import ConfigError, DataError, MissingExtra
from zoo.paths import config_dir

FILE = "annotations/instances_val2017.json"
CLASSES = ("cat", "dog")


def written(folder: Path, *objects: tuple[int, int], names: tuple[str, str] = CLASSES) -> Path:
    """A json file of two images, without the images; objects by number of image and of category, 3 or 17."""
    sides = {"height": 40, "width": 60}
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", **sides} for i in (1, 2)],
        "categories": [{"id": i, "name": name} for i, name in zip((3, 17), names, strict=True)],
        "annotations": [
            {"id": i, "image_id": image, "category_id": category, "bbox": [5, 6, 20, 10]}
            for i, (image, category) in enumerate(objects, 1)
        ],
    }
    path = folder / FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content))
    return folder


def two_images(folder: Path) -> Path:
    """A cat and a dog on the first image, a dog on the second."""
    return written(folder, (1, 3), (1, 17), (2, 17))


def config(folder: Path, dataset: str, more: str = "", name: str = "own.py") -> Path:
    """A config whose training data are `dataset`, in python."""
    path = folder / name
    path.write_text(f"root = {str(folder)!r}\ntrain_dataloader = dict(dataset={dataset})\n{more}\n")
    return path


def coco(classes: str = "('cat', 'dog')", file: str = FILE, root: str = "root") -> str:
    metainfo = f"metainfo=dict(classes={classes})," if classes else ""
    return (
        f"dict(type='CocoDataset', data_root={root}, ann_file={file!r}, {metainfo}"
        "data_prefix=dict(img='val2017/'))"
    )


def summary(part: Collection) -> dict[str, Any]:
    return {
        "classes": part.classes,
        "ids": part.category_ids,
        "labels": [image.labels.tolist() for image in part.images],
        "files": [image.file.parent.name for image in part.images],
    }


@pytest.mark.usefixtures("mmdet")
def test_files_classes_and_images_are_those_of_the_config(tmp_path: Path) -> None:
    folder = two_images(tmp_path)
    wrapped = f"dict(type='RepeatDataset', times=3, dataset={coco()})"
    absolute = str(written(tmp_path / "b", (2, 17)) / FILE)
    path = config(
        folder, wrapped, f"val_dataloader = dict(dataset={coco(file=absolute)})\ntest_dataloader = None"
    )
    found = read_mmdet(path)
    assert {part: summary(of) for part, of in found.items()} == {
        "train": {
            "classes": ("cat", "dog"),
            "ids": (3, 17),
            "labels": [[0, 1], [1]],
            "files": ["val2017", "val2017"],
        },
        "val": {"classes": ("cat", "dog"), "ids": (3, 17), "labels": [[], [1]], "files": ["val2017"] * 2},
    }


@pytest.mark.usefixtures("mmdet")
def test_other_classes_are_left_out_and_counted(tmp_path: Path) -> None:
    path = config(two_images(tmp_path), coco("('dog',)"))
    part = read_mmdet(path)["train"]
    assert summary(part) == {
        "classes": ("dog",),
        "ids": (17,),
        "labels": [[0], [0]],
        "files": ["val2017"] * 2,
    }
    assert part.findings.counts == {"objects are of no class of the config: cat": 1}
    everything = read_mmdet(config(tmp_path, coco("")))["train"]
    assert everything.classes == ("cat", "dog"), "without metainfo the classes of COCO, as in mmdet"


@pytest.mark.usefixtures("mmdet")
def test_keypoints_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    file = two_images(tmp_path) / FILE
    content = json.loads(file.read_text())
    content["categories"][1]["keypoints"] = ["left_ear", "right_ear"]
    content["annotations"][2]["keypoints"] = [6, 7, 2, 9, 8, 1]
    file.write_text(json.dumps(content))
    part = read_mmdet(config(tmp_path, coco("('dog',)")), keypoints=True)["train"]
    assert part.skeleton is not None
    assert part.skeleton.names == ("left_ear", "right_ear")
    assert part.images[1].keypoints is not None
    assert part.images[1].keypoints.tolist() == [[[6, 7, 2], [9, 8, 1]]]


@pytest.mark.usefixtures("mmdet")
def test_a_test_part_that_is_the_val_part_is_read_once(tmp_path: Path) -> None:
    loaders = f"val_dataloader = dict(dataset={coco()})\ntest_dataloader = val_dataloader"
    assert list(read_mmdet(config(two_images(tmp_path), coco(), loaders))) == ["train", "val"]


@pytest.mark.usefixtures("mmdet")
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("dict(type='CocoDataset', data_root=root)", r"train_dataloader has no dataset\.ann_file"),
        ("dict(type='VOCDataset', ann_file='a')", "data of type VOCDataset; CocoDataset is read"),
        ("dict(type='ConcatDataset', datasets=[])", "data of type ConcatDataset"),
        ("dict(type='RepeatDataset', times=2)", "data of type None"),
        ("'coco'", "data of type coco"),
        (coco(file="gone.json"), r"own\.py: train_dataloader: .*gone\.json cannot be read: No such file"),
        (coco("('cat', 'horse')"), r"the class 'horse'; .*instances_val2017\.json has cat, dog"),
    ],
)
def test_data_that_cannot_be_read_are_explained(tmp_path: Path, dataset: str, message: str) -> None:
    path = config(two_images(tmp_path), dataset)
    with pytest.raises(DataError, match=message):
        read_mmdet(path)


@pytest.mark.usefixtures("mmdet")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_dataloader = dict(", r"own\.py cannot be read as a config"),
        ("_base_ = ['gone.py']", r"own\.py cannot be read as a config: .*gone\.py"),
        ("model = dict(type='RetinaNet')", "has no train_dataloader"),
    ],
)
def test_configs_that_cannot_be_read_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_mmdet(path)


@pytest.mark.usefixtures("mmdet")
def test_classes_that_are_none_of_coco_have_to_be_named(tmp_path: Path) -> None:
    written(tmp_path, (1, 3), names=("wheel", "cog"))
    with pytest.raises(DataError, match=r"has wheel, cog\. Name them in the config: metainfo="):
        read_mmdet(config(tmp_path, coco("")))


@pytest.mark.usefixtures("mmdet")
def test_the_zoo_trains_on_the_data_of_a_worked_config(people: Path, tmp_path: Path) -> None:
    path = config_dir() / "mmdet" / "retinanet_biformer_tiny_few.py"
    run = tmp_path / "run"
    sizes = ("data.short=64", "data.long=64", "data.augment.scales=[64]", "data.augment.crop=0")
    zoo(
        "train",
        "domain=detection",
        "data=mmdet",
        f"data.path={path}",
        *sizes,
        "data.batch_size=2",
        "data.num_workers=0",
        "trainer.max_epochs=1",
        *QUIET,
        f"run_dir={run}",
    )
    results = json.loads((run / "results.json").read_text())
    assert results["images"] == {"train": 4, "val": 4, "test": 4}
    assert list(results["classes"]) == ["person"]


def test_mmengine_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmengine.config", None)
    path = config(tmp_path, coco())
    with pytest.raises(MissingExtra, match=r"own\.py is a config of mmdet.*attention-zoo\[mmdet\]"):
        DetectionData("mmdet", path).setup()
    with pytest.raises(ConfigError, match=r"data=mmdet needs data\.path=CONFIG\.py"):
        DetectionData("mmdet").setup()
