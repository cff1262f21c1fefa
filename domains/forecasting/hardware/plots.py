"""The picture of predicted scores: predicted against measured, and how many rows lie within which error."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from domains.forecasting.hardware.metrics import absolute_percentage_errors
from zoo import plots
from zoo.files import atomic_path
from zoo.plots import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from domains.forecasting.hardware.data import HardwareData
    from domains.forecasting.hardware.encode import Encoder
    from domains.forecasting.hardware.task import HardwareTask

_canvas = partial(canvas, style=plots.STYLE | plots.GRID)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, "#E69F00", "#8C564B", GREY)
MARKERS = "osD^vPX*"
BAND = 0.1
"""Relative error of the band about the diagonal."""
WIDEST = 50
"""Percent at which the curve of errors ends."""


def draw_results(task: HardwareTask, data: HardwareData, folder: Path) -> None:
    """`scores.png`, and `predictions.csv` with the rows of the test that it shows."""
    table, measured, predicted = task.tested(data)
    shown = table.copy()
    for i, target in enumerate(data.encoder.columns.target):
        for name, scores in predicted.items():
            shown[f"{target} by {name}"] = scores[:, i]
    with atomic_path(folder / "predictions.csv") as part:
        shown.to_csv(part, index=False)
    draw_scores(measured, predicted, folder / "scores.png", data.encoder, table)


def draw_scores(
    measured: np.ndarray,
    predicted: Mapping[str, np.ndarray],
    path: Path,
    encoder: Encoder,
    table: pd.DataFrame,
) -> None:
    """Left the first of the predictions against the measured scores, right the errors of all.

    Colours tell scores apart where there are several, else workloads.

    Args:
        measured: `(R, targets)`.
        predicted: by name, `(R, targets)`.
        table: the R rows.
    """
    targets = encoder.columns.target
    kinds = np.tile(targets, len(table)) if len(targets) > 1 else _workloads(table, encoder.columns.workload)
    with _canvas(path, (9.6, 4.4), ncols=2) as (_, axes):
        name, scores = next(iter(predicted.items()))
        _against(axes[0, 0], measured.ravel(), scores.ravel(), kinds, encoder.log_target)
        label = targets[0] if len(targets) == 1 else "scores"
        axes[0, 0].set(xlabel=f"measured {label}", ylabel=f"{label} predicted by {name}")
        _errors(axes[0, 1], measured.ravel(), {n: values.ravel() for n, values in predicted.items()})


def _workloads(table: pd.DataFrame, columns: list[str]) -> np.ndarray | None:
    """The name of each row's workload: the first of the columns that name it."""
    return table[columns[0]].fillna("").astype(str).to_numpy() if columns and columns[0] in table else None


def _against(
    ax: Axes, measured: np.ndarray, scores: np.ndarray, kinds: np.ndarray | None, log_scale: bool
) -> None:
    names = [""] if kinds is None else sorted(set(kinds))
    for i, name in enumerate(names):
        rows = slice(None) if kinds is None else kinds == name
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]
        ax.plot(measured[rows], scores[rows], marker, color=colour, markersize=3, alpha=0.7, label=name)
    ends: Any = np.array([min(measured.min(), scores.min()), max(measured.max(), scores.max())])
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
    for factor in (1 - BAND, 1 + BAND):
        ax.plot(ends, factor * ends, color=GREY, linewidth=0.8, linestyle=":")
    if log_scale:
        ax.set(xscale="log", yscale="log")
    ax.set_title(f"dotted: {100 * BAND:.0f} % off")
    if kinds is not None and len(names) <= 2 * len(COLOURS):
        ax.legend(frameon=False, fontsize=7, markerscale=1.6, ncols=2, handletextpad=0.1, columnspacing=0.8)


def _errors(ax: Axes, measured: np.ndarray, predicted: Mapping[str, np.ndarray]) -> None:
    for i, (name, scores) in enumerate(predicted.items()):
        ape = np.sort(absolute_percentage_errors(measured, scores))
        share = 100 * np.arange(1, len(ape) + 1) / max(1, len(ape))
        style: dict[str, Any] = (
            {"color": VERMILION} if i == 0 else {"color": COLOURS[(i + 1) % 8], "linestyle": "--"}
        )
        ax.step(np.append(0, ape), np.append(0, share), where="post", label=name, **style)
    ax.set(xlabel="absolute percentage error", ylabel="% of the rows below", xlim=(0, WIDEST), ylim=(0, 100))
    ax.legend(frameon=False, loc="lower right")
