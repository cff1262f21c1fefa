"""The pictures of a forecaster: fan charts, calibration, skill over the sets, the training curve.

Colours can be told apart by colour-blind readers (Okabe and Ito).
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from domains.forecasting.metrics import BASELINE, LEVELS
from zoo import plots
from zoo.plots import BLUE, GREEN, GREY, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from domains.forecasting.data import ForecastData
    from domains.forecasting.task import ForecastTask

STYLE: dict[Any, Any] = plots.STYLE | plots.GRID | {"lines.linewidth": 1.4}
_canvas = partial(canvas, style=STYLE)
SETS = (BLUE, VERMILION, GREEN, "#cc79a7", "#e69f00", "#56b4e9", GREY)
"""Colours of test sets."""
SHOWN_HORIZONS = 4
"""How many times its horizon the history of a fan chart goes back."""
PANELS = 9


@dataclass(frozen=True)
class Fan:
    """One series and its forecast.

    Attributes:
        title: of its panel.
        history: `[T]`, NaN where missing.
        quantiles: `[H, L]` at `levels`, rising.
        levels: L.
        truth: `[H]` what came, NaN where unknown; None: nothing is known.
        timestamps: `[T + H]`; None: steps are counted from the forecast.
    """

    title: str
    history: np.ndarray
    quantiles: np.ndarray
    levels: Sequence[float]
    truth: np.ndarray | None = None
    timestamps: pd.DatetimeIndex | None = None


def draw_results(task: ForecastTask, data: ForecastData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a tested model: fan charts and calibration of each set, skill, the training curve."""
    calibration = {}
    for series, windows, judged in zip(data.tests, data.test_windows, task.judged(data), strict=True):
        chosen = np.linspace(0, len(windows) - 1, min(PANELS, len(windows))).round().astype(int)
        fans = [
            Fan(
                title=windows[i].item.name,
                history=windows[i].history[:, 0],
                quantiles=judged.quantiles[i, :, 0],
                levels=judged.levels,
                truth=windows[i].future[:, 0],
                timestamps=_stamps(windows[i].item.timestamps, windows[i].cut + windows[i].horizon),
            )
            for i in chosen
        ]
        fan_chart(fans, folder / f"forecast_{series.name}.png")
        known = ~np.isnan(judged.y)
        below = judged.y[..., None] <= judged.quantiles
        calibration[series.name] = below[known].mean(axis=0)
    calibration_plot(calibration, LEVELS, folder / "calibration.png")
    if len(results["sets"]) > 1:
        metric = next(iter(results["leaderboards"]))
        skill_plot(results["sets"], task.name, folder / "skill.png", metric)
    if (folder.parent / "metrics.csv").is_file():
        training_curve(folder.parent / "metrics.csv", folder / "training.png")


def _stamps(stamps: pd.DatetimeIndex | None, end: int) -> pd.DatetimeIndex | None:
    return None if stamps is None else stamps[:end]


