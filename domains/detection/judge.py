"""Scores of results that any program found, by annotations alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from domains.detection import report
from domains.detection.annotations import Collection
from domains.detection.data import DetectionData
from domains.detection.metrics import Scores, coco_scores
from domains.detection.sources.coco import load_json
from zoo.errors import DataError


def judge(file: Path, data: DetectionData) -> Judged:
    """Judge a file of results in COCO's format: boxes, or poses of data with keypoints.

    Results that name their file, as those of `zoo predict` do, belong to the image of that name; others to
    their `image_id`. Images need not be there.

    Raises:
        DataError: the results or the annotations cannot be used, or do not belong together.
    """
    data.setup("results")
    part = data.parts["test"]
    entries = load_json(file)
    try:
        entries = _by_name(entries, part)
        scores = judged(part, entries, pose=data.keypoints)
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return Judged(file, entries, scores)


def judged(part: Collection, results: Sequence[Mapping[str, Any]], *, pose: bool) -> Scores:
    """The scores of results on a part of data, of poses by the rules of CrowdPose where it is that."""
    kind = "bbox" if not pose else "crowdpose" if part.crowdpose else "keypoints"
    sigmas = part.skeleton.sigmas if part.skeleton and pose else None
    return coco_scores(part.as_coco(), results, kind, sigmas)


def _by_name(entries: Any, part: Collection) -> Any:
    """Results whose ids of images are those of the images with their `file_name`."""
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "file_name" in e for e in entries):
        return entries
    ids: dict[str, list[int]] = {}
    for image in part.images:
        ids.setdefault(image.file.name, []).append(image.id)
    found = []
    for place, entry in enumerate(entries):
        numbers = ids.get(Path(str(entry["file_name"])).name, [])
        if len(numbers) != 1:
            count = f"{len(numbers)} images" if numbers else "no image"
            raise DataError(
                f"Result {place} is of {entry['file_name']}; the annotations have {count} of that name."
            )
        found.append({**entry, "image_id": numbers[0]})
    return found


class Judged:
    """Judged results, to report on as on a tested model.

    Args:
        file: of the results, which gives them their name.
        entries: the results.
    """

    def __init__(self, file: Path, entries: Sequence[Mapping[str, Any]], scores: Scores) -> None:
        self.name, self.entries, self.scores = file.stem, entries, scores

    def results(self, data: DetectionData) -> dict[str, Any]:
        part = data.parts["test"]
        return {
            "data": data.name,
            "results": self.name,
            "kind": "keypoints" if data.keypoints else "boxes",
            "images": {"test": len(part)},
            "objects": {"test": part.objects},
            "found": len(self.entries),
            "unreadable": 0,
            "tested_on_val": False,
            "findings": dict(part.findings.counts),
            "scores": {self.name: self.scores.stats},
            "classes": self.scores.classes,
        }

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        return report.tables(results)

    def plots(self, data: DetectionData, results: dict[str, Any], folder: Path) -> None:
        """Precision by recall, and where the images are there what was found in the first."""
        from domains.detection.plots import SHOWN, precision_recall, predictions

        part = data.parts["test"]
        precision_recall({self.name: self.scores}, results["kind"], folder / "precision_recall.png")
        if all(image.file.is_file() for image in part.images[:SHOWN]):
            predictions(part, self.entries, folder / "predictions.png")
