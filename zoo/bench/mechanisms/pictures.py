"""Pictures of a comparison: accuracy as dots, time and memory over tokens as lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import plots
from zoo.bench.growth import COLOURS, Line, draw_growth, legend
from zoo.bench.mechanisms.contestants import Contestant
from zoo.bench.mechanisms.cost import PATTERNS
from zoo.bench.mechanisms.record import Record, Trained
from zoo.bench.report import MIB
from zoo.bench.synthetic import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE: dict[Any, Any] = plots.STYLE | plots.GRID | {"axes.titlesize": 10, "axes.titleweight": "bold"}


def draw_accuracy(record: Record, path: Path) -> None:
    """A panel for each task: a dot for each layer, a line at the score of guessing."""
    tasks = [name for name in TASKS if any(task == name for _, task in record.trained)]
    columns = min(4, len(tasks))
    rows = [tasks[i : i + columns] for i in range(0, len(tasks), columns)]
    heights = [1.4 + 0.19 * max(len(_of(record, task)) for task in row) for row in rows]
    grid: dict[str, Any] = {"nrows": len(rows), "ncols": columns, "height_ratios": heights}
    with plots.canvas(path, (4 * columns, sum(heights) + 0.6), STYLE, colours=64, **grid) as (figure, axes):
        for ax in axes.flat[len(tasks) :]:
            ax.set_visible(False)
        for ax, task in zip(axes.flat, tasks, strict=False):
            _dots(ax, task, _of(record, task))
        legend(figure, {Contestant(name).sees for name, _ in record.trained})


def _of(record: Record, task: str) -> list[Trained]:
    """The entries of a task, the best last."""
    return sorted((e for e in record.trained.values() if e.task == task), key=lambda entry: entry.accuracy)


def _dots(ax: Axes, task: str, entries: list[Trained]) -> None:
    for i, entry in enumerate(entries):
        colour, shares = COLOURS[Contestant(entry.name).sees], [100 * a for a in entry.accuracies]
        ax.plot([min(shares), max(shares)], [i, i], color=colour, linewidth=1.5)
        ax.plot(100 * entry.accuracy, i, "o", color=colour, markersize=6)
    chance = 100 * entries[0].chance
    ax.axvline(chance, color=plots.GREY, linestyle=":", linewidth=1)
    ax.text(chance + 1, -0.8, "guessing", color=plots.GREY, fontsize=7, va="center")
    ax.set_yticks(range(len(entries)), [entry.name for entry in entries])
    ax.set_ylim(-1.2, len(entries) - 0.4)
    ax.set_xlim(-2, 103)
    ax.set_xlabel("%")
    ax.set_title(f"{task}\n{TASKS[task].about}")
    ax.grid(False, axis="y")


def draw_cost(record: Record, path: Path) -> None:
    """Time above memory, a column for each pattern; causal cross attention is the noncausal computation."""
    drawn = [p for p in PATTERNS if p != "CC" and any(p == pattern for _, pattern in record.costs)]
    lines = {pattern: _lines(record, pattern) for pattern in drawn}
    height = 2 * max(3.5, 1.2 + 0.12 * max(map(len, lines.values())))
    grid = {"nrows": 2, "ncols": len(drawn)}
    with plots.canvas(path, (5.6 * len(drawn), height), STYLE, colours=64, **grid) as (figure, axes):
        for column, pattern in zip(axes.T, drawn, strict=True):
            title = PATTERNS[pattern].capitalize()
            draw_growth(column[0], lines[pattern], "seconds", 1e-3, f"{title}: time, ms", square=False)
            draw_growth(column[1], lines[pattern], "bytes", MIB, f"{title}: peak memory, MiB", square=False)
        legend(figure, {line.sees for found in lines.values() for line in found})


def _lines(record: Record, pattern: str) -> list[Line]:
    costs = (cost for cost in record.costs.values() if cost.pattern == pattern)
    return [Line(cost.name, Contestant(cost.name).sees, cost.curve) for cost in costs]
