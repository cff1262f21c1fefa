"""The look that the pictures of all domains share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
"""Of Okabe and Ito: colour-blind readers can tell them apart."""
GREY = "#6B6B6B"

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9A9A9A",
    "lines.linewidth": 1.6,
}
"""Parameters of matplotlib."""

GRID: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
}
"""Beside `STYLE`, for axes that values are read from."""


@contextmanager
def canvas(
    path: str | Path,
    size: tuple[float, float],
    style: dict[Any, Any],
    *,
    colours: int | None = None,
    **grid: Any,
) -> Iterator[tuple[Figure, Any]]:
    """A figure of this size in inches and its `[rows, columns]` of axes, saved to `path` at the end.

    Args:
        colours: see `save`.
        grid: of `Figure.subplots`, such as `nrows`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(squeeze=False, **grid)
        save(figure, path, colours=colours)


def save(figure: Figure, path: str | Path, *, colours: int | None = None) -> None:
    """As PNG.

    Args:
        colours: that are kept, for a small file; None = all.
    """
    from PIL import Image

    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=150)
        if colours is not None:
            with Image.open(part) as image:
                few = image.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
            few.save(part, format="png", optimize=True)
