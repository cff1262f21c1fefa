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
from zoo.bench.report import MIB, Curve, Point
from zoo.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    "nothing": "#9A9A9A",
    "all": "#3B3B3B",
    "near": plots.BLUE,
    "some": plots.VERMILION,
    "sums": plots.GREEN,
}
"""By what a token sees."""
MEANING = {
    "nothing": "no attention",
    "all": "all tokens",
    "near": "tokens around",
    "some": "a few tokens, or means of them",
    "sums": "sums over all tokens",
}
LINES = ("-", "--", "-.", ":")


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
        """Exponents of time and memory over the last two sizes, where nothing constant hides them."""
        if self.curve is None or len(self.curve.points) < 2:
            return None
        return Curve(self.name, self.curve.points[-2:]).slopes()

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
        headings, rows = self.rows()
        rule = ["---", "---", *("---:" for _ in headings[2:])]
        return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *rows))

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


def _point(entry: Entry, size: int) -> Point | None:
    return None if entry.curve is None else next((p for p in entry.curve.points if p.size == size), None)


def _cell(entry: Entry, size: int) -> str:
    point = _point(entry, size)
    if point is None:
        return ""
    time = f"{point.seconds:.2f} s" if point.seconds >= 0.1 else f"{point.seconds * 1e3:.1f} ms"
    return f"{time}, {point.bytes / MIB:,.{0 if point.bytes > 10 * MIB else 1}f} MiB"


def _growth(entry: Entry) -> str:
    slopes = entry.slopes()
    return "" if slopes is None else f"N^{slopes[0]:.1f}, N^{slopes[1]:.1f}"


# ---- the picture -------------------------------------------------------------------------------------------

STYLE: dict[Any, Any] = plots.STYLE | plots.GRID | {"axes.titlesize": 10, "axes.titleweight": "bold"}


def draw(comparison: Comparison, path: Path) -> None:
    """Accuracy as dots, time and memory of one layer over tokens as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    with plt.rc_context(STYLE), atomic_path(path) as temporary:
        figure, axes = plt.subplots(
            1, 3, figsize=(14, 5.4), width_ratios=(1, 1.15, 1.15), layout="constrained"
        )
        _draw_accuracy(axes[0], comparison)
        _draw_growth(axes[1], comparison, "seconds", "Forward and backward of one layer, ms", 1e-3)
        _draw_growth(axes[2], comparison, "bytes", "Peak memory, MiB", MIB)
        shown = {entry.sees for entry in comparison.entries}
        handles = [
            Line2D([], [], color=colour, linewidth=3, label=MEANING[sees])
            for sees, colour in COLOURS.items()
            if sees in shown
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=5, frameon=False, title="A token sees"
        )
        figure.savefig(temporary, dpi=150, format="png")
        plt.close(figure)


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


def _draw_growth(ax: Axes, comparison: Comparison, of: str, title: str, unit: float) -> None:
    drawn: dict[str, int] = {}
    ends = []
    for entry in comparison.entries:
        if entry.curve is None:
            continue
        nth = drawn[entry.sees] = drawn.get(entry.sees, -1) + 1
        x = [point.size for point in entry.curve.points]
        y = [getattr(point, of) / unit for point in entry.curve.points]
        colour = COLOURS[entry.sees]
        ax.plot(x, y, LINES[nth % len(LINES)], color=colour, linewidth=1.6, marker=".", markersize=5)
        ends.append((entry.name, colour, x[-1], y[-1]))
    ax.set_xscale("log", base=4)
    ax.set_yscale("log")
    sizes = comparison.sizes
    ax.set_xticks(sizes, [f"{n:,}\n{round(n**0.5)} x {round(n**0.5)}" for n in sizes])
    ax.set_xlabel("tokens, and the map")
    ax.set_title(title)
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    _label(ax, ends, sizes)


def _label(ax: Axes, ends: list[tuple[str, str, float, float]], sizes: list[int]) -> None:
    """Names at the right of the lines, apart from each other, with a hair to where the line ends; beside it,
    where that is earlier."""
    low, high = ax.get_ylim()
    ratio = (high / low) ** (1 / 24)
    for name, colour, x, y in ends:
        if x < sizes[-1]:
            text = ax.text(x * 1.15, y, name, color=colour, va="center", fontsize=8)
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    ends = sorted((end for end in ends if end[2] == sizes[-1]), key=lambda end: end[3])
    places: list[float] = []
    for *_, y in ends:
        places.append(max(y, places[-1] * ratio) if places else y)
    excess = places[-1] / high if places else 1.0
    if excess > 1:
        top = high
        for i in reversed(range(len(places))):
            places[i] = min(places[i], top)
            top = places[i] / ratio
    right = sizes[-1] * 1.7
    for (name, colour, x, y), place in zip(ends, places, strict=True):
        ax.plot([x, right * 0.97], [y, place], color=colour, linewidth=0.5, alpha=0.6, clip_on=False)
        ax.text(right, place, name, color=colour, va="center", fontsize=8)
    ax.set_xlim(sizes[0] * 0.8, sizes[-1] * 1.2)
