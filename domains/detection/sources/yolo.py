"""YOLO text files: a line `class cx cy w h` in parts of the image for each object; poses add keypoints."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from domains.detection.annotations import Collection, Findings, annotated
from domains.detection.keypoints import Skeleton, skeleton
from domains.detection.pictures import is_picture, picture_size
from domains.detection.sources.text import read_text
from zoo.errors import DataError


def read_yolo(
    images: Path, description: Mapping[str, Any], *, keypoints: bool = False, where: str = ""
) -> Collection:
    """The images of a folder, with the text files of their names in `labels` beside `images`.

    Args:
        images: a folder of images, or a text file that lists them.
        description: of the data set: `names`, and for poses `kpt_shape`, `flip_idx`.

    Raises:
        DataError: a line that is not of this format; names file and line.
    """
    names = _names(description, where)
    kind, dims = _skeleton(description, where) if keypoints else (None, 0)
    pose = "kpt_shape" in description
    findings = Findings()
    files = _listed(images)
    found = []
    for number, file in enumerate(files, 1):
        size = picture_size(file)
        label = _label_file(file)
        if not label.is_file():
            findings.add("images have no text file, so no object", str(file))
        lines = read_text(label).splitlines() if label.is_file() else []
        objects = [
            _object(f"{label}, line {n}", line, size, len(names), kind, dims, pose)
            | {"id": 1000 * number + n}
            for n, line in enumerate(lines, 1)
            if line.strip()
        ]
        count = len(kind.names) if kind else None
        found.append(annotated(file, number, size, objects, findings, num_keypoints=count))
    return Collection(tuple(found), tuple(names), tuple(range(len(names))), kind, False, findings)


def read_description(path: Path) -> dict[str, Any]:
    """The content of `data.yaml`.

    Raises:
        DataError: no such yaml.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # yaml and OmegaConf raise kinds of their own
        raise DataError(f"{path} cannot be read as yaml: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is no description of a data set: names and train are expected.")
    return {str(key): value for key, value in content.items()}


def _names(description: Mapping[str, Any], where: str) -> list[str]:
    names = description.get("names")
    try:
        if isinstance(names, str):
            names = ast.literal_eval(names)
        if isinstance(names, Mapping):
            names = [names[key] for key in sorted(names, key=int)]
    except (SyntaxError, TypeError, ValueError):
        names = None
    if not names or not isinstance(names, Sequence):
        raise DataError(f"{where} has no 'names': the classes in the order of their numbers.")
    return [str(name) for name in names]


def _skeleton(description: Mapping[str, Any], where: str) -> tuple[Skeleton, int]:
    """The skeleton, and how many numbers a keypoint has (2 or 3)."""
    shape, flip = description.get("kpt_shape"), description.get("flip_idx")
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (2, 3):
        raise DataError(f"{where} has no kpt_shape: [keypoints, 2 or 3], which files of poses need.")
    count, dims = shape
    if not isinstance(count, int) or count < 1:
        raise DataError(f"{where}: kpt_shape={shape} starts with the number of keypoints.")
    if flip is not None and (
        not isinstance(flip, list) or sorted(flip, key=str) != sorted(range(count), key=str)
    ):
        raise DataError(f"{where}: flip_idx={flip} does not name each of {count} keypoints once.")
    if count == 17 or flip is None:
        return skeleton("coco" if count == 17 else count), dims
    pairs = tuple((i, other) for i, other in enumerate(flip) if i < other)
    plain = skeleton(count)
    return Skeleton(plain.names, plain.sigmas, pairs), dims


def _listed(images: Path) -> list[Path]:
    if images.is_file() and images.suffix == ".txt":
        lines = [line.strip() for line in read_text(images).splitlines() if line.strip()]
        return [Path(line) if Path(line).is_absolute() else images.parent / line for line in lines]
    if not images.is_dir():
        raise DataError(f"There is no folder {images}.")
    found = sorted(file for file in images.rglob("*") if file.is_file() and is_picture(file))
    if not found:
        raise DataError(f"There are no images in {images}.")
    return found


def _label_file(image: Path) -> Path:
    """`.../images/.../a.jpg` to `.../labels/.../a.txt`, by the last folder of that name."""
    parts = list(image.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _object(
    where: str,
    line: str,
    size: tuple[int, int],
    classes: int,
    kind: Skeleton | None,
    dims: int,
    pose: bool,
) -> dict[str, Any]:
    try:
        values = [float(part) for part in re.split(r"[\s,]+", line.strip())]
    except ValueError:
        raise DataError(f"{where}: {line.strip()!r} is not numbers.") from None
    if values[0] not in range(classes):
        raise DataError(f"{where}: class {values[0]:g}; there are 0 to {classes - 1}.")
    given = values[1:]
    expected = 4 + (dims * len(kind.names) if kind else 0)
    if kind is not None and len(given) != expected:
        raise DataError(f"{where}: {len(given)} numbers after the class; a pose here has {expected}.")
    if len(given) < 4 or (len(given) % 2 and not pose):
        raise DataError(f"{where}: {len(given)} numbers after the class; a box has 4, an outline 6 or more.")
    scale = np.array([size[1], size[0]], np.float64)
    found: dict[str, Any] = {"label": int(values[0]), "box": _box(given, scale, pose=pose)}
    if kind is not None:
        found["keypoints"] = _keypoints(given[4:], scale, dims)
    return found


def _box(given: Sequence[float], scale: np.ndarray, *, pose: bool) -> list[float]:
    """In pixels; of an outline, the box around it."""
    if pose or len(given) == 4:
        centre, half = np.array(given[:2]), np.array(given[2:4]) / 2
        return [*((centre - half) * scale), *((centre + half) * scale)]
    points = np.array(given).reshape(-1, 2) * scale
    return [*points.min(0), *points.max(0)]


def _keypoints(given: Sequence[float], scale: np.ndarray, dims: int) -> np.ndarray:
    points = np.array(given, np.float64).reshape(-1, dims)
    labelled = points[:, 2:3] if dims == 3 else 2.0 * (points[:, :2] != 0).any(1, keepdims=True)
    return np.concatenate([points[:, :2] * scale, labelled], 1)
