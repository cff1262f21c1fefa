"""What the terminal shows of a tested detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table

SHOWN_CLASSES = 20


def tables(results: Mapping[str, Any]) -> Sequence[RenderableType]:
    """Scores beside those of baselines, classes, and what has to be said of the data."""
    return [_scores(results), _classes(results), *_verdict(results)]


def number(value: float | None) -> str:
    """In percent; a dash for what is not defined."""
    return "-" if value is None else f"{100 * value:.1f}"


def _scores(results: Mapping[str, Any]) -> Table:
    what = "OKS" if results["kind"] == "keypoints" else "IoU"
    table = Table("", title=f"Test of {results['images']['test']} images, by {what}, in percent")
    columns = next(iter(results["scores"].values()))
    for name in results["scores"]:
        table.add_column(name, justify="right", no_wrap=True)
    for metric in columns:
        values = [number(stats.get(metric)) for stats in results["scores"].values()]
        table.add_row(metric, *values, style="bold" if metric == "AP50" else None)
    return table


def _classes(results: Mapping[str, Any]) -> Table:
    """All classes, or where there are many the worst."""
    rows = list(results["classes"].items())
    title = "Classes"
    if len(rows) > SHOWN_CLASSES:
        rows = [row for row in rows if row[1]["AP"] is not None]
        rows = sorted(rows, key=lambda row: row[1]["AP"])[:SHOWN_CLASSES]
        title = f"The {len(rows)} worst of {len(results['classes'])} classes"
    table = Table("class", title=title)
    for name in ("objects", "AP", "AP50"):
        table.add_column(name, justify="right")
    for name, row in rows:
        table.add_row(name, str(row["objects"]), number(row["AP"]), number(row["AP50"]))
    return table


def _verdict(results: Mapping[str, Any]) -> list[str]:
    own, *others = results["scores"].items()
    name, stats = own
    lines = [f"{name}: AP {number(stats['AP'])}, AP50 {number(stats['AP50'])}."]
    if others:
        beside = ", ".join(f"{other} {number(values['AP50'])}" for other, values in others)
        lines[0] += f" AP50 of baselines: {beside}."
    if undefined := [metric for metric, value in stats.items() if value is None]:
        lines.append(f"Not defined, as there is nothing to find: {', '.join(undefined)}.")
    if results["tested_on_val"]:
        lines.append("The data have no test part: the best epoch was chosen on the images it is tested on.")
    if results["unreadable"]:
        lines.append(f"{results['unreadable']} images could not be read and are left out.")
    return lines
