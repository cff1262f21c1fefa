"""Sources of images, their parts, and tensors that depend on seed, epoch and place alone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pictures import COLOURS, folders, picture

import zoo
from domains.vision.data import UNREADABLE, VisionData
from domains.vision.preprocess import Augment, Preprocessing
from domains.vision.sources import checked_shares, image_folder, image_table, split
from zoo.errors import CheckpointError, ConfigError, DataError

ALL = dict.fromkeys(COLOURS, 10)


def data(path: Path, model: Any = None, stage: str = "fit", **options: Any) -> VisionData:
    module = VisionData("imagefolder", path, **({"size": 16} | options))
    module.setup(stage)
    module.follow(model or zoo.create_model("biformer_digits", in_chans=options.get("channels", 3)))
    return module


# ---- folders and parts ----


def test_a_flat_folder_is_split_class_by_class(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    parts = split(image_folder(tmp_path), None, seed=0)
    assert {part: np.bincount(images.labels).tolist() for part, images in parts.items()} == {
        "train": [7, 7, 7],
        "val": [1, 1, 1],
        "test": [2, 2, 2],
    }
    names = [name for images in parts.values() for name in images.names]
    assert len(set(names)) == 30
    again, other = (split(image_folder(tmp_path), None, seed=seed) for seed in (0, 1))
    assert again["test"].names == parts["test"].names
    assert other["test"].names != parts["test"].names


def test_an_eighty_to_twenty_split_needs_no_val(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    parts = split(image_folder(tmp_path), (0.8, 0.0, 0.2), seed=0)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [24, 0, 6]


def test_a_lone_folder_on_the_way_is_entered(tmp_path: Path) -> None:
    folders(tmp_path / "UCMerced_LandUse" / "Images", ALL)
    assert image_folder(tmp_path).classes == ["blue", "green", "red"]


def test_parts_in_folders_are_kept(tmp_path: Path) -> None:
    for i, part in enumerate(("train", "val", "test")):
        folders(tmp_path / part, {"red": 3 + i, "blue": 2}, first=10 * i)
    parts = split(image_folder(tmp_path), None, seed=0)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [5, 6, 7]


def test_without_a_test_folder_val_is_tested(tmp_path: Path) -> None:
    folders(tmp_path / "train", ALL)
    folders(tmp_path / "valid", {"red": 2, "blue": 2}, first=50)
    parts = split(image_folder(tmp_path), None, seed=0)
    assert parts["val"] is parts["test"]


def test_without_a_val_folder_part_of_train_is_val(tmp_path: Path) -> None:
    folders(tmp_path / "train", ALL)
    folders(tmp_path / "test", {"red": 2, "blue": 2}, first=50)
    parts = split(image_folder(tmp_path), None, seed=0)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [27, 3, 4]


def test_a_lone_image_of_a_class_is_trained_on_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders(tmp_path, {"red": 10, "blue": 1, "green": 2})
    with caplog.at_level(logging.WARNING):
        parts = split(image_folder(tmp_path), None, seed=0)
    assert "one image only of the class blue" in caplog.text
    assert np.bincount(parts["train"].labels).tolist() == [1, 1, 7]
    assert np.bincount(parts["test"].labels, minlength=3).tolist() == [0, 1, 2]


def test_a_class_that_only_the_val_folder_has_is_named(tmp_path: Path) -> None:
    folders(tmp_path / "train", {"red": 2, "blue": 2})
    folders(tmp_path / "val", {"red": 2, "green": 2})
    with pytest.raises(DataError, match=r"val has the class green that the training part does not have"):
        image_folder(tmp_path)


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder .*nowhere"):
        image_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no class folders"):
        image_folder(tmp_path)
    folders(tmp_path, {"red": 2, "blue": 2})
    (tmp_path / "green").mkdir()
    (tmp_path / "green" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"green has no images: fill it or remove it"):
        image_folder(tmp_path)


def test_one_class_cannot_be_told_apart(tmp_path: Path) -> None:
    folders(tmp_path, {"red": 5})
    with pytest.raises(DataError, match="one class only, 'red'"):
        VisionData("imagefolder", tmp_path).setup()


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.7, 0.2, 0.2), (1.2, -0.2, 0.0)])
def test_shares_add_up(shares: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        checked_shares(shares)


# ---- corrupt files ----


def damaged(root: Path) -> Path:
    folders(root, ALL)
    (root / "red" / "red_3.png").write_bytes((root / "red" / "red_3.png").read_bytes()[:200])
    (root / "blue" / "blue_1.png").write_text("no image")
    return root


def test_corrupt_files_stop_training_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"2 of 30 files cannot be read: blue/blue_1.png .*data\.corrupt=skip"
    ):
        data(damaged(tmp_path))


def test_corrupt_files_are_left_out_on_request_and_counted(tmp_path: Path) -> None:
    module = data(damaged(tmp_path), corrupt="skip")
    assert sum(len(images) for images in module.parts.values()) == 28
    assert [reason.split()[0] for reason in module.unreadable] == ["blue/blue_1.png", "red/red_3.png"]


def test_damage_within_a_file_is_met_when_it_is_loaded(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    strict, lenient = data(tmp_path), data(tmp_path, corrupt="skip")
    file = Path(str(lenient.parts["train"].files[0]))  # pyright: ignore[reportOptionalSubscript]
    file.write_text("no image any more")
    with pytest.raises(DataError, match=rf"{file.name}.*data\.corrupt=skip"):
        strict.train_set[0]
    blank = lenient.train_set[0]
    assert blank["label"] == UNREADABLE
    batch = VisionData.collate([blank, lenient.train_set[1]])
    assert batch["index"].tolist() == [1]
    assert VisionData.collate([blank])["label"].tolist() == [UNREADABLE]


# ---- tables and torchvision ----


def table(root: Path, **columns: list[str]) -> Path:
    pd.DataFrame(columns).to_csv(root / "labels.csv", index=False)
    return root / "labels.csv"


def test_a_table_gives_paths_labels_and_parts(tmp_path: Path) -> None:
    folders(tmp_path / "images", {"red": 2, "blue": 2})
    files = ["red/red_0.png", "red/red_1.png", "blue/blue_0.png", "blue/blue_1.png"]
    path = table(tmp_path, file=files, label=["10", "10", "9", "9"], split=["train", "test", "train", "val"])
    collection = image_table(path, root=tmp_path / "images")
    assert collection.classes == ["9", "10"]
    assert {part: images.names for part, images in collection.parts.items()} == {
        "train": ["red/red_0.png", "blue/blue_0.png"],
        "test": ["red/red_1.png"],
        "val": ["blue/blue_1.png"],
    }
    assert collection.parts["train"].labels.tolist() == [1, 0]
    assert collection.parts["train"].read(1).getpixel((0, 0))[2] > 100


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a"], "label": ["x"]}, r"no column for the path.*data\.path_column.*name, label"),
        ({"path": ["red/red_0.png"], "label": [""]}, r"row 2 has no label"),
        (
            {"path": ["red/red_9.png"], "label": ["x"]},
            r"1 files that are not there: .*red_9\.png.*data\.root",
        ),
        (
            {"path": ["red/red_0.png"], "label": ["x"], "split": ["hold"]},
            r"row 2: split 'hold' is not one of",
        ),
    ],
)
def test_tables_that_cannot_be_used_say_why(columns: dict, message: str, tmp_path: Path) -> None:
    folders(tmp_path, {"red": 1})
    with pytest.raises(DataError, match=message):
        image_table(table(tmp_path, **columns))


def test_a_data_set_of_torchvision_is_split_where_it_is_not() -> None:
    module = VisionData("torchvision", dataset="FakeData", split=(0.9, 0.05, 0.05))
    module.setup()
    assert module.class_names == [str(i) for i in range(10)]
    assert module.parts["train"].read(0).size == (224, 224)


def test_torchvision_mistakes_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"dataset": "CIFAR11"}, "CIFAR10"),
        ({"dataset": "CIFAR10"}, r"needs data\.root"),
        ({}, r"needs data\.dataset"),
    ):
        with pytest.raises(ConfigError, match=message):
            VisionData("torchvision", **options).setup()
    with pytest.raises(DataError, match=r"data\.download=true"):
        VisionData("torchvision", dataset="CIFAR10", root=tmp_path).setup()


def test_the_embedded_digits_are_cut_in_the_order_of_the_file() -> None:
    module = VisionData("digits")
    module.setup()
    assert {part: len(images) for part, images in module.parts.items()} == {
        "train": 898,
        "val": 450,
        "test": 449,
    }
    assert module.parts["test"].names[0] == "digit 1348"


# ---- tensors ----


def test_augmentation_depends_on_seed_epoch_and_place_alone(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    strong = {
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.5,
        "color_jitter": 0.4,
        "train_interpolation": "random",
    }
    first, second = (data(tmp_path, augment=strong, seed=3) for _ in range(2))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    image = first.train_set[4]["image"]
    assert torch.equal(torch.get_rng_state(), before)
    for i in (7, 4):
        again = second.train_set[i]["image"]
    assert torch.equal(image, again)
    first.train_set.set_epoch(1)
    assert not torch.equal(first.train_set[4]["image"], image)
    copy = first.train_set[4 + len(first.train_set)]
    assert copy["index"] == 4
    assert not torch.equal(copy["image"], first.train_set[4]["image"])


def test_workers_give_the_batches_of_one_process(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    alone, helped = (
        data(tmp_path, num_workers=n, batch_size=4, augment={"reprob": 0.5}).train_dataloader()
        for n in (0, 2)
    )
    for loader in (alone, helped):
        loader.batch_sampler.sampler.set_epoch(2)  # pyright: ignore[reportAttributeAccessIssue]
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


def test_repeated_augmentation_puts_copies_into_one_batch(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    module = data(tmp_path, batch_size=6, augment={"aug_repeats": 3})
    batches = list(module.train_dataloader())
    assert sum(len(batch["index"]) for batch in batches) == 21
    for batch in batches[:-1]:
        assert len(batch["index"].unique()) == 2
        assert not torch.equal(batch["image"][0], batch["image"][1])


def test_preprocessing_is_the_models_unless_given(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    model = zoo.create_model("biformer_tiny", num_classes=3)
    module = VisionData("imagefolder", tmp_path, crop_pct=1.0, mean=0.5)
    module.setup()
    module.follow(model)
    stored = Preprocessing(**module.extra()["preprocessing"])
    assert (stored.size, stored.interpolation, stored.crop_pct) == ((224, 224), "bicubic", 1.0)
    assert stored.mean == (0.5, 0.5, 0.5)
    assert stored.std == (0.229, 0.224, 0.225)
    assert module.test_set[0]["image"].shape == (3, 224, 224)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_of_any_channels_become_tensors(channels: int, tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    if channels == 4:
        for file in tmp_path.rglob("*.png"):
            np.save(
                file.with_suffix(".npy"),
                np.dstack([np.asarray(picture("red", 1)), np.full((24, 28), 9)]).astype(np.uint8),
            )
            file.unlink()
    module = data(tmp_path, channels=channels)
    assert module.train_set[0]["image"].shape == (channels, 16, 16)
    assert module.test_set[0]["image"].shape == (channels, 16, 16)


def test_one_channel_is_the_grey_of_the_image(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    grey = data(tmp_path, channels=1, mean=0.0, std=1.0, crop_pct=1.0).test_set[0]["image"]
    rgb = data(tmp_path, mean=0.0, std=1.0, crop_pct=1.0).test_set[0]["image"]
    expected = 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]
    torch.testing.assert_close(grey[0], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 2}, "probability"),
        ({"mixup_mode": "all"}, "batch, pair, elem"),
        ({"scale": (1.0, 0.5)}, "lowest, highest"),
        ({"mixp": 0.1}, "mixup"),
    ],
)
def test_augmentation_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment.from_config(options)


def test_an_unknown_policy_is_named(tmp_path: Path) -> None:
    folders(tmp_path, ALL)
    with pytest.raises(ConfigError, match=r"data\.augment.*RandAugment"):
        data(tmp_path, augment={"aa": "rand-m9-x7"})


# ---- classes by name ----


def test_classes_are_matched_by_name_not_by_place(tmp_path: Path) -> None:
    folders(tmp_path, {"red": 3, "blue": 3})
    module = VisionData("imagefolder", tmp_path)
    module.setup("test")
    assert len(module.parts["test"]) == 6
    module.number_as(["red", "green", "blue"], "weights")
    assert sorted(module.parts["test"].labels.tolist()) == [0, 0, 0, 2, 2, 2]
    assert all(
        name.startswith("red") == (label == 0)
        for name, label in zip(module.parts["test"].names, module.parts["test"].labels, strict=True)
    )


def test_a_class_that_weights_do_not_know_is_named(tmp_path: Path) -> None:
    folders(tmp_path, {"red": 3, "blue": 3})
    module = VisionData("imagefolder", tmp_path)
    module.setup("test")
    with pytest.raises(CheckpointError, match=r"weights does not know 1 of the 2 classes.*'blue'"):
        module.number_as(["red", "green"], "weights")
