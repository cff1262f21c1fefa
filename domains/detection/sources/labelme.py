"""LabelMe: a json file for each image, with labelled shapes; points of a group are keypoints."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.detection.annotations import Annotated, Collection, Findings, annotated, skeleton_of
from domains.detection.keypoints import SKELETONS, Skeleton
from domains.detection.pictures import is_picture, picture_size
from domains.detection.sources.coco import load_json
from zoo.errors import DataError

FEWEST = {"rectangle": 2, "circle": 2, "mask": 2, "polygon": 3}
"""Points of the shapes that have a box."""
PER_IMAGE = 100_000
"""Ids of annotations count from this times the number of their image."""


@dataclass(frozen=True)
class _Object:
    """One shape, or all with its label and `group_id`."""

    label: str
    group: Any
    box: np.ndarray
    area: float


@dataclass(frozen=True)
class _Sheet:
    """A json file."""

    image: Path
    size: tuple[int, int]
    objects: list[_Object]
    points: dict[Any, dict[str, np.ndarray]]
    """By group, those of a group with one object, by name."""


def read_labelme(
    parts: Mapping[str, Sequence[Path]], images: Path | None = None, *, keypoints: bool = False
) -> dict[str, Collection]:
    """Boxes around rectangles, polygons, circles and masks; shapes of a label and `group_id` are one object.

    Args:
        parts: json files of each part; classes, sorted by name, are those of all parts.
        images: the folder of images; by default `imagePath` counts from the json file.
        keypoints: read points that have the `group_id` of one object, whose keypoints they are by their
            labels, in the order of COCO or CrowdPose where the names are theirs, else sorted.

    Raises:
        DataError: a file that is not of this format, or no object in any; names file and shape.
    """
    findings = {part: Findings() for part in parts}
    read = {
        part: [_sheet(file, images, findings[part], keypoints) for file in files]
        for part, files in parts.items()
    }
    every = [sheet for sheets in read.values() for sheet in sheets]
    kind = _skeleton(every, findings) if keypoints else None
    classes = sorted({label for sheet in every for label in _labels(sheet, posed=keypoints)})
    if not classes:
        raise DataError(f"No object in {len(every)} json files of LabelMe.{_counted(findings)}")
    _note_unlabelled(read, findings)
    numbers = tuple(range(1, len(classes) + 1))
    return {
        part: Collection(
            tuple(_image(i, sheet, classes, kind, findings[part]) for i, sheet in enumerate(sheets, 1)),
            tuple(classes),
            numbers,
            kind,
            findings=findings[part],
        )
        for part, sheets in read.items()
    }


# ---- one file ----------------------------------------------------------------------------------------------


def _sheet(file: Path, images: Path | None, findings: Findings, keypoints: bool) -> _Sheet:
    content = load_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise DataError(f"{file} has no list 'shapes': is it of LabelMe? (COCO json: data=coco.)")
    image = _image_file(file, content, images)
    shapes: dict[Any, list[tuple[np.ndarray, float]]] = defaultdict(list)
    points: dict[Any, dict[str, np.ndarray]] = defaultdict(dict)
    for place, shape in enumerate(content["shapes"], 1):
        where = f"{file}, shape {place}"
        label, group, kind, given = _read(shape, where)
        if kind == "point":
            if not keypoints:
                findings.add("points are left out (data.keypoints=true reads those of a group_id)", where)
            elif label in points[group] and group is not None:
                raise DataError(f"{where}: the group_id {group} has the point {label!r} twice.")
            else:
                points[group][label if group is not None else str(place)] = given[0]
        elif kind not in FEWEST:
            findings.add(f"shapes of the kind {kind} have no box and are left out", where)
        elif len(given) < FEWEST[kind]:
            findings.add(f"shapes of the kind {kind} with too few points are left out", where, dropped=True)
        else:
            shapes[label, group, place if group is None else 0].append(_extent(kind, given))
    objects = [_joined(label, group, pieces) for (label, group, _), pieces in shapes.items()]
    return _Sheet(image, _size(file, content, image), objects, _owned(points, objects, file, findings))


def _read(shape: Any, where: str) -> tuple[str, Any, str, np.ndarray]:
    """Label, group, kind and points `(n, 2)` of a shape."""
    if not isinstance(shape, dict) or not shape.get("label"):
        raise DataError(f"{where} has no 'label'.")
    group = shape.get("group_id")
    if not isinstance(group, int | str | None):
        raise DataError(f"{where} ({shape['label']!r}): group_id={group} is no number.")
    kind = shape.get("shape_type") or "polygon"
    try:
        points = np.array(shape.get("points"), np.float64)
    except (TypeError, ValueError):
        points = np.empty(0)
    if points.ndim != 2 or points.shape[-1] != 2 or not np.isfinite(points).all():
        raise DataError(f"{where} ({shape['label']!r}): points are no list of finite [x, y].")
    return str(shape["label"]), group, str(kind), points


def _extent(kind: str, points: np.ndarray) -> tuple[np.ndarray, float]:
    """The box around a shape, and its area; of a mask that of the box."""
    if kind == "circle":
        radius = float(np.hypot(*(points[1] - points[0])))
        return np.concatenate([points[0] - radius, points[0] + radius]), float(np.pi * radius**2)
    low, high = points.min(0), points.max(0)
    if kind == "polygon":
        x, y = points.T
        area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
        return np.concatenate([low, high]), area
    high = high + (kind == "mask")  # its last row and column belong to it
    return np.concatenate([low, high]), float((high - low).prod())


def _joined(label: str, group: Any, pieces: Sequence[tuple[np.ndarray, float]]) -> _Object:
    boxes = np.array([box for box, _ in pieces])
    box = np.concatenate([boxes[:, :2].min(0), boxes[:, 2:].max(0)])
    return _Object(label, group, box, sum(area for _, area in pieces))


def _owned(
    points: Mapping[Any, dict[str, np.ndarray]], objects: Sequence[_Object], file: Path, findings: Findings
) -> dict[Any, dict[str, np.ndarray]]:
    """The points whose group has one object."""
    owners = Counter(found.group for found in objects)
    for group, named in points.items():
        for name in named:
            if group is None:
                findings.add("points without a group_id are left out", f"{file}, shape {name}")
            elif not owners[group]:
                findings.add("points whose group_id no box has are left out", f"{file}, {name!r} of {group}")
            elif owners[group] > 1:
                findings.add(
                    "points whose group_id several objects have are left out", f"{file}, {name!r} of {group}"
                )
    return {group: named for group, named in points.items() if group is not None and owners[group] == 1}


def _image_file(file: Path, content: Mapping[str, Any], images: Path | None) -> Path:
    """As `imagePath` says, else the picture of the json file's name beside it; perhaps there is none."""
    given = str(content.get("imagePath") or "").replace("\\", "/")
    named = [images / Path(given).name] if images and given else []
    named += [file.parent / given] if given else []
    if found := next((path for path in named if path.is_file()), None):
        return found
    beside = sorted(path for path in file.parent.iterdir() if path.stem == file.stem and is_picture(path))
    if not (beside or named):
        raise DataError(f"{file} has no 'imagePath', and there is no image of its name beside it.")
    return beside[0] if beside else named[0]


