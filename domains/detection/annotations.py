"""Images with the objects on them, from whatever format, and what is odd about them.

Shapes: T objects of an image, K keypoints.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from domains.detection.keypoints import SKELETONS, Skeleton, default_skeleton
from zoo.errors import ConfigError, DataError

SMALLEST = 1e-3
"""Sides in pixels below which a box, clipped to its image, has no area."""
EXAMPLES = 3
CROWDPOSE_AREA = 0.53
"""Of a person in parts of its box, where there is no outline (Li et al. 2019, evaluation)."""


@dataclass(frozen=True, eq=False)
class Annotated:
    """An image and its T objects."""

    file: Path
    id: int
    height: int
    width: int
    boxes: np.ndarray
    """`(T, 4)` x1, y1, x2, y2 in pixels, as given: a part may lie outside."""
    labels: np.ndarray
    """`(T,)` place in `Collection.classes`."""
    area: np.ndarray
    """`(T,)` in pixels."""
    crowd: np.ndarray
    """`(T,)` bool: a region of many objects, which is neither trained on nor judged."""
    ids: np.ndarray
    """`(T,)` of the annotations."""
    keypoints: np.ndarray | None = None
    """`(T, K, 3)`: x, y, and 0 not labelled, 1 hidden, 2 visible."""
    crowd_index: float | None = None
    """CrowdPose: how crowded the image is."""

    def __len__(self) -> int:
        return len(self.boxes)

    def only(self, mask: np.ndarray) -> Annotated:
        """With the objects of a mask `(T,)`."""
        fields = {name: getattr(self, name)[mask] for name in ("boxes", "labels", "area", "crowd", "ids")}
        if self.keypoints is not None:
            fields["keypoints"] = self.keypoints[mask]
        return replace(self, **fields)

    def __str__(self) -> str:
        return f"{self.file} (image id {self.id})"


@dataclass
class Findings:
    """What is odd: how often, and where first."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def add(self, what: str, where: str, *, dropped: bool = False) -> None:
        self.counts[what] += 1
        examples = self.places.setdefault(what, [])
        if len(examples) < EXAMPLES:
            examples.append(where)
        if dropped:
            self.dropped.add(what)

    def lines(self) -> list[str]:
        """`12 boxes of no area are left out: FILE (image id 3), annotation 7; ...`"""
        return [self._line(what) for what in sorted(self.counts)]

    def _line(self, what: str) -> str:
        places, count = self.places[what], self.counts[what]
        return f"{count} {what}: {'; '.join(places)}{'; ...' if count > len(places) else ''}"

    def refuse(self) -> None:
        """Raises `DataError` where anything was left out."""
        if self.dropped:
            lines = " ".join(f"{self._line(what)}." for what in sorted(self.dropped))
            raise DataError(f"{lines} Mend the annotations, or leave these out with data.invalid=drop.")


