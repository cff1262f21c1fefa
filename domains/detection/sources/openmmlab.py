"""The data of a config of mmdet: which images, files and classes its loaders name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from domains.detection.annotations import Collection
from domains.detection.openmmlab import INSTALL
from domains.detection.sources.coco import read_coco
from domains.detection.weights.classes import coco_names
from zoo.errors import DataError, MissingExtra

NAMED = "CocoDataset"
WRAPPERS = ("RepeatDataset", "ClassBalancedDataset", "MultiImageMixDataset")


class Named(NamedTuple):
    """What a loader of the config names."""

    file: Path
    images: Path
    classes: tuple[str, ...] | None
    """None: as mmdet, those of COCO that the file has."""


def read_mmdet(path: Path, *, keypoints: bool = False) -> dict[str, Collection]:
    """Train, val and test as `train_dataloader`, `val_dataloader` and `test_dataloader` say.

    A config is a program: reading it runs it, but for the modules of its `custom_imports`. Pipelines and
    filters are not read. A test part that names what the val part does is left out.

    Raises:
        MissingExtra: mmengine, which reads configs, is not installed.
        DataError: the config cannot be run, names no data, data of another format, or no such class.
    """
    config = _config(path)
    loaders = {part: f"{part}_dataloader" for part in ("train", "val", "test")}
    found = {
        part: _named(config[loader], f"{path}: {loader}")
        for part, loader in loaders.items()
        if config.get(loader)
    }
    if not found:
        raise DataError(f"{path} has no train_dataloader: is it a config of a model alone?")
    if found.get("test") == found.get("val"):
        found.pop("test", None)
    return {part: _read(named, f"{path}: {loaders[part]}", keypoints) for part, named in found.items()}


def _config(path: Path) -> Mapping[str, Any]:
    try:
        reader: Any = import_module("mmengine.config").Config
    except ModuleNotFoundError:
        raise MissingExtra(f"{path} is a config of mmdet, which mmengine reads: {INSTALL}") from None
    try:
        return reader.fromfile(str(path), import_custom_modules=False)
    except Exception as error:  # a config is a program, which raises what it likes
        raise DataError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from None


def _named(loader: Mapping[str, Any], where: str) -> Named:
    kind, data = _dataset(loader)
    while kind in WRAPPERS:
        kind, data = _dataset(data)
    if kind != NAMED:
        raise DataError(
            f"{where} names data of type {kind}; {NAMED} is read, also in {', '.join(WRAPPERS)}. Files of "
            "other formats are read without the config, as data=voc data.path=FOLDER."
        )
    if not data.get("ann_file"):
        raise DataError(f"{where} has no dataset.ann_file, the json file with the objects.")
    root = Path(data.get("data_root") or "")
    images = root / (data.get("data_prefix") or {}).get("img", "")
    classes = (data.get("metainfo") or {}).get("classes")
    if isinstance(classes, str):
        classes = (classes,)
    return Named(root / data["ann_file"], images, classes and tuple(classes))


def _dataset(holder: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The data in a loader or a wrapper, and their type, which configs name by a string or a class."""
    data = holder.get("dataset")
    kind = data.get("type") if isinstance(data, Mapping) else data
    return str(getattr(kind, "__name__", kind)), data or {}


def _read(named: Named, where: str, keypoints: bool) -> Collection:
    try:
        whole = read_coco(named.file, named.images, keypoints=keypoints)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    wanted = named.classes or tuple(name for name in coco_names() if name in whole.classes)
    if unknown := [name for name in wanted if name not in whole.classes]:
        raise DataError(
            f"{where} names the class {unknown[0]!r}; {named.file} has {', '.join(whole.classes[:10])}."
        )
    if not wanted:
        raise DataError(
            f"{where} names no classes, which means those of COCO; {named.file} has "
            f"{', '.join(whole.classes[:10])}. Name them in the config: metainfo=dict(classes=(...))."
        )
    return _only(whole, wanted)


def _only(whole: Collection, wanted: tuple[str, ...]) -> Collection:
    """With objects of these classes, in the order of the file."""
    kept = [i for i, name in enumerate(whole.classes) if name in wanted]
    number = np.full(len(whole.classes), -1)
    number[kept] = np.arange(len(kept))
    images = []
    for image in whole.images:
        for label in image.labels[number[image.labels] < 0]:
            whole.findings.add(f"objects are of no class of the config: {whole.classes[label]}", str(image))
        image = image.only(number[image.labels] >= 0)
        images.append(replace(image, labels=number[image.labels]))
    classes, ids = (tuple(values[i] for i in kept) for values in (whole.classes, whole.category_ids))
    return replace(whole, images=tuple(images), classes=classes, category_ids=ids)
