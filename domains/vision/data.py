"""Labelled images for training: a source, its parts, and how pictures become tensors.

Shapes: B images of C channels, H x W.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from domains.vision.images import Picture, check_image
from domains.vision.preprocess import PREPROCESSING_OPTIONS, Augment, Preprocessing
from domains.vision.sources import (
    PARTS,
    Collection,
    Images,
    digits,
    image_folder,
    image_table,
    split,
    torchvision_dataset,
)
from zoo.cli.console import console
from zoo.errors import CheckpointError, ConfigError, DataError, did_you_mean
from zoo.training.data import DataModule, drawn_from

log = logging.getLogger(__name__)

SOURCES = ("digits", "imagefolder", "image_table", "torchvision")
UNREADABLE = -1
"""The label of a blank image in place of one that could not be read."""


class ImageDataset(Dataset):
    """Pictures as tensors, with label and place: `{"image": (C, H, W), "label": int, "index": int}`.

    Args:
        images: the part.
        transform: from a picture to a tensor.
        seed: with the epoch and the index, all that a random transform depends on; None: it is not random.
        blank: shape of the image, with label `UNREADABLE`, in place of one that cannot be read; None: that is
            an error.
    """

    def __init__(
        self,
        images: Images,
        transform: Callable[[Picture], Tensor],
        *,
        seed: int | None = None,
        blank: tuple[int, ...] | None = None,
    ) -> None:
        self.images, self.transform, self.seed, self.blank, self.epoch = images, transform, seed, blank, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        copy, place = divmod(index, len(self.images))
        try:
            picture = self.images.read(place)
        except DataError as error:
            if self.blank is None:
                raise DataError(f"{error} Mend or remove it, or set data.corrupt=skip.") from None
            log.warning("skipped: %s", error)
            return {"image": torch.zeros(self.blank), "label": UNREADABLE, "index": place}
        image = self._transformed(picture, place, copy)
        return {"image": image, "label": int(self.images.labels[place]), "index": place}

    def _transformed(self, picture: Picture, place: int, copy: int) -> Tensor:
        if self.seed is None:
            return self.transform(picture)
        with drawn_from(self.seed, self.epoch, place, copy):
            return self.transform(picture)


class VisionData(DataModule):
    """Images of classes from class folders, a table, torchvision, or the embedded digits.

    Sizes, normalisation and filter are those of the model (`follow`), save what is given here.

    Args:
        name: `digits`, `imagefolder`, `image_table` or `torchvision`; see `domains.vision.sources`.
        path: the folder of class folders, or the table.
        root: folder of a table's relative paths, or of torchvision's files.
        dataset, download: name of a class of `torchvision.datasets`; fetch it if it is not there.
        path_column, label_column, split_column: names of a table's columns; None finds the usual ones.
        split: shares of train, val and test where the source is not split; None is 70, 10 and 20 %, drawn
            class by class, for digits 50, 25 and 25 %, in the order of the file.
        split_seed: of the draw.
        channels: 3, 1 (grey), or the bands of `.npy` and TIFF files.
        size, interpolation, crop_pct, crop_mode, mean, std, max_value: see `Preprocessing`.
        augment: see `Augment`.
        corrupt: `error` or `skip` an image that cannot be read. First and last bytes of every file are looked
            at before training, all of it when it is loaded.
        baselines: measure simple classifiers on the same split.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the images cannot be used.
    """

    parts: dict[str, Images]
    class_names: list[str]
    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset

    def __init__(
        self,
        name: str = "digits",
        path: str | Path | None = None,
        *,
        root: str | Path | None = None,
        dataset: str | None = None,
        download: bool = False,
        path_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        split: Sequence[float] | None = None,
        split_seed: int = 0,
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        max_value: float | None = None,
        augment: Mapping[str, Any] | None = None,
        corrupt: str = "error",
        baselines: bool = True,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if name not in SOURCES:
            raise ConfigError(
                f"data.name={name} is not one of {', '.join(SOURCES)}.{did_you_mean(name, SOURCES)}"
            )
        if corrupt not in ("error", "skip"):
            raise ConfigError(f"data.corrupt={corrupt} is not one of error, skip.")
        if channels < 1:
            raise ConfigError(f"data.channels={channels}: at least 1 is needed.")
        self.name, self.path, self.root, self.dataset, self.download = name, path, root, dataset, download
        self.columns = {"path": path_column, "label": label_column, "split": split_column}
        self.split, self.split_seed, self.channels = split, split_seed, channels
        self.size_given = _pair(size)
        self.given = {
            "size": self.size_given,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": crop_mode,
            "mean": _each(mean, channels),
            "std": _each(std, channels),
            "max_value": max_value,
        }
        self.max_value = max_value
        self.augment = Augment.from_config(augment)
        self.repeats = self.augment.aug_repeats
        self.corrupt, self.baselines = corrupt, baselines
        self.unreadable: list[str] = []
        self.preprocessing: Preprocessing | None = None

    # ---- reading -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch a data set of torchvision, if that is asked for."""
        if self.name == "torchvision" and self.download:
            self._collection()

    def setup(self, stage: str | None = None) -> None:
        """Find, check and split the images; once, whatever the stage.

        Args:
            stage: `test`, of images that nothing is trained on: all are tested where neither the source nor
                `split` says which.
        """
        if hasattr(self, "parts"):
            return
        collection = self._readable(self._collection())
        self.class_names = collection.classes
        if stage == "test" and (self.split is None or "test" in collection.parts):
            self.parts = _tested(collection)
        else:
            self.parts = split(collection, self.split, self.split_seed)
        self._check(stage)

    def _collection(self) -> Collection:
        reading: dict[str, Any] = {"channels": self.channels, "max_value": self.max_value}
        if self.name == "digits":
            return digits(self.split)
        if self.name == "torchvision":
            if not self.dataset:
                raise ConfigError("data=torchvision needs data.dataset=NAME, for example CIFAR10.")
            return torchvision_dataset(self.dataset, root=self.root, download=self.download)
        if self.path is None:
            what = "the folder of class folders" if self.name == "imagefolder" else "a table of paths, labels"
            raise ConfigError(f"data={self.name} needs data.path: {what}.")
        if self.name == "imagefolder":
            return image_folder(self.path, **reading)
        return image_table(self.path, root=self.root, columns=self.columns, **reading)

    def _readable(self, collection: Collection) -> Collection:
        """Without the files whose first or last bytes show that they are damaged, if these may be skipped."""
        kept = {part: self._readable_part(images) for part, images in collection.parts.items()}
        if not self.unreadable:
            return collection
        shown = "; ".join(self.unreadable[:5]) + (" ..." if len(self.unreadable) > 5 else "")
        total = sum(len(images) for images in collection.parts.values())
        message = f"{collection.source}: {len(self.unreadable)} of {total} files cannot be read: {shown}."
        if self.corrupt == "error":
            raise DataError(f"{message} Mend or remove them, or set data.corrupt=skip.")
        log.warning("%s They are left out.", message)
        console.print(f"Left out {len(self.unreadable)} of {total} images that cannot be read: {shown}")
        return Collection(collection.classes, kept, collection.source)

    def _readable_part(self, images: Images) -> Images:
        if images.files is None:
            return images
        good = []
        files = track(images.files, "Looking at the files", console=console, transient=True)
        for i, file in enumerate(files if len(images) > 500 else images.files):
            reason = check_image(file, self.channels)
            if reason is None:
                good.append(i)
            else:
                self.unreadable.append(f"{images.names[i]} ({reason})")
        return images.select(good)

    def _check(self, stage: str | None) -> None:
        counts = {part: len(images) for part, images in self.parts.items()}
        console.print(
            f"Images: {counts['train']} train, {counts['val']} val, {counts['test']} test; "
            f"{len(self.class_names)} classes",
            highlight=False,
        )
        if stage == "test":
            return
        if len(self.class_names) < 2:
            raise DataError(
                f"There is one class only, {self.class_names[0]!r}: at least two are needed to tell apart."
            )
        for part in ("train", "test"):
            if not counts[part]:
                raise DataError(f"No image is left for the {part} part: see data.split, or give more images.")

    # ---- bound to a model --------------------------------------------------------------------------------

    def follow(self, model: nn.Module) -> None:
        """Prepare images as the model's `pretrained_cfg` says, save what was given."""
        self.use(Preprocessing.of(model, channels=self.channels, **self.given))

    def use(self, preprocessing: Preprocessing) -> None:
        """Prepare images in this way from now on."""
        self.preprocessing = preprocessing
        evaluation, training = preprocessing.evaluation(), preprocessing.training(self.augment)
        blank = (self.channels, *preprocessing.size) if self.corrupt == "skip" else None
        self.train_set = ImageDataset(self.parts["train"], training, seed=self.seed, blank=blank)
        self.val_set = ImageDataset(self.parts["val"], evaluation, blank=blank)
        self.test_set = ImageDataset(self.parts["test"], evaluation, blank=blank)

    def number_as(self, classes: Sequence[str], source: str) -> None:
        """Count the labels as weights with these classes do.

        Raises:
            CheckpointError: a class that the weights do not know.
        """
        places = {name: i for i, name in enumerate(classes)}
        if unknown := [name for name in self.class_names if name not in places]:
            shown = ", ".join(repr(name) for name in unknown[:5])
            raise CheckpointError(
                f"{source} does not know {len(unknown)} of the {len(self.class_names)} classes of the data: "
                f"{shown}.{did_you_mean(unknown[0], classes)} It knows {', '.join(classes[:10])}"
                f"{' ...' if len(classes) > 10 else ''}. Rename the classes, or adapt it with zoo finetune."
            )
        table = np.array([places[name] for name in self.class_names], dtype=np.int64)
        for part in PARTS:
            images = self.parts[part]
            self.parts[part] = Images(
                images.names, table[images.labels], images.rows, images.reader, images.files
            )
        self.class_names = list(classes)

    # ---- what training asks ------------------------------------------------------------------------------

    @staticmethod
    def collate(samples: Any) -> dict[str, Tensor]:
        """`{"image": (B, C, H, W), "label": (B,), "index": (B,)}` of what could be read, if anything."""
        known = [sample for sample in samples if sample["label"] != UNREADABLE]
        return default_collate(known or samples)

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        sizes = {"img_size": list(self.size_given)} if self.size_given else {}
        return {"num_classes": len(self.class_names), "in_chans": self.channels, **sizes}

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must know to classify other images; json-able."""
        return {
            "data": self.dataset or self.name,
            "classes": self.class_names,
            "preprocessing": asdict(cast(Any, self.preprocessing)),
        }

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """What training would take a folder or table for: facts, and a row per class.

        Args:
            reading: arguments of `VisionData`, such as `split` or `channels`.
        """
        accepted = inspect.signature(VisionData).parameters
        for name in reading:
            if name not in accepted:
                raise ConfigError(f"There is no option {name!r}.{did_you_mean(name, accepted)}")
        options: dict[str, Any] = {"corrupt": "skip", **reading}
        data = VisionData("imagefolder" if path.is_dir() else "image_table", path, **options)
        data.setup()
        counts = {
            part: np.bincount(data.parts[part].labels, minlength=len(data.class_names)) for part in PARTS
        }
        facts = {
            "source": str(path),
            "classes": str(len(data.class_names)),
            "images": ", ".join(f"{len(data.parts[part])} {part}" for part in PARTS),
            "unreadable": str(len(data.unreadable)),
        }
        rows = [
            {"class": name, **{part: str(counts[part][i]) for part in PARTS}}
            for i, name in enumerate(data.class_names)
        ]
        return facts, rows

    def class_counts(self) -> np.ndarray:
        """Training images of each class."""
        return np.bincount(self.parts["train"].labels, minlength=len(self.class_names))


def stored_options(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `VisionData` that prepare images as weights with these facts take them."""
    stored = facts.get("preprocessing") or {}
    options = {name: stored[name] for name in PREPROCESSING_OPTIONS if stored.get(name) is not None}
    return options | ({"channels": stored["channels"]} if stored else {})


def _each(value: float | Sequence[float] | None, channels: int) -> Sequence[float] | None:
    """One number for every channel."""
    return (float(value),) * channels if isinstance(value, int | float) else value


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"data.size={size}: write a number of pixels or [height, width].")
    return pair[0], pair[1]


def _tested(collection: Collection) -> dict[str, Images]:
    """The source's own test part, or val, with nothing to train on."""
    parts = collection.parts
    tested = next(parts[name] for name in ("test", "val", "all", "train") if name in parts)
    nothing = tested.select(())
    return {"train": nothing, "val": nothing, "test": tested}
