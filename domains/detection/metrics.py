"""Average precision and recall of COCO (Lin et al. 2014), of boxes and keypoints, by the usual tools."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.detection.annotations import CROWDPOSE_AREA
from domains.detection.sources.coco import load_json
from zoo.errors import DataError, MissingExtra

BOX_STATS = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
KEYPOINT_STATS = (
    *("AP", "AP50", "AP75", "AP_medium", "AP_large"),
    *("AR", "AR50", "AR75", "AR_medium", "AR_large"),
)
CROWD_STATS = ("AP", "AP50", "AP75", "AR", "AR50", "AR75")
STATS = {"bbox": BOX_STATS, "keypoints": KEYPOINT_STATS, "crowdpose": KEYPOINT_STATS}
CROWDED = {"easy": (0.0, 0.2), "medium": (0.2, 0.8), "hard": (0.8, 1.01)}
"""By `crowdIndex`, as the toolkit of CrowdPose cuts."""
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Scores:
    """What the tools say; None where there is nothing to find, which is no score."""

    stats: dict[str, float | None]
    classes: dict[str, dict[str, float | int | None]]
    """Of each class `AP`, `AP50` and the number of `objects`."""
    precision: np.ndarray
    """`(101,)` at IoU or OKS 0.5, by `RECALLS`; mean over the classes that occur; NaN where none does."""


def coco_scores(
    truth: Mapping[str, Any] | str | Path,
    results: Sequence[Mapping[str, Any]] | str | Path,
    kind: str,
    sigmas: Sequence[float] | None = None,
) -> Scores:
    """Judge results in COCO's format.

    Args:
        truth: annotations in COCO's format, or their file.
        results: each `image_id`, `category_id`, `score`, and `bbox` (x, y, w, h) or `keypoints`; or a file.
        kind: `bbox` (IoU, at most 100 results of an image), `keypoints` (OKS, at most 20), or `crowdpose`:
            OKS by its rules.
        sigmas: of the keypoints; None: those of COCO.

    Raises:
        DataError: results of images or categories that the annotations do not list, or not in this format.
        MissingExtra: neither faster-coco-eval nor pycocotools is installed.
    """
    content = load_json(Path(truth)) if isinstance(truth, str | Path) else copy.deepcopy(dict(truth))
    entries = load_json(Path(results)) if isinstance(results, str | Path) else results
    _check(content, entries, kind)
    if kind == "crowdpose":
        for entry in content["annotations"]:
            entry["area"] = CROWDPOSE_AREA * entry["bbox"][2] * entry["bbox"][3]
    found = _judged(content, entries, kind, sigmas)
    stats = dict(zip(STATS[kind], map(_defined, found.stats), strict=False))
    if kind == "crowdpose":
        stats = {name: stats[name] for name in CROWD_STATS} | {
            f"AP_{name}": _subset(content, entries, limits, sigmas) for name, limits in CROWDED.items()
        }
    return Scores(stats, _per_class(content, found), _precision(found))


def _subset(
    content: dict[str, Any],
    entries: Sequence[Mapping[str, Any]],
    limits: tuple[float, float],
    sigmas: Sequence[float] | None,
) -> float | None:
    """AP of the images that are so crowded."""
    images = [image for image in content["images"] if limits[0] <= image.get("crowdIndex", 0) < limits[1]]
    ids = {image["id"] for image in images}
    part = {**content, "images": images}
    part["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    if not part["annotations"]:
        return None
    inside = [entry for entry in entries if entry["image_id"] in ids]
    return _defined(_judged(part, inside, "crowdpose", sigmas).stats[0])


def _judged(
    content: dict[str, Any],
    entries: Sequence[Mapping[str, Any]],
    kind: str,
    sigmas: Sequence[float] | None,
) -> Any:
    """The tool after its work: `stats`, `eval["precision"]` (IoU, recall, class, area, count), `params`."""
    COCO, Judge = _tool()
    what = "bbox" if kind == "bbox" else "keypoints"
    entries = entries or [_nothing(content, what)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.dataset.setdefault("info", {})
        truth.createIndex()
        judge = Judge(truth, truth.loadRes(copy.deepcopy(entries)), what)
        judge.params.catIds = sorted(category["id"] for category in content["categories"])
        if sigmas is not None:
            judge.params.kpt_oks_sigmas = np.array(sigmas)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def _tool() -> tuple[Any, Any]:
    """faster-coco-eval, or pycocotools: their numbers are the same."""
    if importlib.util.find_spec("faster_coco_eval") is not None:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    if importlib.util.find_spec("pycocotools") is not None:
        from pycocotools.coco import COCO  # pyright: ignore[reportMissingModuleSource]
        from pycocotools.cocoeval import COCOeval  # pyright: ignore[reportMissingModuleSource]

        return COCO, COCOeval
    raise MissingExtra('COCO metrics need faster-coco-eval: pip install "attention-zoo[detection]"')


def _nothing(content: dict[str, Any], kind: str) -> dict[str, Any]:
    """A result that finds nothing, for tools that refuse an empty list."""
    entry = {
        "image_id": content["images"][0]["id"],
        "category_id": content["categories"][0]["id"],
        "score": 0.0,
    }
    if kind == "bbox":
        return {**entry, "bbox": [-2.0, -2.0, 1.0, 1.0]}
    lengths = [len(found["keypoints"]) for found in content["annotations"] if "keypoints" in found]
    return {**entry, "keypoints": [-1e6, -1e6, 1.0] * (lengths[0] // 3 if lengths else 1)}


def _check(content: Mapping[str, Any], entries: Any, kind: str) -> None:
    """Raises `DataError` for results that are of no known image or category, or not of the format."""
    if not isinstance(entries, list | tuple):
        raise DataError("Results are a list of objects with image_id, category_id and score.")
    images = {image["id"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    field = "bbox" if kind == "bbox" else "keypoints"
    count = 4 if kind == "bbox" else _numbers_of_poses(content)
    for place, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise DataError(f"Result {place} is {entry!r}: an object with image_id and score is expected.")
        missing = [key for key in ("image_id", "category_id", "score", field) if key not in entry]
        if missing:
            raise DataError(f"Result {place} has no {missing[0]!r}.{_other_kind(missing[0], entry)}")
        if unfit := [key for key in ("image_id", "category_id") if not isinstance(entry[key], int | str)]:
            raise DataError(f"Result {place}: {unfit[0]}={entry[unfit[0]]!r} is no id.")
        if entry["image_id"] not in images:
            raise DataError(
                f"Result {place} is of image {entry['image_id']!r}, which the annotations do not list."
            )
        where = f"Result {place} (image id {entry['image_id']})"
        if entry["category_id"] not in names:
            known = ", ".join(f"{number} ({name})" for number, name in list(names.items())[:10])
            raise DataError(
                f"{where} is of category {entry['category_id']!r}; the annotations have {known}"
                f"{', ...' if len(names) > 10 else ''}. Results name categories by these ids."
            )
        _check_numbers(where, field, entry[field], count)
        _check_numbers(where, "score", [entry["score"]], 1)


def _numbers_of_poses(content: Mapping[str, Any]) -> int | None:
    """Numbers in the keypoints of an object, where there is one."""
    return next((len(entry["keypoints"]) for entry in content["annotations"] if "keypoints" in entry), None)


def _other_kind(missing: str, entry: Mapping[str, Any]) -> str:
    if missing == "bbox" and "keypoints" in entry:
        return " To judge poses: data.keypoints=true."
    if missing == "keypoints" and "bbox" in entry:
        return " To judge boxes: data.keypoints=false."
    return ""


def _check_numbers(where: str, name: str, values: Any, count: int | None) -> None:
    try:
        finite = all(map(math.isfinite, values))
    except (TypeError, OverflowError):
        raise DataError(f"{where}: {name}={values} is not of numbers.") from None
    if count is not None and len(values) != count:
        what = "x, y, width, height" if count == 4 else "x, y and a third number of each keypoint"
        raise DataError(f"{where}: {name} has {len(values)} numbers, not {count}: {what}.")
    if not finite:
        raise DataError(f"{where}: {name} has numbers that are not finite.")


def _defined(value: float) -> float | None:
    return None if value <= -1 else float(value)


def _per_class(content: Mapping[str, Any], found: Any) -> dict[str, dict[str, float | int | None]]:
    precision = found.eval["precision"]
    names = {category["id"]: category["name"] for category in content["categories"]}
    counts = dict.fromkeys(names, 0)
    for entry in content["annotations"]:
        counts[entry["category_id"]] += not entry.get("iscrowd")
    out: dict[str, dict[str, float | int | None]] = {}
    for place, number in enumerate(found.params.catIds):
        of_class = precision[:, :, place, 0, -1]
        out[names[number]] = {
            "AP": _mean(of_class),
            "AP50": _mean(of_class[0]),
            "objects": counts[number],
        }
    return out


def _mean(values: np.ndarray) -> float | None:
    known = values[values > -1]
    return float(known.mean()) if known.size else None


def _precision(found: Any) -> np.ndarray:
    values = found.eval["precision"][0, :, :, 0, -1]
    known = (values > -1).all(0)
    return values[:, known].mean(1) if known.any() else np.full(len(RECALLS), np.nan)
