"""Pictures of attention over the image that a model saw, each written as a PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from zoo.attention.routed import Routed
from zoo.explain import Places
from zoo.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEAT, RANKS, GATES = "inferno", "viridis_r", "cividis"
QUERY = "#00E5FF"
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
}
PANEL = 2.3
"""Width of a panel in inches."""

Point = tuple[float, float]


class Panel(NamedTuple):
    """A map `(rows, columns)` over the image, and where its cells lie; `point` is marked."""

    title: str
    values: Tensor
    places: Places
    point: Point | None = None


def overlays(image: np.ndarray, panels: Sequence[Panel], path: Path, *, title: str, label: str) -> None:
    """The image, and for each layer a map over it.

    Args:
        image: `(H, W, 3)` from 0 to 1.
        label: of the colour bar; every panel is scaled to its own largest value.
    """
    with _figure(len(panels) + 1, path, title, image) as (figure, axes):
        _show(axes[0], image, "what the model sees")
        for point in {panel.point for panel in panels if panel.point is not None}:
            _mark(axes[0], image, point)
        shown = None
        for ax, (name, values, places, point) in zip(axes[1:], panels, strict=False):
            _show(ax, _faded(image), name)
            scaled = np.ma.masked_less_equal(values.float().cpu().numpy(), 0)
            shown = ax.imshow(
                scaled / max(float(scaled.max()) if scaled.count() else 0.0, 1e-12),
                cmap=HEAT,
                vmin=0,
                vmax=1,
                alpha=0.7,
                extent=_extent(image, places),
            )
            _fit(ax, image)
            if point is not None:
                _mark(ax, image, point)
        if shown is not None:
            figure.colorbar(shown, ax=axes, shrink=0.7, label=label)


def routes(
    image: np.ndarray,
    layers: Sequence[tuple[str, Routed, Places]],
    points: Sequence[Point],
    path: Path,
    *,
    title: str,
) -> None:
    """Which regions some regions see: one row for each layer, one column for each query region."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with _figure(len(layers) * len(points), path, title, image, columns=len(points)) as (figure, axes):
        for row, (name, routed, places) in enumerate(layers):
            count = routed.rows * routed.columns
            chosen = routed.index.shape[2]
            for column, point in enumerate(points):
                ax = axes[row * len(points) + column]
                _show(ax, _faded(image), f"{name}: {chosen} of {count} regions" if column == 0 else "")
                _regions(ax, image, routed, places, point)
        norm = ScalarMappable(Normalize(0, 1), RANKS)
        bar = figure.colorbar(norm, ax=axes, shrink=0.7, label="rank of the region among those chosen")
        bar.set_ticks([0, 1], labels=["last", "best"])
        figure.text(
            0.01,
            0.005,
            "Outlined: the region whose tokens ask. Coloured: the regions that they see.",
            fontsize=8,
        )


def gates(image: np.ndarray, maps: Mapping[str, Tensor], path: Path, *, title: str) -> None:
    """Maps of gates over the image, all on one scale of colours."""
    with _figure(len(maps) + 1, path, title, image) as (figure, axes):
        _show(axes[0], image, "what the model sees")
        values = {name: value.float().cpu().numpy() for name, value in maps.items()}
        low, high = (float(f([f(v) for v in values.values()])) for f in (np.min, np.max))
        height, width = image.shape[:2]
        shown = None
        for ax, (name, value) in zip(axes[1:], values.items(), strict=False):
            _show(ax, _faded(image), name)
            extent = (0, width, height, 0)
            shown = ax.imshow(value, cmap=GATES, vmin=low, vmax=high, alpha=0.75, extent=extent)
        if shown is not None:
            figure.colorbar(shown, ax=axes, shrink=0.7, label="gate (1 = open), mean of the channels")


def _regions(ax: Axes, image: np.ndarray, routed: Routed, places: Places, point: Point) -> None:
    """Fills the regions that the one at `point` sees, and draws the grid."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    tall, wide = (
        side * size / real for side, size, real in zip(image.shape[:2], routed.size, places.real, strict=True)
    )
    row, column = (
        min(int(share * side / step), last - 1)
        for share, side, step, last in zip(
            point, image.shape[:2], (tall, wide), (routed.rows, routed.columns), strict=True
        )
    )
    chosen = routed.index[0, row * routed.columns + column].tolist()
    for rank, region in enumerate(chosen):
        y, x = region // routed.columns * tall, region % routed.columns * wide
        colour = colormaps[RANKS](1 - rank / max(1, len(chosen) - 1))
        ax.add_patch(Rectangle((x, y), wide, tall, facecolor=colour, alpha=0.6, edgecolor="none"))
    for y in range(1, routed.rows):
        ax.axhline(y * tall, color="white", linewidth=0.4, alpha=0.6)
    for x in range(1, routed.columns):
        ax.axvline(x * wide, color="white", linewidth=0.4, alpha=0.6)
    outline = {"fill": False, "edgecolor": QUERY, "linewidth": 2.0}
    ax.add_patch(Rectangle((column * wide, row * tall), wide, tall, **outline))
    _fit(ax, image)


@contextmanager
def _figure(
    count: int, path: Path, title: str, image: np.ndarray, *, columns: int | None = None
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A grid of so many panels in the proportions of the image, written to `path`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = columns or min(count, 5)
    rows = ceil(count / columns)
    height = PANEL * image.shape[0] / image.shape[1] + 0.3
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL * columns + 1.2, height * rows + 0.7), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax in axes:
            ax.set_axis_off()
        figure.suptitle("\n".join(textwrap.wrap(title, 24 * columns)), x=0.01, ha="left")
        yield figure, axes
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _show(ax: Axes, image: np.ndarray, title: str) -> None:
    height, width = image.shape[:2]
    ax.imshow(image, extent=(0, width, height, 0))
    ax.set_title(title)


def _fit(ax: Axes, image: np.ndarray) -> None:
    """What lies in the padding is cut off."""
    ax.set_xlim(0, image.shape[1])
    ax.set_ylim(image.shape[0], 0)


def _mark(ax: Axes, image: np.ndarray, point: Point) -> None:
    y, x = point[0] * image.shape[0], point[1] * image.shape[1]
    ax.plot(x, y, "+", color="white", markersize=11, markeredgewidth=3.2)
    ax.plot(x, y, "+", color=QUERY, markersize=10, markeredgewidth=1.6)


def _faded(image: np.ndarray) -> np.ndarray:
    """Grey and darker, so that colours on top are read as they are."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    return 0.15 + 0.7 * grey


def _extent(image: np.ndarray, places: Places) -> tuple[float, float, float, float]:
    """Where the corners of a grid lie on the image; padding reaches beyond it."""
    height, width = image.shape[:2]
    return 0, width * places.grid[1] / places.real[1], height * places.grid[0] / places.real[0], 0
