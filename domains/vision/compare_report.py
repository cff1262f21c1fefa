"""What the comparison of attention on images shows and stores: a table, a picture, a record."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from zoo import plots
from zoo.bench.growth import COLOURS, MEANING, Line, draw_growth, in_words, late_slopes, legend, markdown
from zoo.bench.report import MIB, Curve
from zoo.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Entry:
    """What was found of one attention layer."""

    name: str
    sees: str
    options: dict[str, Any]
    parameters: int
    """Of the network that was trained."""
    accuracies: tuple[float, ...]
    """Percent, one for each seed."""
    training_seconds: float
    curve: Curve | None
    """Cost of one layer over tokens; None without attention."""

    @property
    def accuracy(self) -> float:
        return fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Half of the range over the seeds."""
        return (max(self.accuracies) - min(self.accuracies)) / 2

    def slopes(self) -> tuple[float, float] | None:
        """Exponents of time and memory over the last two sizes."""
        return late_slopes(self.curve)

    def record(self) -> dict[str, Any]:
        curve = None if self.curve is None else self.curve.record()
        return {
            **dataclasses.asdict(self),
            "accuracy": self.accuracy,
            "curve": curve,
            "slopes": self.slopes(),
        }


@dataclass(frozen=True)
class Comparison:
    """All that one run found; `picture` is where it is drawn, None = beside the record."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    entries: tuple[Entry, ...]
    picture: str | None = None

    def write(self, path: Path) -> None:
        """The record as JSON at `path`, the table as Markdown beside it, and the picture."""
        record = {
            "title": "attention on images",
            "settings": self.settings,
            "machine": self.machine,
            "entries": [entry.record() for entry in self.entries],
        }
        with atomic_write(path, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
        with atomic_write(path.with_suffix(".md"), "w") as file:
            file.write(self.markdown())
        draw(self, Path(self.picture) if self.picture else path.with_suffix(".png"))

    @property
    def sizes(self) -> list[int]:
        return sorted({point.size for entry in self.entries if entry.curve for point in entry.curve.points})

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells, by accuracy."""
        headings = [
            "attention",
            "a token sees",
            "accuracy, %",
            *(f"{n:,} tokens" for n in self.sizes),
            "growth",
        ]
        best_first = sorted(self.entries, key=lambda entry: -entry.accuracy)
        return headings, [
            [
                f"`{entry.name}`" if entry.curve else entry.name,
                MEANING[entry.sees],
                f"{entry.accuracy:.1f} ± {entry.spread:.1f}",
                *(_cell(entry, size) for size in self.sizes),
                _growth(entry),
            ]
            for entry in best_first
        ]

    def markdown(self) -> str:
        return markdown(*self.rows(), left=2)

    def __rich__(self) -> Table:
        headings, rows = self.rows()
        where = self.machine.get("gpu", f"{self.machine['cpu']}, threads: {self.machine['threads']}")
        table = Table(
            title=f"attention on images\n{where}, torch {self.machine['torch']}",
            box=SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, heading in enumerate(headings):
            table.add_column(heading, justify="left" if i < 2 else "right", no_wrap=i != 1)
        for cells in rows:
            table.add_row(*(cell.strip("`").replace(", ", "\n") for cell in cells))
        table.caption = (
            "accuracy: mean over seeds ± half of the range; cost: forward and backward of one layer"
        )
        return table


def _cell(entry: Entry, size: int) -> str:
    points = () if entry.curve is None else entry.curve.points
    return next((", ".join(in_words(point)) for point in points if point.size == size), "")


def _growth(entry: Entry) -> str:
    slopes = entry.slopes()
    return "" if slopes is None else f"N^{slopes[0]:.1f}, N^{slopes[1]:.1f}"


# ---- the picture -------------------------------------------------------------------------------------------

STYLE: dict[Any, Any] = plots.STYLE | plots.GRID | {"axes.titlesize": 10, "axes.titleweight": "bold"}


def draw(comparison: Comparison, path: Path) -> None:
    """Accuracy as dots, time and memory of one layer over tokens as lines."""
    ratios = (1, 1.15, 1.15)
    with plots.canvas(path, (14, 5.4), STYLE, colours=64, ncols=3, width_ratios=ratios) as (figure, found):
        axes = found[0]
        _draw_accuracy(axes[0], comparison)
        lines = [Line(entry.name, entry.sees, entry.curve) for entry in comparison.entries if entry.curve]
        title = "Forward and backward of one layer, ms"
        draw_growth(axes[1], lines, "seconds", 1e-3, title, square=True)
        draw_growth(axes[2], lines, "bytes", MIB, "Peak memory, MiB", square=True)
        legend(figure, {entry.sees for entry in comparison.entries})


def _draw_accuracy(ax: Axes, comparison: Comparison) -> None:
    entries = sorted(comparison.entries, key=lambda entry: entry.accuracy)
    for i, entry in enumerate(entries):
        colour = COLOURS[entry.sees]
        ax.plot([min(entry.accuracies), max(entry.accuracies)], [i, i], color=colour, linewidth=1.5)
        ax.plot(entry.accuracies, [i] * len(entry.accuracies), "|", color=colour, markersize=7)
        ax.plot(entry.accuracy, i, "o", color=colour, markersize=6)
    ax.set_yticks(range(len(entries)), [entry.name for entry in entries])
    ax.set_xlabel("test digits read, % (mean; each seed a tick)")
    ax.set_title("Accuracy after a fixed budget")
    ax.grid(False, axis="y")
