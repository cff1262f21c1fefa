"""The pictures of potentials: predicted against given, and the course of training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.atoms import metrics
from zoo.plots import BLUE, GREEN, GREY, GRID, PURPLE, SKY, STYLE, VERMILION, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from domains.atoms.data import AtomsData
    from domains.atoms.task import AtomsTask

_canvas = partial(canvas, style=STYLE | GRID)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, GREY)


def draw_results(task: AtomsTask, data: AtomsData, results: Mapping[str, Any], folder: Path) -> None:
    """All pictures of a tested model: parity of energy, forces and stress, and the course of a run."""
    parity(_panels(task, data, results), folder / "parity.png")
    if (folder.parent / "metrics.csv").is_file():
        training_curve(folder.parent / "metrics.csv", folder / "training.png", results["baseline"])


def _panels(task: AtomsTask, data: AtomsData, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each quantity: title, unit, and `(target, predicted)` by group."""
    table = dict(zip(metrics.COLUMNS, task.rows.T, strict=True))
    groups = np.array([data.tested_groups[int(i)] for i in table["index"]])
    references = task.potential.scale.element_references.cpu().numpy()
    chosen = data.surveys["test"].counts[table["index"].astype(int), : len(references)]
    free = (chosen @ references[: chosen.shape[1]]) / table["natoms"]
    target, found = (table[name] / table["natoms"] - free for name in ("energy_target", "energy"))
    error = results["mean"].get("energy_per_atom_mae")
    panels = [panel_of("energy over references", "eV/atom", target, found, groups, error)]
    for name, unit in (("forces", "eV/Å"), ("stress", "eV/Å³")):
        parts = [part for part in task.shown if name in part]
        if not parts:
            continue
        target, found = (np.concatenate([p[key] for p in parts]) for key in (f"{name}_target", name))
        index = np.concatenate([p["index" if name == "forces" else "frame"] for p in parts])
        width = target[0].size
        by_value = np.array([data.tested_groups[int(i)] for i in index]).repeat(width)
        error = results["mean"].get("force_mae" if name == "forces" else "stress_mae")
        panels.append(panel_of(name, unit, target.reshape(-1), found.reshape(-1), by_value, error))
    return [panel for panel in panels if panel["points"]]


def panel_of(
    title: str, unit: str, target: np.ndarray, found: np.ndarray, groups: np.ndarray, mae: float | None
) -> dict[str, Any]:
    """What `parity` draws of one quantity: all arguments `(values,)`, unknown values NaN."""
    known = np.isfinite(target) & np.isfinite(found)
    points = {
        str(group): (target[known & (groups == group)], found[known & (groups == group)])
        for group in np.unique(groups[known])
    }
    return {"title": title, "unit": unit, "points": points, "mae": mae}


def parity(panels: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Predicted over given, each `config_type` in its colour, on the line where they would be equal.

    Args:
        panels: with `title`, `unit`, `points` (group -> target and prediction) and `mae`, or None.
    """
    with _canvas(path, (3.6 * len(panels), 3.6), ncols=len(panels)) as (_, axes):
        for ax, panel in zip(axes[0], panels, strict=True):
            _scatter(ax, panel)
        axes[0, 0].legend(fontsize=7, markerscale=3, frameon=False, loc="upper left")


def _scatter(ax: Axes, panel: Mapping[str, Any]) -> None:
    values = np.concatenate([np.concatenate(pair) for pair in panel["points"].values()])
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 1.0
    ends = (low - margin, high + margin)
    ax.plot(ends, ends, color=GREY, linewidth=0.8, zorder=1)
    for i, (group, (target, found)) in enumerate(panel["points"].items()):
        colour = COLOURS[i % len(COLOURS)]
        ax.scatter(
            target, found, s=4, alpha=0.5, color=colour, linewidths=0, label=group or "frames", zorder=2
        )
    title = panel["title"]
    if panel["mae"] is not None:
        title += f", MAE {1e3 * panel['mae']:.3g} m{panel['unit']}"
    ax.set_title(title)
    ax.set(xlim=ends, ylim=ends, xlabel=f"given ({panel['unit']})", ylabel=f"predicted ({panel['unit']})")
    ax.set_aspect("equal")


def training_curve(metrics_file: str | Path, path: str | Path, baseline: Mapping[str, float | None]) -> None:
    """Loss and validation errors by epoch, from a run's `metrics.csv`, beside those that cost nothing."""
    with open(metrics_file, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    panels = [
        ("train/loss", "training loss", 1.0, None),
        ("val/force_mae", "validation force MAE (meV/Å)", 1e3, "force_mae"),
        ("val/energy_per_atom_mae", "validation energy MAE (meV/atom)", 1e3, "energy_per_atom_mae"),
    ]
    panels = [panel for panel in panels if any(row.get(panel[0]) for row in rows)]
    with _canvas(path, (3.6 * len(panels), 3.0), ncols=len(panels)) as (_, axes):
        for ax, (key, label, factor, reference) in zip(axes[0], panels, strict=True):
            points = np.array([(float(r["epoch"]), factor * float(r[key])) for r in rows if r.get(key)])
            ax.plot(*points.T, color=BLUE if reference is None else GREEN, marker="o", markersize=2.5)
            ax.set(xlabel="epoch", ylabel=label, yscale="log")
            ax.xaxis.get_major_locator().set_params(integer=True)
            value = baseline.get(reference) if reference else None
            if value:
                ax.axhline(factor * value, color=VERMILION, linestyle="--")
                place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "bottom", "ha": "right"}
                ax.text(0.99, factor * value, "baseline (test)", color=VERMILION, fontsize=8, **place)
