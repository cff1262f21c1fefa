"""The pictures of a classifier: what is taken for what, the worst mistakes, training, contact sheets.

Colours can be told apart by colour-blind readers (Okabe and Ito for lines, cividis for matrices).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from domains.vision.images import Picture
from zoo.errors import DataError
from zoo.plots import BLUE, GREEN, STYLE, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from domains.vision.data import VisionData
    from domains.vision.task import VisionTask

_canvas = partial(canvas, style=STYLE)
MOST_CLASSES = 40
MOST_NUMBERS = 25
"""Up to so many classes, a confusion matrix has its counts written in it."""
COLUMNS = 8


def draw_results(task: VisionTask, data: VisionData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a tested model: confusion matrix, worst mistakes, and the training curve of a run."""
    names = list(results["classes"])
    confusion_plot(task.test_confusion, names, folder / "confusion.png")
    rows = task.seen[0].numpy()
    wrong = rows[(rows[:, 1] != rows[:, 2]) & (rows[:, 1] >= 0)]
    worst = wrong[np.argsort(-wrong[:, 3], kind="stable")][: 5 * COLUMNS]
    if len(worst):
        tiles = [_mistake(data, names, row) for row in worst]
        title = f"{len(worst)} of {len(wrong)} mistakes in {len(rows)} test images, the surest first"
        contact_sheet(tiles, folder / "mistakes.png", title)
    if (folder.parent / "metrics.csv").is_file():
        training_curve(folder.parent / "metrics.csv", folder / "training.png")


def _mistake(data: VisionData, names: Sequence[str], row: np.ndarray) -> tuple[Picture | None, str, str]:
    place, label, prediction = row[:3].astype(int)
    caption = f"{names[prediction]}? {100 * row[3]:.0f} %\nis {names[label]}"
    return readable(data.parts["test"].read, int(place)), caption, VERMILION


def readable(read: Any, place: int) -> Picture | None:
    """The picture, or None where it cannot be read."""
    try:
        return read(place)
    except DataError:
        return None


def confusion_plot(confusion: np.ndarray, names: Sequence[str], path: str | Path) -> None:
    """Counts `[true, predicted]`, coloured by the share of the true class.

    Of more than 40 classes, those with the most mistakes are drawn.
    """
    title = f"Rows: true class, columns: prediction; {confusion.sum()} images"
    if len(names) > MOST_CLASSES:
        mistakes = confusion.sum(0) + confusion.sum(1) - 2 * confusion.diagonal()
        chosen = np.sort(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES])
        title = f"The {MOST_CLASSES} of {len(names)} classes with the most mistakes (rows: true class)"
        confusion, names = confusion[np.ix_(chosen, chosen)], np.asarray(names)[chosen].tolist()
    labels = [_short(name) for name in names]
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = 2.2 + 0.36 * len(names)
    with _canvas(path, (max(side, 3.6) + 0.8, max(side, 3.4))) as (figure, axes):
        ax = axes.flat[0]
        image = ax.imshow(share, cmap="cividis", vmin=0, vmax=1)
        places = range(len(labels))
        upright = max(map(len, labels)) <= 2
        ax.set_xticks(places, labels, rotation=0 if upright else 45, ha="center" if upright else "right")
        ax.set_yticks(places, labels)
        ax.set(xlabel="predicted", ylabel="true")
        ax.set_title(title)
        if len(names) <= MOST_NUMBERS:
            for i, j in zip(*np.nonzero(confusion), strict=True):
                colour = "black" if share[i, j] > 0.5 else "white"
                ax.text(j, i, str(confusion[i, j]), ha="center", va="center", color=colour, fontsize=7)
        bar = figure.colorbar(image, ax=ax, label="share of the true class", shrink=0.8, pad=0.02)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]


def contact_sheet(
    tiles: Sequence[tuple[Picture | None, str, str]], path: str | Path, title: str, columns: int = COLUMNS
) -> None:
    """Small pictures in rows, each with a caption below.

    Args:
        tiles: picture (None where it could not be read), caption, colour of the caption.
    """
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    size = (max(1.35 * columns, 4.5), 0.45 + 1.75 * rows)
    with _canvas(path, size, nrows=rows, ncols=columns) as (figure, axes):
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        for ax in axes.flat:
            ax.set_axis_off()
        for ax, (picture, caption, colour) in zip(axes.flat, tiles, strict=False):
            if picture is not None:
                show(ax, picture)
            lines = [_short(line, 20) for line in caption.split("\n")]
            place: dict[str, Any] = {"transform": ax.transAxes, "ha": "center", "va": "top"}
            ax.text(0.5, -0.06, "\n".join(lines), color=colour, fontsize=7.5, **place)


def show(ax: Axes, picture: Picture) -> None:
    """Draw a picture; of other than three bands the first three, or the first."""
    if isinstance(picture, Image.Image):
        small = picture.copy()
        small.thumbnail((256, 256))
        ax.imshow(small, interpolation="nearest" if max(small.size) < 64 else "antialiased")
        return
    bands = picture[..., :3] if picture.shape[2] > 2 else picture[..., :1]
    low, high = np.percentile(bands, (2, 98))
    ax.imshow(((bands - low) / max(high - low, 1e-6)).clip(0, 1), cmap="gray")


def training_curve(metrics: str | Path, path: str | Path) -> None:
    """Losses, and the validation accuracy, by epoch, from a run's `metrics.csv`; the best epoch is marked."""
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels = (
        ("loss", (("train/loss", BLUE, "training (augmented)"), ("val/loss", VERMILION, "validation"))),
        ("validation top-1 (%)", (("val/top1", GREEN, "validation"),)),
    )
    with _canvas(path, (8.4, 3.0), ncols=2) as (_, axes):
        for ax, (label, lines) in zip(axes.flat, panels, strict=True):
            factor = 100 if "%" in label else 1
            for key, colour, name in lines:
                known = [(float(r["epoch"]), factor * float(r[key])) for r in rows if r.get(key)]
                points = np.array(known).reshape(-1, 2)
                if not len(points):
                    continue
                ax.plot(*points.T, color=colour, marker="o", markersize=2.5, label=name)
                if key == "val/top1":
                    _mark_best(ax, points)
            ax.grid(True, color="#E6E6E6", linewidth=0.6)
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.get_major_locator().set_params(integer=True)
            if label == "loss" and ax.lines:
                ax.legend(frameon=False)


def _mark_best(ax: Axes, points: np.ndarray) -> None:
    epoch, best = points[points[:, 1].argmax()]
    ax.plot(epoch, best, marker="o", markersize=6, markerfacecolor="none", color=GREEN)
    place: dict[str, Any] = {"transform": ax.transAxes, "ha": "right", "color": GREEN}
    ax.text(0.98, 0.06, f"best {best:.2f} %, epoch {epoch:.0f}", **place)


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
