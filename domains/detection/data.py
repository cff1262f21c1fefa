"""Annotated images for training, validation and test.

Shapes: T objects of an image, K keypoints.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from domains.detection import scenes
from domains.detection.annotations import Annotated, Collection
from domains.detection.augment import Augment
from domains.detection.dataset import DetectionSet, padded, trained_objects
from domains.detection.keypoints import Skeleton
from domains.detection.pictures import stored_sizes
from domains.detection.sources.coco import read_coco
from domains.detection.sources.layouts import check_agree, read_parts
from zoo.cli.console import console
from zoo.errors import CheckpointError, ConfigError, DataError, did_you_mean
from zoo.training.data import DataModule

PARTS = ("train", "val", "test")
SPLIT = (0.8, 0.1, 0.1)
CHOICES = {
    "name": ("scenes", "figures", "coco", "yolo", "voc", "labelme", "mmdet"),
    "invalid": ("drop", "error"),
    "corrupt": ("error", "skip"),
}
SHORT, LONG = 800, 1333
"""Sides of images where neither the config nor the weights say: those of the published models."""


class DetectionData(DataModule):
    """Scenes that are drawn, or images of your own with boxes or keypoints.

    After `setup`: `parts` (a `Collection` of train, val and test).

    Args:
        name: `scenes` (coloured shapes) and `figures` (stick figures with keypoints) are embedded; `coco`
            (COCO, CrowdPose, Roboflow's export), `yolo`, `voc` and `labelme` are files of your own, `mmdet`
            those that a config of mmdet names.
        path: a folder in the layout of the format; one file of annotations, which is split; or that config.
        train, val, test: instead, a COCO json file for each part; without `val` or `test`, shares of `train`.
        images: the folder of images, where it is none of the usual.
        keypoints: train poses; of `figures` always.
        split: shares of train, val and test of data without parts.
        split_seed: of the draw.
        count: embedded scenes of train, val and test.
        short, long: sides of images in evaluation: the shorter becomes `short`, the longer at most `long`;
            None: as the weights were trained, or 800 and 1333.
        augment: arguments of `Augment`; None: training images are only scaled.
        invalid: `drop` boxes without area in their image, which is reported, or `error`.
        corrupt: `error` or `skip` images that are missing or cannot be read.
        baselines: also judge mean boxes, or poses, and the model before training.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the files cannot be used.
    """

    parts: dict[str, Collection]
    train_set: DetectionSet
    val_set: DetectionSet
    test_set: DetectionSet

    def __init__(
        self,
        name: str = "scenes",
        path: str | Path | None = None,
        *,
        train: str | Path | None = None,
        val: str | Path | None = None,
        test: str | Path | None = None,
        images: str | Path | None = None,
        keypoints: bool | None = None,
        split: Sequence[float] = SPLIT,
        split_seed: int = 0,
        count: Sequence[int] = (1000, 100, 200),
        short: int | None = None,
        long: int | None = None,
        augment: Mapping[str, Any] | None = None,
        invalid: str = "drop",
        corrupt: str = "error",
        baselines: bool = False,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for key, value in (("name", name), ("invalid", invalid), ("corrupt", corrupt)):
            if value not in CHOICES[key]:
                hint = did_you_mean(value, CHOICES[key])
                raise ConfigError(f"data.{key}={value} is not one of {', '.join(CHOICES[key])}.{hint}")
        if len(split) != 3 or min(split) < 0 or sum(split) <= 0:
            raise ConfigError(f"data.split={list(split)}: three shares for train, val and test are expected.")
        if len(count) != 3 or min(count) < 1:
            raise ConfigError(f"data.count={list(count)}: images of train, val and test, each at least 1.")
        if min(short or 1, long or 1) < 1 or (long or LONG) < (short or 1):
            raise ConfigError(f"data.short={short}, data.long={long}: 1 <= short <= long.")
        self.name = self.source = name
        self.path = Path(path) if path else None
        self.files = {
            part: Path(file) for part, file in (("train", train), ("val", val), ("test", test)) if file
        }
        self.images, self.keypoints = Path(images) if images else None, bool(keypoints) or name == "figures"
        self.split, self.split_seed = list(split), split_seed
        self.count: dict[str, int] = dict(zip(PARTS, count, strict=True))
        self.short, self.long, self.invalid, self.corrupt = short, long, invalid, corrupt
        self.augment = None if augment is None else _augment(augment, long)
        self.baselines = baselines
        self.embedded = name in scenes.KINDS and not (self.path or self.files)
        self.unreadable: list[str] = []
        self.tested_on_val = False

    # ---- reading -----------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Draw the embedded scenes, once on each machine."""
        if self.embedded:
            scenes.scene_files(self.source, self.count)

    def setup(self, stage: str | None = None) -> None:
        """Read, look through and split the annotations; once, whatever the stage.

        Args:
            stage: `test`, of data that nothing is trained on: all of data without parts are tested; or
                `results`, to judge what was found: the same, whether or not the images are there.
        """
        if hasattr(self, "parts"):
            return
        only_tested = stage in ("test", "results")
        read = self._read(images_needed=stage != "results")
        check_agree(read)
        for part in read.values():
            if self.invalid == "error":
                part.findings.refuse()
        if only_tested:
            read = {"test": next(read[part] for part in ("test", "val", "all", "train") if part in read)}
        if stage != "results":
            read = {part: self._readable(found) for part, found in read.items()}
        if self.unreadable:
            self._report_unreadable()
        nothing = next(iter(read.values())).subset(())
        self.parts = {"train": nothing, "val": nothing, **read} if only_tested else self._split(read)
        for part in ("test",) if only_tested else PARTS:
            if not len(self.parts[part]):
                raise DataError(f"No image is left for the {part} part: see data.split, or give more images.")
        if not only_tested:
            self._prepare_training()
        self.classes, self.category_ids = self._main.classes, self._main.category_ids
        self.number_of = np.arange(len(self.classes))
        self._make_sets()
        self._say(read)

    @property
    def _main(self) -> Collection:
        return self.parts["train"] if len(self.parts["train"]) else self.parts["test"]

    @property
    def skeleton(self) -> Skeleton | None:
        """Of poses."""
        return self._main.skeleton if self.keypoints else None

    def _read(self, *, images_needed: bool = True) -> dict[str, Collection]:
        if self.embedded:
            folder = scenes.scene_files(self.source, self.count)
            return {
                part: read_coco(
                    scenes.annotation_file(folder, self.source, part), folder / part, keypoints=self.keypoints
                )
                for part in PARTS
            }
        return read_parts(
            "coco" if self.source in scenes.KINDS else self.source,
            self.path,
            files=self.files,
            images=self.images,
            keypoints=self.keypoints,
            images_needed=images_needed,
        )

    def _split(self, read: Mapping[str, Collection]) -> dict[str, Collection]:
        """Three parts: those that there are, the others from the whole."""
        found = {part: read[part] for part in PARTS if part in read}
        if "test" not in found and {"train", "val"} <= found.keys():
            self.tested_on_val = True
            return found | {"test": found["val"]}
        if len(found) == 3:
            return found
        source = read.get("all") or found.pop("train", None) or found.pop(next(iter(found)))
        missing = [part for part in PARTS if part not in found]
        shares = np.array([self.split[PARTS.index(part)] for part in missing], np.float64)
        if min(shares) <= 0 or len(source) < len(missing):
            raise DataError(f"{len(source)} images cannot be split in {', '.join(missing)}: see data.split.")
        order = np.random.default_rng((self.split_seed, len(source))).permutation(len(source))
        sizes = np.maximum((shares / shares.sum() * len(source)).astype(int), 1)
        sizes[sizes.argmax()] += len(source) - sizes.sum()
        dealt = zip(missing, np.split(order, sizes.cumsum()[:-1]), strict=True)
        return found | {part: source.subset(sorted(places)) for part, places in dealt}

    def _readable(self, part: Collection) -> Collection:
        """Images that are there, whole, and of the size that their annotations give."""
        places = range(len(part))
        many = len(part) > 2000
        bar = track(places, "Looking at the images", console=console, transient=True)
        good = []
        for i in bar if many else places:
            reason = _unreadable(part.images[i])
            if reason:
                self.unreadable.append(reason)
            else:
                good.append(i)
        return part if len(good) == len(part) else part.subset(good)

    def _report_unreadable(self) -> None:
        shown = " ".join(self.unreadable[:5]) + (" ..." if len(self.unreadable) > 5 else "")
        message = f"{len(self.unreadable)} images cannot be used: {shown}"
        if self.corrupt == "error":
            raise DataError(f"{message} Mend or remove them, or set data.corrupt=skip.")
        console.print(f"Left out: {message}", highlight=False, soft_wrap=True, markup=False)

    def _prepare_training(self) -> None:
        """Images to train poses on have one; every part has something to find.

        Raises:
            DataError: nothing to find.
        """
        if self.keypoints:
            train = self.parts["train"]
            places = [i for i, found in enumerate(train.images) if trained_objects(found, pose=True).any()]
            for i in sorted(set(range(len(train))) - set(places)):
                train.findings.add("images without a pose are not trained on", str(train.images[i]))
            self.parts["train"] = train.subset(places)
        for part in ("train", "val"):
            found = self.parts[part]
            if not any(trained_objects(image, pose=self.keypoints).any() for image in found.images):
                what = "keypoints" if self.keypoints else "objects"
                raise DataError(f"The {part} part, {len(found)} images, has no {what} to learn from.")

    def _say(self, read: Mapping[str, Collection]) -> None:
        counts = ", ".join(
            f"{len(self.parts[part])} {part} ({self.parts[part].objects} objects)"
            for part in PARTS
            if len(self.parts[part])
        )
        found = f"; {len(self.skeleton.names)} keypoints" if self.skeleton else ""
        console.print(f"Images: {counts}; {len(self.classes)} classes{found}", highlight=False)
        findings = {id(part.findings): (name, part.findings) for name, part in read.items()}
        for name, notes in findings.values():
            for line in [] if self.embedded else notes.lines():
                console.print(f"{name}: {line}", highlight=False, soft_wrap=True, markup=False)

    def _make_sets(self) -> None:
        size = (self.short or SHORT, self.long or LONG)
        plain = Augment(flip=0, scales=(size[0],), long=size[1], crop=0)
        sets = {
            part: DetectionSet(
                self.parts[part],
                self.number_of,
                size,
                pose=self.keypoints,
                augment=(self.augment or plain) if part == "train" else None,
                seed=self.seed,
            )
            for part in PARTS
        }
        self.train_set, self.val_set, self.test_set = (sets[part] for part in PARTS)

    # ---- the model's classes -----------------------------------------------------------------------------

    def follow(self, facts: Mapping[str, Any], source: str) -> None:
        """Number classes, and scale images, as weights stored with `facts` do.

        Raises:
            CheckpointError: classes, or keypoints, that the weights do not know.
        """
        self.check(facts, source)
        self.short, self.long = self.short or facts.get("short"), self.long or facts.get("long")
        self.number_classes(facts["classes"])

    def number_classes(self, known: Sequence[str | None]) -> None:
        """Give the classes their places in a list that has them all."""
        known = list(known)
        self.number_of = np.array([known.index(name) for name in self.classes], np.int64)
        self._make_sets()

    def use(self, pose: bool) -> None:
        """Make targets of poses, or of boxes alone.

        Raises:
            DataError: poses are asked for and the data were read without keypoints.
        """
        if pose and not self.keypoints:
            raise DataError(
                "The model predicts keypoints, the data were read as boxes: set data.keypoints=true, or take "
                "data with keypoints (data=figures)."
            )
        if pose != self.keypoints:
            self.keypoints = pose
            self._make_sets()

    def check(self, facts: Mapping[str, Any], source: str) -> None:
        """Raises `CheckpointError` for classes, or keypoints, that the weights do not know."""
        known = list(facts["classes"])
        if unknown := [name for name in self.classes if name not in known]:
            names = [name for name in known if name]
            raise CheckpointError(
                f"{source} tells {len(names)} classes apart ({_short(names)}); the data also have "
                f"{_short(unknown)}. Train it on these with zoo finetune."
            )
        theirs = facts.get("skeleton")
        self.use(bool(theirs))
        if theirs and self.skeleton and tuple(theirs["names"]) != self.skeleton.names:
            raise CheckpointError(
                f"{source} predicts {len(theirs['names'])} keypoints ({_short(theirs['names'])}), the data "
                f"have {len(self.skeleton.names)} ({_short(self.skeleton.names)}). Train it on these with "
                "zoo finetune."
            )

    @property
    def numbered(self) -> list[int | None]:
        """For each class number of the model, the label of the data."""
        found: list[int | None] = [None] * (int(self.number_of.max()) + 1)
        for label, number in enumerate(self.number_of.tolist()):
            found[number] = label
        return found

    # ---- what training asks ------------------------------------------------------------------------------

    @staticmethod
    def collate(samples: Any) -> list[dict[str, Any]]:
        """Parts of a batch: one, padded, of training views; of whole images one for each size, unpadded.

        Padding changes predictions, and an image is to be judged alike whatever it shares a batch with.
        """
        parts: dict[Any, list[Any]] = defaultdict(list)
        for sample in samples:
            parts[sample["image"].shape if sample["whole"] else None].append(sample)
        return [padded(part) for part in parts.values()]

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        given: dict[str, Any] = {"num_classes": int(self.number_of.max()) + 1}
        return given | ({"num_keypoints": len(self.skeleton.names)} if self.skeleton else {})

    def extra(self) -> dict[str, Any]:
        """What weights need to be used elsewhere; json-able."""
        kind = self.skeleton
        names = [None if label is None else self.classes[label] for label in self.numbered]
        ids = [None if label is None else int(self.category_ids[label]) for label in self.numbered]
        return {
            "data": self.name,
            "classes": names,
            "category_ids": ids,
            "skeleton": kind
            and {
                "names": list(kind.names),
                "sigmas": list(kind.sigmas),
                "pairs": [list(pair) for pair in kind.pairs],
                "links": [list(link) for link in kind.links],
            },
            "short": self.short or SHORT,
            "long": self.long or LONG,
        }

    @staticmethod
    def make(output: Path | None = None, **options: Any) -> list[Path]:
        """Draw the embedded scenes and figures as files in the layout of COCO, for `zoo data make`."""
        seed = int(options.pop("seed", 0))
        if options:
            raise ConfigError(f"Scenes have no option {next(iter(options))!r}.")
        counts = {"train": 1000, "val": 100, "test": 200}
        return [
            scenes.scene_files(kind, counts, seed, output / kind if output else None) for kind in scenes.KINDS
        ]

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Facts and a row per class, for `zoo data info`: what training would take `path` for."""
        data = DetectionData(**{"name": "coco", **reading, "path": path})
        read = data._read()
        facts = {"source": str(path)}
        for name, part in read.items():
            facts[name] = f"{len(part)} images, {part.objects} objects"
            facts |= {f"{name}, {i}": line for i, line in enumerate(part.findings.lines(), 1)}
        kind = next(iter(read.values())).skeleton
        if kind:
            facts["keypoints"] = ", ".join(kind.names)
        return facts, [_class_row(read, name) for name in next(iter(read.values())).classes]


def _class_row(read: Mapping[str, Collection], name: str) -> dict[str, str]:
    row = {"class": name}
    for part, found in read.items():
        label = found.classes.index(name) if name in found.classes else -1
        row[part] = str(sum(int((image.labels == label).sum()) for image in found.images))
    return row


def _augment(options: Mapping[str, Any], long: int | None) -> Augment:
    known = Augment.__dataclass_fields__
    for name in options:
        if name not in known:
            raise ConfigError(f"Unknown key data.augment.{name}.{did_you_mean(str(name), known)}")
    given: dict[str, Any] = {"long": long or LONG} | {str(key): value for key, value in options.items()}
    return Augment(**given)


def _unreadable(found: Annotated) -> str | None:
    """Why an image cannot be used, if so."""
    try:
        sizes = stored_sizes(found.file)
    except DataError as error:
        return f"{str(error).rstrip('.')} (image id {found.id})."
    if (found.height, found.width) in sizes:
        return None
    height, width = sizes[0]
    return f"{found} has {width}x{height} pixels, its annotations are of {found.width}x{found.height}."


def _short(names: Sequence[str | None]) -> str:
    shown = [str(name) for name in names if name]
    return ", ".join(shown[:6]) + (", ..." if len(shown) > 6 else "")
