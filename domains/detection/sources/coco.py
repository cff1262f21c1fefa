"""COCO json: boxes, keypoints, and what other programs write in this format (CrowdPose, Roboflow)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domains.detection.annotations import Annotated, Collection, Findings, annotated, skeleton_of
from domains.detection.keypoints import Skeleton
from domains.detection.sources.text import read_text
from zoo.errors import DataError


def load_json(path: Path) -> Any:
    """Raises `DataError` for a file that is missing, cut off or otherwise no json, naming the place."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is no whole json file: {error.msg} at line {error.lineno}, character {error.pos}. Was "
            "it cut off while downloading?"
        ) from None


def read_coco(path: Path, images: Path, *, keypoints: bool = False) -> Collection:
    """The images of a json file and their objects.

    Args:
        images: the folder that `file_name` counts from.
        keypoints: read keypoints; of categories that have them.

    Raises:
        DataError: a file that is not of this format, or entries that contradict each other.
    """
    content = load_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} has no list {key!r}: is it COCO json of annotations, not of results?")
    if not content["images"]:
        raise DataError(f"{path} lists no images.")
    findings = Findings()
    categories = _categories(path, content, keypoints, findings)
    kind = _skeleton(path, categories) if keypoints else None
    labels = {category["id"]: i for i, category in enumerate(categories)}
    known = {category.get("id") for category in content["categories"]}
    entries = _by_image(path, content, labels, known, findings)
    crowdpose = keypoints and any("crowdIndex" in image for image in content["images"])
    return Collection(
        tuple(_image(path, images, image, entries, kind, findings) for image in content["images"]),
        tuple(str(category["name"]) for category in categories),
        tuple(labels),
        kind,
        crowdpose,
        findings,
    )


def _categories(
    path: Path, content: Mapping[str, Any], keypoints: bool, findings: Findings
) -> list[Mapping[str, Any]]:
    """In the order of their ids; without the heading that Roboflow puts first."""
    categories = content["categories"]
    for category in categories:
        if (
            not isinstance(category, dict)
            or not isinstance(category.get("id"), int)
            or "name" not in category
        ):
            raise DataError(f"{path}: the category {category} has no whole-numbered id, or no name.")
    ids = [category["id"] for category in categories]
    if twice := {number for number in ids if ids.count(number) > 1}:
        raise DataError(f"{path}: the category id {min(twice)} is there twice.")
    used = [entry.get("category_id") for entry in content["annotations"] if isinstance(entry, dict)]
    used = {number for number in used if isinstance(number, int)}
    above = {str(category.get("supercategory")) for category in categories}
    found = []
    for category in sorted(categories, key=lambda category: category["id"]):
        heading = category["id"] not in used and category["name"] in above
        if heading and category.get("supercategory") in (None, "none", ""):
            findings.add("headings of categories are no classes", f"{path}: {category['name']!r}")
        elif not keypoints or _has_keypoints(path, category):
            found.append(category)
    if not found:
        what = (
            "no category with keypoints: data.keypoints=false reads boxes" if keypoints else "no categories"
        )
        raise DataError(f"{path} has {what}.")
    return found


def _has_keypoints(path: Path, category: Mapping[str, Any]) -> bool:
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{path}: the keypoints of {category['name']!r} are not a list of names: {names}.")
    return bool(names)


def _skeleton(path: Path, categories: Sequence[Mapping[str, Any]]) -> Skeleton:
    names = {tuple(category["keypoints"]) for category in categories}
    if len(names) > 1:
        raise DataError(
            f"{path}: categories have different keypoints ({', '.join(str(len(n)) for n in names)}); a model "
            "predicts one kind."
        )
    return skeleton_of(names.pop(), categories[0].get("skeleton") or (), str(path))


def _by_image(
    path: Path,
    content: Mapping[str, Any],
    labels: Mapping[int, int],
    known: set[Any],
    findings: Findings,
) -> dict[int, list[dict[str, Any]]]:
    """Objects by image id, as `annotated` takes them."""
    images = {_number(image, "id", f"{path}: an image", whole=True) for image in content["images"]}
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for place, entry in enumerate(content["annotations"]):
        where = f"{path}: annotation {entry.get('id', place) if isinstance(entry, dict) else place}"
        for key in ("image_id", "category_id"):
            _number(entry, key, where, whole=True)
        if entry["image_id"] not in images:
            raise DataError(f"{where} is of image {entry['image_id']}, which the file does not list.")
        if entry["category_id"] not in known:
            raise DataError(
                f"{where} is of category {entry['category_id']}; the file lists {sorted(known)[:10]}."
            )
        if entry["category_id"] not in labels:
            findings.add("objects of categories without keypoints are left out", where)
            continue
        if "bbox" not in entry:
            raise DataError(f"{where} has no 'bbox'.")
        sides = entry["bbox"]
        if not isinstance(sides, list) or len(sides) != 4 or not all(map(_usable, sides)):
            raise DataError(f"{where}: bbox={sides} is not [x, y, width, height], four finite numbers.")
        if (crowd := entry.get("iscrowd")) not in (0, 1, None):
            raise DataError(f"{where}: iscrowd={crowd!r} is neither 0 nor 1.")
        x, y, width, height = sides
        found[entry["image_id"]].append(
            {
                "id": _number(entry, "id", where, whole=True) if "id" in entry else place + 1,
                "box": (x, y, x + width, y + height),
                "label": labels[entry["category_id"]],
                "area": None if entry.get("area") is None else _number(entry, "area", where),
                "crowd": crowd,
                **({"keypoints": entry["keypoints"]} if "keypoints" in entry else {}),
            }
        )
    return found


def _image(
    path: Path,
    folder: Path,
    image: Mapping[str, Any],
    entries: Mapping[int, list[dict[str, Any]]],
    kind: Skeleton | None,
    findings: Findings,
) -> Annotated:
    where = f"{path}: the image {image['id']}"
    if not isinstance(image.get("file_name"), str):
        raise DataError(f"{where} has no 'file_name'.")
    return annotated(
        folder / image["file_name"],
        image["id"],
        (_number(image, "height", where, whole=True), _number(image, "width", where, whole=True)),
        entries.get(image["id"], ()),
        findings,
        num_keypoints=len(kind.names) if kind else None,
        crowd_index=image.get("crowdIndex"),
    )


def _number(entry: Mapping[str, Any], key: str, where: str, *, whole: bool = False) -> Any:
    """What an entry has under a key.

    Raises:
        DataError: nothing, or no number.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}, {entry!r}, is not made of names and values.")
    if key not in entry:
        raise DataError(f"{where} has no {key!r}.")
    value = entry[key]
    if not _usable(value) or (whole and value != int(value)):
        raise DataError(f"{where}: {key}={value!r} is not a {'whole' if whole else 'finite'} number.")
    return int(value) if whole else value


def _usable(value: Any) -> bool:
    """A number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and abs(value) < 2**63