def fan_chart(fans: Sequence[Fan], path: str | Path) -> None:
    """One panel per series: history, median, central intervals (the lighter the wider), and what came."""
    columns = min(3, len(fans))
    rows = -(-len(fans) // columns)
    with _canvas(path, (4.4 * columns, 0.5 + 2.3 * rows), nrows=rows, ncols=columns) as (fig, axes):
        for ax, fan in zip(axes.flat, fans, strict=False):
            _draw_fan(ax, fan)
        for ax in axes.flat[len(fans) :]:
            ax.set_visible(False)
        entries = {}
        for ax in axes.flat[: len(fans)]:
            entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        fig.legend(entries.values(), entries.keys(), loc="outside upper right", ncols=6, frameon=False)


def _draw_fan(ax: Axes, fan: Fan) -> None:
    ahead = len(fan.quantiles)
    shown = min(len(fan.history), SHOWN_HORIZONS * ahead)
    history = fan.history[-shown:]
    x: Any = np.arange(1 - shown, ahead + 1)
    if fan.timestamps is not None:
        x = fan.timestamps[-(shown + ahead) :]
    past, future = x[:shown], x[shown:]
    ax.set_title(fan.title)
    ax.plot(past, history, color=BLUE, label="history")
    count = len(fan.levels)
    for i in range(count // 2):
        low, high = fan.levels[i], fan.levels[count - 1 - i]
        ax.fill_between(
            future,
            fan.quantiles[:, i],
            fan.quantiles[:, count - 1 - i],
            color=VERMILION,
            alpha=0.15,
            linewidth=0,
            label=f"{low:g} to {high:g}" if i == 0 else None,
        )
    if fan.truth is not None:
        ax.plot(future, fan.truth, color=BLUE, alpha=0.55, linestyle="--", label="what came")
    middle = int(np.argmin(np.abs(np.asarray(fan.levels) - 0.5)))
    marker = "o" if ahead == 1 else None
    ax.plot(future, fan.quantiles[:, middle], color=VERMILION, marker=marker, label="median")
    ax.axvline(past[-1], color=GREY, linewidth=0.8, linestyle=":")
    if fan.timestamps is None:
        ax.set_xlabel("steps from the forecast")
    else:
        _label_time(ax)


def _label_time(ax: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=7)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def calibration_plot(shares: Mapping[str, np.ndarray], levels: Sequence[float], path: str | Path) -> None:
    """The share of values that fell below each quantile, by set; on the diagonal where it is calibrated."""
    markers = "osD^vPX*"
    with _canvas(path, (4.2, 3.8)) as (_, axes):
        ax = axes.flat[0]
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for i, (name, share) in enumerate(shares.items()):
            colour, marker = SETS[i % len(SETS)], markers[i % len(markers)]
            ax.plot(levels, share, color=colour, marker=marker, markersize=4, label=name)
        ax.set(xlabel="quantile level", ylabel="share of values below", xlim=(0, 1), ylim=(0, 1))
        ax.set_title("calibration on the test sets")
        ax.legend(frameon=False)


def skill_plot(sets: Mapping[str, Any], own: str, path: str | Path, metric: str = "WQL") -> None:
    """The error of each forecast relative to seasonal naive, set by set."""
    others = [name for name in next(iter(sets.values()))["errors"] if name != BASELINE]
    height = 0.9 + 0.28 * len(sets) * len(others)
    colours = {own: VERMILION}
    with _canvas(path, (6.4, height)) as (_, axes):
        ax = axes.flat[0]
        for i, name in enumerate(others):
            ratios = [
                facts["errors"][name][metric] / facts["errors"][BASELINE][metric] for facts in sets.values()
            ]
            places = np.arange(len(sets)) + (i - (len(others) - 1) / 2) * 0.8 / len(others)
            colour = colours.get(name, (BLUE, GREEN, GREY)[i % 3])
            bars = ax.barh(places, ratios, height=0.72 / len(others), color=colour, label=name)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            ax.bar_label(bars, fmt="%.2f", padding=4, fontsize=8, bbox=behind)
        ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
        ax.set_yticks(np.arange(len(sets)), list(sets))
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.set_xlabel(f"{metric} relative to {BASELINE} (lower is better)")
        ax.grid(axis="y", visible=False)
        ax.legend(frameon=False, loc="best")


def training_curve(metrics: Path, path: Path) -> None:
    """Quantile loss over the epochs, in the scale of the contexts."""
    with open(metrics, newline="") as file:
        rows = list(csv.DictReader(file))
    with _canvas(path, (5.2, 3.2)) as (_, axes):
        ax = axes.flat[0]
        for key, colour, label in (("train/loss", BLUE, "training"), ("val/loss", VERMILION, "validation")):
            points = [(int(row["epoch"]), float(row[key])) for row in rows if row.get(key)]
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, label=label)
        ax.set(xlabel="epoch", ylabel="quantile loss, sum over the levels")
        ax.legend(frameon=False)
