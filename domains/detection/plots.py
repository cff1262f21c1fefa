"""The pictures of detection: predictions beside the truth, precision by recall, the course of training."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from domains.detection.annotations import Annotated, Collection
from domains.detection.drawing import Shown, drawn
from domains.detection.metrics import RECALLS, Scores
from domains.detection.pictures import read_rgb
from zoo.files import atomic_write
from zoo.plots import BLUE, GREEN, GREY, GRID, PURPLE, STYLE, VERMILION, canvas

if TYPE_CHECKING:
    from domains.detection.data import DetectionData
    from domains.detection.task import DetectionTask

_canvas = partial(canvas, style=STYLE | GRID)
SHOWN = 6
THRESHOLD = 0.3
"""Least score of what is drawn."""
TILE = 320
"""Least length of the longer side of a drawn picture."""


def draw_results(task: DetectionTask, data: DetectionData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a tested model, and its results on the test part as COCO json."""
    with atomic_write(folder / "test_results.json", "w") as file:
        json.dump(task.tested, file)
    predictions(data.parts["test"], task.tested, folder / "predictions.png")
    precision_recall(task.compared, results["kind"], folder / "precision_recall.png")
    if (folder.parent / "metrics.csv").is_file():
        training_curve(folder.parent / "metrics.csv", folder / "training.png")


def predictions(part: Collection, results: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """The first images of a part: the truth above, what was found with a score of at least 0.3 below."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for entry in results:
        if entry["score"] >= THRESHOLD:
            found[entry["image_id"]].append(entry)
    images = part.images[:SHOWN]
    with canvas(path, (2.2 * len(images), 4.6), STYLE, nrows=2, ncols=len(images)) as (_, axes):
        for column, image in enumerate(images):
            picture = read_rgb(image.file, (image.height, image.width))
            scale = max(1, -(-TILE // max(picture.size)))
            shown = _truth(image, part), _results(found[image.id], part)
            for row, objects in enumerate(shown):
                _show(axes[row, column], drawn(picture, objects, part.skeleton, scale=scale))
        axes[0, 0].set_ylabel("truth")
        axes[1, 0].set_ylabel("found")


def _show(ax: Any, picture: Image.Image) -> None:
    ax.imshow(picture)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _truth(image: Annotated, part: Collection) -> list[Shown]:
    points = image.keypoints
    if points is None:
        return [
            Shown(part.classes[label], int(label), box.tolist())
            for label, box in zip(image.labels, image.boxes, strict=True)
        ]
    places = np.where(points[..., 2:] > 0, points[..., :2], np.nan)
    return [Shown("", i, None, places[i]) for i in range(len(image))]


def _results(entries: Sequence[Mapping[str, Any]], part: Collection) -> list[Shown]:
    """The worst first, so that the best lie above."""
    found = []
    for i, entry in enumerate(sorted(entries, key=lambda entry: entry["score"])):
        label = part.category_ids.index(entry["category_id"])
        if "keypoints" in entry:
            places = np.array(entry["keypoints"]).reshape(-1, 3)[:, :2]
            found.append(Shown(f"{entry['score']:.2f}", i, None, places))
        else:
            x, y, width, height = entry["bbox"]
            text = f"{part.classes[label]} {entry['score']:.2f}"
            found.append(Shown(text, label, (x, y, x + width, y + height)))
    return found


def precision_recall(compared: Mapping[str, Scores], kind: str, path: str | Path) -> None:
    """Precision by recall at an overlap of 0.5, mean over classes, of the model and its baselines."""
    colours = (GREEN, VERMILION, BLUE, PURPLE)
    what = "OKS" if kind == "keypoints" else "IoU"
    with _canvas(path, (4.2, 3.4)) as (_, axes):
        ax = axes[0, 0]
        for (name, scores), colour in zip(compared.items(), colours, strict=False):
            value = scores.stats["AP50"]
            if value is not None:
                ax.plot(RECALLS, scores.precision, color=colour, label=f"{name}, AP50 {100 * value:.1f}")
        ax.set(xlabel="recall", ylabel="precision", title=f"At {what} 0.5, mean over classes")
        ax.set(xlim=(0, 1), ylim=(0, 1.02))
        ax.legend(frameon=False, fontsize=8)


def training_curve(metrics: str | Path, path: str | Path) -> None:
    """Loss and validation AP by epoch, from a run's `metrics.csv`."""
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels = (
        ("loss", (("train/loss", BLUE, "training, all layers and groups"), ("val/loss", GREY, "validation"))),
        ("validation, percent", (("val/ap", GREEN, "AP"), ("val/ap50", PURPLE, "AP50"))),
    )
    with _canvas(path, (8.4, 3.0), ncols=2) as (_, axes):
        for ax, (title, lines) in zip(axes[0], panels, strict=True):
            scale = 100 if "percent" in title else 1
            for key, colour, label in lines:
                points = np.array([(float(r["epoch"]), scale * float(r[key])) for r in rows if r.get(key)])
                ax.plot(*points.reshape(-1, 2).T, color=colour, label=label, marker="o", markersize=2.5)
            ax.set(xlabel="epoch", title=title)
            ax.set_ylim(bottom=0)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend(frameon=False, fontsize=8)
