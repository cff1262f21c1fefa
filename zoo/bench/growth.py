"""Cost over tokens, in words and as lines: what the comparisons of attention share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zoo import plots
from zoo.bench.report import MIB, Curve, Point

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
KNOWN = "multihead"
"""The layer that names a group which it is in."""
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Line:
    """A curve with the group that gives its colour."""

    name: str
    sees: str
    curve: Curve


def late_slopes(curve: Curve | None) -> tuple[float, float] | None:
    """Exponents of time and memory over the last two sizes, where nothing constant hides them."""
    if curve is None or len(curve.points) < 2:
        return None
    return Curve(curve.name, curve.points[-2:]).slopes()


def in_words(point: Point) -> tuple[str, str]:
    """Time and memory."""
    time = f"{point.seconds:.2f} s" if point.seconds >= 0.1 else f"{point.seconds * 1e3:.1f} ms"
    return time, f"{point.bytes / MIB:,.{0 if point.bytes > 10 * MIB else 1}f} MiB"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> str:
    """A table, its first `left` columns aligned to the left, the others to the right."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *rows))


def legend(figure: Any, shown: Iterable[str]) -> None:
    """The colours of the groups that are shown, below a figure."""
    from matplotlib.lines import Line2D

    shown = set(shown)
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=MEANING[sees])
        for sees, colour in COLOURS.items()
        if sees in shown
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, title="A token sees")


def draw_growth(ax: Axes, lines: Sequence[Line], of: str, unit: float, title: str, *, square: bool) -> None:
    """`seconds` or `bytes` of curves over tokens, both axes logarithmic, each line named at its end.

    Args:
        square: the tokens fill a square map, whose sides stand at the axis, too.
    """
    drawn: dict[str, int] = {}
    ends = []
    for line in lines:
        nth = drawn[line.sees] = drawn.get(line.sees, -1) + 1
        x = [point.size for point in line.curve.points]
        y = [getattr(point, of) / unit for point in line.curve.points]
        colour = COLOURS[line.sees]
        ax.plot(x, y, LINES[nth % len(LINES)], color=colour, linewidth=1.6, marker=".", markersize=5)
        ends.append((line.name, colour, x[-1], y[-1]))
    ax.set_xscale("log", base=4)
    ax.set_yscale("log")
    sizes = sorted({point.size for line in lines for point in line.curve.points})
    sides = [f"\n{round(n**0.5)} x {round(n**0.5)}" if square else "" for n in sizes]
    ax.set_xticks(sizes, [f"{n:,}{side}" for n, side in zip(sizes, sides, strict=True)])
    ax.set_xlabel("tokens, and the map" if square else "tokens")
    ax.set_title(title)
    for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        axis(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
    _label(ax, ends, sizes)


def _label(ax: Axes, ends: list[tuple[str, str, float, float]], sizes: list[int]) -> None:
    """Names at the right of the lines, apart from each other, with a hair to where the line ends; beside it,
    those that end near each other as one, where that is earlier. Where the names would fill the right side,
    those are one there, too."""
    low, high = ax.get_ylim()
    lines = max(24, 6 * ax.bbox.height / ax.figure.dpi)  # that stand above each other
    ratio = (high / low) ** (1 / lines)
    for name, colour, x, y in _joined([end for end in ends if end[2] < sizes[-1]], ratio):
        text = ax.text(x * 1.15, y, name, color=colour, va="center", fontsize=8)
        text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    last = sorted((end for end in ends if end[2] == sizes[-1]), key=lambda end: end[3])
    if len(last) > lines:
        last = _joined(last, ratio)
    right = sizes[-1] * 1.7
    for (name, colour, x, y), place in zip(last, _apart([end[3] for end in last], high, ratio), strict=True):
        ax.plot([x, right * 0.97], [y, place], color=colour, linewidth=0.5, alpha=0.6, clip_on=False)
        ax.text(right, place, name, color=colour, va="center", fontsize=8)
    ax.set_xlim(sizes[0] * 0.8, sizes[-1] * 1.2)


def _apart(values: Sequence[float], high: float, ratio: float) -> list[float]:
    """Rising values moved so that each is `ratio` times the one before, and none above `high`."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] * ratio) if places else value)
    top = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] / ratio
    return places


def _joined(ends: list[tuple[str, str, float, float]], ratio: float) -> list[tuple[str, str, float, float]]:
    """Ends at the same size whose labels would overlap, as one: `multihead and 3 others`."""
    groups: list[list[tuple[str, str, float, float]]] = []
    for end in sorted(ends, key=lambda end: (end[2], end[3])):
        if groups and groups[-1][0][2] == end[2] and end[3] < groups[-1][0][3] * ratio:
            groups[-1].append(end)
        else:
            groups.append([end])
    found = []
    for group in groups:
        colours = [end[1] for end in group]
        most = [end for end in group if end[1] == max(colours, key=colours.count)]
        name, colour, x, y = next((end for end in group if end[0] == KNOWN), most[len(most) // 2])
        others = [other for other, *_ in group if other != name]
        several = f"{name} and {len(others)} others" if len(others) > 1 else " and ".join([name, *others])
        found.append((several, colour, x, y))
    return found
