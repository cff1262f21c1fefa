"""The pictures of super-resolution: details before and after, and the course of training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import sobel, uniform_filter

from domains.superres.metrics import psnr, to_y
from domains.superres.resize import imresize
from zoo.plots import BLUE, GREEN, GREY, STYLE, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from domains.superres.data import SuperresData
    from domains.superres.task import SuperresTask

_canvas = partial(canvas, style=STYLE)
DETAIL = 96
"""Side of the details shown, in high-resolution pixels."""
MOST_ROWS = 6
THUMBNAIL = 512


def draw_results(task: SuperresTask, data: SuperresData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a tested model: details of test pictures, and the training curve of a run."""
    details(task.seen[:MOST_ROWS], results["model"], results["scale"], folder / "details.png")
    if (folder.parent / "metrics.csv").is_file():
        training_curve(
            folder.parent / "metrics.csv", folder / "training.png", bicubic_psnr(data, task.border)
        )


def bicubic_psnr(data: SuperresData, border: int) -> float:
    """Mean PSNR of luma, in dB, of bicubic enlargement of the validation pictures."""
    store = data.stores["val"]
    pairs = [store.get(i) for i in range(len(store))]
    return float(np.mean([psnr(to_y(imresize(lr, store.scale)), to_y(hr), border) for lr, hr in pairs]))


def details(rows: Sequence[Mapping[str, Any]], model: str, scale: int, path: str | Path) -> None:
    """A row per picture: where the detail lies, then low resolution, bicubic, model, original, with PSNR.

    Args:
        rows: with `name`, `quality` and `bicubic` (see `Quality`), and `detail` as `cut_detail` makes it.
    """
    with _canvas(path, (10.2, 0.3 + 2.15 * len(rows)), nrows=len(rows), ncols=5) as (_, axes):
        for line, row in zip(axes, rows, strict=True):
            detail = row["detail"]
            _show_place(line[0], detail["whole"], detail["box"])
            line[0].set_title(row["name"], fontsize=8)
            titles = {
                "lr": f"low resolution, 1/{scale}",
                "bicubic": f"bicubic, {row['bicubic']['psnr_y']:.2f} dB",
                "sr": f"{model}, {row['quality']['psnr_y']:.2f} dB",
                "hr": "original",
            }
            for ax, (key, title) in zip(line[1:], titles.items(), strict=True):
                _show(ax, detail[key])
                ax.set_title(title, fontsize=8, color=GREEN if key == "sr" else "black")


def cut_detail(lr: np.ndarray, bicubic: np.ndarray, sr: np.ndarray, hr: np.ndarray) -> dict[str, Any]:
    """The square with the most detail of the original, out of all four.

    Args:
        lr: `(h, w, 3)`; the others `(s h, s w, 3)`; all uint8.
    """
    scale = hr.shape[0] // lr.shape[0]
    top, left, side = most_detailed(hr, DETAIL, scale)
    low = [value // scale for value in (top, top + side, left, left + side)]
    cut = {
        name: image[top : top + side, left : left + side].copy()
        for name, image in (("bicubic", bicubic), ("sr", sr), ("hr", hr))
    }
    step = -(-max(hr.shape[:2]) // THUMBNAIL)
    box = tuple(value / step for value in (left, top, side))
    return cut | {
        "lr": lr[low[0] : low[1], low[2] : low[3]].copy(),
        "whole": hr[::step, ::step].copy(),
        "box": box,
    }


def most_detailed(image: np.ndarray, side: int, step: int) -> tuple[int, int, int]:
    """Top, left and side, all multiples of `step`, of the square where luma changes the most.

    It is at most as large as the picture.
    """
    side = min(side, *image.shape[:2]) // step * step
    y = to_y(image)
    change = np.hypot(sobel(y, axis=0), sobel(y, axis=1))
    half = side // 2
    means = uniform_filter(change, side)[half : len(change) - side + half + 1, half:]
    means = means[::step, : image.shape[1] - side + 1 : step]
    top, left = np.unravel_index(int(means.argmax()), means.shape)
    return int(top) * step, int(left) * step, side


def before_after(lr: np.ndarray, sr: np.ndarray, path: str | Path, title: str) -> None:
    """Where the detail lies, the detail as it was, enlarged by bicubic, and by the model.

    Args:
        lr: `(h, w, 1 or 3)` uint8 or uint16.
        sr: `(s h, s w, 1 or 3)`.
    """
    scale = sr.shape[0] // lr.shape[0]
    lr = _eight_bits(lr)
    top, left, side = most_detailed(lr, DETAIL // scale, 1)
    around = lr[max(top - 8, 0) : top + side + 8, max(left - 8, 0) : left + side + 8]
    y, x = (scale * min(value, 8) for value in (top, left))
    square = slice(y, y + scale * side), slice(x, x + scale * side)
    bicubic = imresize(around, scale)[square]
    high = sr[scale * top : scale * (top + side), scale * left : scale * (left + side)]
    step = -(-max(lr.shape[:2]) // THUMBNAIL)
    with _canvas(path, (8.4, 2.5), ncols=4) as (_, axes):
        line = axes[0]
        _show_place(line[0], lr[::step, ::step], (left / step, top / step, side / step))
        line[0].set_title(title, fontsize=8)
        shown = (lr[top : top + side, left : left + side], "before"), (bicubic, f"bicubic x{scale}")
        for ax, (image, text) in zip(
            line[1:], (*shown, (_eight_bits(high), f"after, x{scale}")), strict=True
        ):
            _show(ax, image)
            ax.set_title(text, fontsize=8)


def training_curve(metrics: str | Path, path: str | Path, bicubic: float) -> None:
    """Training loss and validation PSNR by epoch, from a run's `metrics.csv`, beside bicubic (dB)."""
    with open(metrics, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with _canvas(path, (8.4, 3.0), ncols=2) as (_, axes):
        for ax, key, label, colour in (
            (axes[0, 0], "train/loss", "training loss", BLUE),
            (axes[0, 1], "val/psnr_y", "validation PSNR of luma (dB)", GREEN),
        ):
            points = np.array([(float(r["epoch"]), float(r[key])) for r in rows if r.get(key)]).reshape(-1, 2)
            ax.plot(*points.T, color=colour, marker="o", markersize=2.5)
            ax.grid(True, color="#E6E6E6", linewidth=0.6)
            ax.set(xlabel="epoch", ylabel=label)
            ax.xaxis.get_major_locator().set_params(integer=True)
        axes[0, 1].axhline(bicubic, color=VERMILION, linestyle="--")
        place: dict[str, Any] = {"transform": axes[0, 1].get_yaxis_transform(), "va": "bottom", "ha": "right"}
        axes[0, 1].text(0.99, bicubic, f"bicubic {bicubic:.2f} dB", color=VERMILION, **place)


def _show_place(ax: Axes, image: np.ndarray, box: Sequence[float]) -> None:
    """A small picture with a square `(left, top, side)` on it."""
    from matplotlib.patches import Rectangle

    _show(ax, image)
    left, top, side = box
    for colour, width in (("black", 2.4), ("white", 1.2)):
        ax.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=width))


def _show(ax: Axes, image: np.ndarray) -> None:
    """Pixel by pixel, without smoothing."""
    ax.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, color=GREY, linewidth=0.5)


def _eight_bits(image: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` uint8."""
    small = image if image.dtype == np.uint8 else np.round(image / 257).astype(np.uint8)
    return np.broadcast_to(small, (*small.shape[:2], 3))