@dataclass(frozen=True, eq=False)
class Collection:
    """Annotated images of one part."""

    images: tuple[Annotated, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    """Of each class in the source; with holes where the source has them."""
    skeleton: Skeleton | None = None
    crowdpose: bool = False
    """To be judged by the rules of CrowdPose."""
    findings: Findings = field(default_factory=Findings)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def objects(self) -> int:
        return sum(map(len, self.images))

    def subset(self, places: Iterable[int]) -> Collection:
        return replace(self, images=tuple(self.images[i] for i in places))

    def as_coco(self) -> dict[str, Any]:
        """The ground truth as the COCO tools read it."""
        categories = [
            {"id": number, "name": name, **_points_of(self.skeleton)}
            for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        images, annotations = [], []
        for image in self.images:
            entry = {
                "id": image.id,
                "file_name": image.file.name,
                "height": image.height,
                "width": image.width,
            }
            if image.crowd_index is not None:
                entry["crowdIndex"] = image.crowd_index
            images.append(entry)
            annotations += [self._annotation(image, i) for i in range(len(image))]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def _annotation(self, image: Annotated, i: int) -> dict[str, Any]:
        x1, y1, x2, y2 = (float(value) for value in image.boxes[i])
        found: dict[str, Any] = {
            "id": int(image.ids[i]),
            "image_id": image.id,
            "category_id": self.category_ids[int(image.labels[i])],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": float(image.area[i]),
            "iscrowd": int(image.crowd[i]),
        }
        if image.keypoints is not None:
            points = image.keypoints[i]
            found["keypoints"] = points.reshape(-1).tolist()
            found["num_keypoints"] = int((points[:, 2] > 0).sum())
        return found


def _points_of(kind: Skeleton | None) -> dict[str, Any]:
    if kind is None:
        return {}
    return {"keypoints": list(kind.names), "skeleton": [[a + 1, b + 1] for a, b in kind.links]}


def annotated(
    file: Path,
    number: int,
    size: tuple[int, int],
    objects: Sequence[Mapping[str, Any]],
    findings: Findings,
    *,
    num_keypoints: int | None = None,
    crowd_index: float | None = None,
) -> Annotated:
    """An image whose objects were looked at: those without area in the image are left out and counted.

    Args:
        objects: each `box` (x1, y1, x2, y2), `label`, `id`, and perhaps `area`, `crowd`, `keypoints`
            (3 K numbers).

    Raises:
        DataError: numbers that are not finite, or keypoints of another count; names file and id.
    """
    height, width = size
    kept = []
    for entry in objects:
        where = f"{file} (image id {number}), annotation {entry['id']}"
        box = np.asarray(entry["box"], np.float64)
        if box.shape != (4,) or not np.isfinite(box).all():
            raise DataError(f"{where}: the box {list(entry['box'])} is not four finite numbers.")
        clipped = box.clip(0, [width, height, width, height])
        if min(box[2:] - box[:2]) <= 0:
            findings.add("boxes of no size are left out", where, dropped=True)
        elif min(clipped[2:] - clipped[:2]) < SMALLEST:
            findings.add("boxes outside of their image are left out", where, dropped=True)
        else:
            if np.abs(box - clipped).max() > 1:
                findings.add("boxes reach over the border of their image; training clips them", where)
            if entry.get("crowd"):
                findings.add("crowds are neither trained on nor judged", where)
            kept.append({**entry, "box": box, "points": _points(entry, num_keypoints, where)})
    if not kept:
        findings.add("images have no object", f"{file} (image id {number})")
    boxes = np.array([entry["box"] for entry in kept], np.float64).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = [entry.get("area") for entry in kept]
    points = None
    if num_keypoints is not None:
        points = np.array([entry["points"] for entry in kept], np.float64).reshape(-1, num_keypoints, 3)
    return Annotated(
        file,
        number,
        height,
        width,
        boxes,
        np.array([entry["label"] for entry in kept], np.int64),
        np.array([sides[i].prod() if area is None else area for i, area in enumerate(areas)], np.float64),
        np.array([bool(entry.get("crowd")) for entry in kept], bool),
        np.array([entry["id"] for entry in kept], np.int64),
        points,
        crowd_index,
    )


def _points(entry: Mapping[str, Any], count: int | None, where: str) -> np.ndarray | None:
    """`(K, 3)`"""
    if count is None:
        return None
    try:
        values = np.asarray(entry.get("keypoints", np.zeros(3 * count)), np.float64).reshape(-1)
    except (TypeError, ValueError):
        raise DataError(f"{where}: keypoints={entry['keypoints']} are not numbers.") from None
    if len(values) != 3 * count:
        raise DataError(
            f"{where}: {len(values)} numbers of keypoints; {count} keypoints have {3 * count}, each x, y and "
            "whether it is labelled (0, 1, 2)."
        )
    if not np.isfinite(values).all():
        raise DataError(f"{where}: a keypoint is not finite.")
    return values.reshape(count, 3)


def skeleton_of(names: Sequence[str], links: Sequence[Sequence[int]], where: str) -> Skeleton:
    """The skeleton of keypoints with these names; links are 1-based, as in COCO files.

    Known ones are told by their names or, where these say nothing, by their number; others get equal
    sigmas, and sides from `left_` and `right_`.
    """
    names = tuple(map(str, names))
    for known in SKELETONS.values():
        if {name.lower() for name in names} == set(known.names) and len(names) == len(known.names):
            return known if names == known.names else _reordered(known, names)
    if len(set(names)) != len(names):
        raise DataError(f"{where}: two keypoints have the same name.")
    plain = default_skeleton(len(names))
    pairs = tuple(
        (i, names.index(name.replace("left", "right", 1)))
        for i, name in enumerate(names)
        if "left" in name and name.replace("left", "right", 1) in names
    )
    try:
        own = tuple((int(a) - 1, int(b) - 1) for a, b in links)
    except (TypeError, ValueError):
        raise DataError(f"{where}: skeleton={links} are not pairs of numbers of keypoints.") from None
    if own and not all(0 <= i < len(names) for pair in own for i in pair):
        own = ()
    try:
        return Skeleton(names, plain.sigmas, pairs or plain.pairs, own or plain.links)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def _reordered(known: Skeleton, names: Sequence[str]) -> Skeleton:
    place = {name: i for i, name in enumerate(name.lower() for name in names)}
    moved = [place[name] for name in known.names]
    sigmas = dict(zip(moved, known.sigmas, strict=True))
    return Skeleton(
        tuple(names),
        tuple(sigmas[i] for i in range(len(names))),
        tuple((moved[a], moved[b]) for a, b in known.pairs),
        tuple((moved[a], moved[b]) for a, b in known.links),
    )


def skeleton_facts(kind: Skeleton) -> dict[str, Any]:
    """A skeleton as json, see `skeleton_from`."""
    return {
        "names": list(kind.names),
        "sigmas": list(kind.sigmas),
        "pairs": [list(pair) for pair in kind.pairs],
        "links": [list(link) for link in kind.links],
    }


def skeleton_from(facts: Mapping[str, Any] | None) -> Skeleton | None:
    """The skeleton that `skeleton_facts` tells of."""
    if not facts:
        return None
    pairs, links = (tuple((int(a), int(b)) for a, b in facts[key]) for key in ("pairs", "links"))
    return Skeleton(tuple(facts["names"]), tuple(facts["sigmas"]), pairs, links)