def _size(file: Path, content: Mapping[str, Any], image: Path) -> tuple[int, int]:
    """Height and width; of the picture where the file does not say."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if height is None or width is None:
        return picture_size(image)
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise DataError(f"{file}: imageHeight={height}, imageWidth={width} are no pixels.")
    return height, width


# ---- all files ---------------------------------------------------------------------------------------------


def _skeleton(sheets: Sequence[_Sheet], findings: Mapping[str, Findings]) -> Skeleton:
    names = {name for sheet in sheets for named in sheet.points.values() for name in named}
    if not names:
        raise DataError(
            "No point of these LabelMe files has the group_id of a box, as keypoints have: "
            f"data.keypoints=false reads boxes.{_counted(findings)}"
        )
    known = next((kind.names for kind in SKELETONS.values() if set(kind.names) == names), sorted(names))
    return skeleton_of(known, (), "The points of these LabelMe files")


def _counted(findings: Mapping[str, Findings]) -> str:
    lines = [f"{part}: {line}." for part, notes in findings.items() for line in notes.lines()]
    return "".join(f" {line}" for line in lines)


def _labels(sheet: _Sheet, *, posed: bool) -> set[str]:
    """Of all objects, or of those with keypoints."""
    return {found.label for found in sheet.objects if not posed or found.group in sheet.points}


def _note_unlabelled(read: Mapping[str, Sequence[_Sheet]], findings: Mapping[str, Findings]) -> None:
    """Count the pictures beside annotated ones that no json file is of."""
    seen = {sheet.image for sheets in read.values() for sheet in sheets}
    for part, sheets in read.items():
        for folder in sorted({sheet.image.parent for sheet in sheets if sheet.image.parent.is_dir()}):
            unknown = {path for path in folder.iterdir() if is_picture(path)} - seen
            for path in sorted(unknown):
                findings[part].add("images without a json file are left out", str(path))
            seen |= unknown


def _image(
    number: int, sheet: _Sheet, classes: Sequence[str], kind: Skeleton | None, findings: Findings
) -> Annotated:
    objects = []
    for place, found in enumerate(sheet.objects):
        if found.label not in classes:
            where = f"{sheet.image}, {found.label!r}"
            findings.add("objects of categories without keypoints are left out", where)
            continue
        entry = {
            "id": PER_IMAGE * number + place,
            "box": found.box,
            "label": classes.index(found.label),
            "area": found.area,
        }
        if kind is not None:
            entry["keypoints"] = _keypoints(sheet.points.get(found.group, {}), kind)
        objects.append(entry)
    count = len(kind.names) if kind else None
    return annotated(sheet.image, number, sheet.size, objects, findings, num_keypoints=count)


def _keypoints(named: Mapping[str, np.ndarray], kind: Skeleton) -> np.ndarray:
    """`(K, 3)`: visible where there is a point."""
    points = np.zeros((len(kind.names), 3))
    for name, point in named.items():
        points[kind.names.index(name)] = (*point, 2)
    return points
