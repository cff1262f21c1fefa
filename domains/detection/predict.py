"""From images, folders and videos to boxes and poses: a table or COCO json, and drawn pictures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor, nn

from domains.detection.annotations import skeleton_from
from domains.detection.augment import normalised, target_size
from domains.detection.data import LONG, SHORT
from domains.detection.drawing import Shown, drawn
from domains.detection.frames import Frame, check_readers, find_inputs, read_frames
from domains.detection.keypoints import VISIBILITY, Skeleton
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError, DataError
from zoo.files import atomic_path, atomic_write

SUFFIXES = (".json", ".csv", ".parquet")
CORRUPT = ("skip", "error")
LISTED = 30


@dataclass(frozen=True)
class Found:
    """The objects of one picture, best first; n objects, K keypoints."""

    name: str
    """Of the file, of a video with the number of the frame."""
    number: int
    """Of the picture, from 1: the `image_id` of results."""
    class_id: np.ndarray
    """`(n,)` the model's class number."""
    confidence: np.ndarray
    """`(n,)`"""
    xyxy: np.ndarray
    """`(n, 4)` in pixels; of poses the box around the keypoints."""
    keypoints: np.ndarray | None = None
    """`(n, K, 2)` in pixels."""


@dataclass(frozen=True)
class Known:
    """What the weights know: names of classes (None: not used), category ids, skeleton, sides of images."""

    classes: tuple[str | None, ...]
    category_ids: tuple[int | None, ...]
    skeleton: Skeleton | None
    short: int
    long: int

    @classmethod
    def of(cls, facts: Mapping[str, Any], short: int | None = None, long: int | None = None) -> Known:
        """From the facts stored with weights."""
        return cls(
            tuple(facts["classes"]),
            tuple(facts["category_ids"]),
            skeleton_from(facts.get("skeleton")),
            short or facts.get("short") or SHORT,
            long or facts.get("long") or LONG,
        )


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Find the objects of `cfg.input`, write them to `cfg.output`, draw them into `cfg.plots` if asked for.

    Args:
        model: in eval mode.
        facts: of the weights.
        cfg: as `configs/predict.yaml` with `configs/predict/detection.yaml`.

    Returns:
        The files written.

    Raises:
        ConfigError: a setting that cannot be.
        DataError: there are no images, or none that can be read; with `corrupt: error`, one that cannot.
        MissingExtra: a video, and no library that reads it.
    """
    _check(cfg)
    files = find_inputs(cfg.input)
    check_readers(files)
    model.to(chosen_device(cfg.device))
    known = Known.of(facts, cfg.short, cfg.long)
    failed: list[str] = []
    found, pictures = [], []
    frames = _frames(files, failed, strict=cfg.corrupt == "error")
    for frame, objects in detect(model, known, frames, batch_size=cfg.batch_size, threshold=cfg.threshold):
        found.append(objects)
        if cfg.plots:
            pictures.append(_draw(frame, objects, known, cfg))
    if failed:
        text = f"{len(failed)} of {len(files)} files were left out, or their rest: {' '.join(failed)}"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if not found:
        raise DataError(f"None of the {len(files)} files of input={cfg.input} can be read.")
    _write(found, known, Path(cfg.output))
    _say(found, known, cfg.threshold)
    return [Path(cfg.output), *pictures]


def detect(
    model: nn.Module,
    known: Known,
    frames: Iterable[Frame],
    *,
    batch_size: int = 8,
    threshold: float = 0.0,
) -> Iterator[tuple[Frame, Found]]:
    """The objects of pictures, in their order.

    Only pictures that follow each other and have one size share a batch: padding would change predictions.
    """
    number = 0
    for batch in _batches(frames, known, batch_size):
        for frame, objects in zip([frame for frame, _ in batch], _predicted(model, batch), strict=True):
            number += 1
            yield frame, _found(frame, number, objects, known, threshold)


def _batches(
    frames: Iterable[Frame], known: Known, batch_size: int
) -> Iterator[list[tuple[Frame, tuple[int, int]]]]:
    batch: list[tuple[Frame, tuple[int, int]]] = []
    for frame in frames:
        size = target_size((frame.image.height, frame.image.width), known.short, known.long)
        if batch and (len(batch) == batch_size or batch[0][1] != size):
            yield batch
            batch = []
        batch.append((frame, size))
    if batch:
        yield batch


@torch.inference_mode()
def _predicted(
    model: nn.Module, batch: Sequence[tuple[Frame, tuple[int, int]]]
) -> list[Mapping[str, Tensor]]:
    from torchvision.transforms import v2

    images = [normalised(cast(Any, v2.functional.resize)(frame.image, list(size))) for frame, size in batch]
    device = next(model.parameters()).device
    sizes = [(frame.image.height, frame.image.width) for frame, _ in batch]
    outputs = model(torch.stack(images).to(device))
    return cast(Any, model).postprocess(outputs, torch.tensor(sizes, device=device))


def _found(frame: Frame, number: int, objects: Mapping[str, Tensor], known: Known, threshold: float) -> Found:
    values = {key: value.float().cpu().numpy() for key, value in objects.items()}
    labels = values["labels"].astype(int)
    named = np.array([label < len(known.classes) and known.classes[label] is not None for label in labels])
    keep = (values["scores"] >= threshold) & named
    points = values["keypoints"][keep] if "keypoints" in values else None
    boxes = values["boxes"][keep] if points is None else np.concatenate([points.min(1), points.max(1)], 1)
    return Found(frame.name, number, labels[keep], values["scores"][keep], boxes, points)


def _frames(files: Sequence[Path], failed: list[str], *, strict: bool) -> Iterator[Frame]:
    for file in files:
        try:
            yield from read_frames(file)
        except DataError as error:
            if strict:
                raise
            failed.append(str(error))


# ---- what is written ---------------------------------------------------------------------------------------


def _write(found: Sequence[Found], known: Known, path: Path) -> None:
    if path.suffix == ".json":
        with atomic_write(path, "w") as file:
            json.dump([entry for objects in found for entry in _coco(objects, known)], file)
        return
    table = pd.DataFrame([row for objects in found for row in _rows(objects, known)], columns=_columns(known))
    with atomic_path(path) as part:
        if path.suffix == ".csv":
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)


def _coco(objects: Found, known: Known) -> Iterator[dict[str, Any]]:
    """Results in COCO's format, with the name of the file and of the class beside."""
    for i, label in enumerate(objects.class_id.tolist()):
        x1, y1, x2, y2 = objects.xyxy[i].tolist()
        entry = {
            "image_id": objects.number,
            "file_name": objects.name,
            "category_id": known.category_ids[label],
            "category": known.classes[label],
            "score": float(objects.confidence[i]),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        if objects.keypoints is not None:
            points = objects.keypoints[i]
            visible = np.full((len(points), 1), VISIBILITY)
            entry["keypoints"] = np.concatenate([points, visible], 1).reshape(-1).tolist()
        yield entry


def _columns(known: Known) -> list[str]:
    points = known.skeleton.names if known.skeleton else ()
    ends = [f"{name}_{axis}" for name in points for axis in "xy"]
    return ["file", "class", "score", "x1", "y1", "x2", "y2", *ends]


def _rows(objects: Found, known: Known) -> Iterator[list[Any]]:
    for i, label in enumerate(objects.class_id.tolist()):
        points = [] if objects.keypoints is None else objects.keypoints[i].reshape(-1).tolist()
        row = [objects.name, known.classes[label], float(objects.confidence[i])]
        yield [*row, *objects.xyxy[i].tolist(), *points]


def _draw(frame: Frame, objects: Found, known: Known, cfg: DictConfig) -> Path:
    """The worst first, so that the best lie above; small pictures enlarged."""
    shown = [
        Shown(
            f"{known.classes[label]} {objects.confidence[i]:.2f}",
            label,
            objects.xyxy[i].tolist() if objects.keypoints is None else None,
            None if objects.keypoints is None else objects.keypoints[i],
        )
        for i, label in enumerate(objects.class_id.tolist())
    ]
    name = frame.file.name if frame.number is None else f"{frame.file.name}_{frame.number:06d}"
    path = Path(cfg.plots) / f"{objects.number:04d}_{name}.png"
    scale = max(1, 512 // max(frame.image.size))
    picture = drawn(frame.image, shown[::-1], known.skeleton, scale=scale)
    with atomic_path(path) as part:
        picture.save(part, format="PNG")
    return path


def _say(found: Sequence[Found], known: Known, threshold: float) -> None:
    """Objects by class of each picture."""
    table = Table("image", "objects", title=f"Objects with a score of at least {threshold:g}")
    for objects in found[:LISTED]:
        counts = Counter(str(known.classes[label]) for label in objects.class_id.tolist())
        text = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "none"
        table.add_row(objects.name, text)
    console.print(table)
    total = sum(len(objects.class_id) for objects in found)
    more = f" (the first {LISTED} are listed)" if len(found) > LISTED else ""
    console.print(f"{total} objects in {len(found)} images{more}", highlight=False)


# ---- settings ----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig) -> None:
    if Path(cfg.output).suffix not in SUFFIXES:
        raise ConfigError(f"output={cfg.output}: a name that ends in {', '.join(SUFFIXES)} is expected.")
    if not 0 <= cfg.threshold <= 1:
        raise ConfigError(f"threshold={cfg.threshold}: 0 to 1.")
    if cfg.batch_size < 1:
        raise ConfigError(f"batch_size={cfg.batch_size}: at least 1.")
    if cfg.corrupt not in CORRUPT:
        raise ConfigError(f"corrupt={cfg.corrupt} is not one of {', '.join(CORRUPT)}.")
