"""The look that the pictures of all domains share."""

from __future__ import annotations

from typing import Any

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
