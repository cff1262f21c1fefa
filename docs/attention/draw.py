"""Draws the pictures of these pages from the layers themselves.

`python docs/attention/draw.py` draws all of them into `docs/pictures/attention`; with names, these only.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Rectangle
from on_maps import PICTURES as MAPS
from on_selections import PICTURES as SELECTIONS
from on_sequences import PICTURES as SEQUENCES
from on_states import PICTURES as STATES
from weights import Panel

from zoo.plots import BLUE, GREY, STYLE, VERMILION, canvas

PICTURES = SEQUENCES | STATES | SELECTIONS | MAPS

FOLDER = Path(__file__).resolve().parents[1] / "pictures" / "attention"
UNSEEN = "#F3F3F3"
WEIGHTS = LinearSegmentedColormap.from_list(
    "weights",
    [(0, "#7A3200"), (0.25, VERMILION), (0.4999, "#FBE8DC"), (0.5, "#DCECF6"), (0.75, BLUE), (1, "#00344F")],
)
"""Blue weights are positive, vermilion ones negative; the darker, the larger."""
SIZE = 1.75  # inches, of a panel
IN_A_ROW = 5


def draw(name: str, panels: list[Panel], folder: Path = FOLDER) -> Path:
    """Saves the panels as one picture."""
    rows = -(-len(panels) // IN_A_ROW)
    columns = -(-len(panels) // rows)
    path = folder / f"{name}.png"
    size = (SIZE * columns, (SIZE + 0.15) * rows)
    with canvas(path, size, STYLE, colours=200, nrows=rows, ncols=columns) as (_, axes):
        for ax, panel in zip(axes.flat, panels, strict=False):
            _draw(ax, panel)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_axis_off()
    return path


def _draw(ax: Any, panel: Panel) -> None:
    ax.set_title(panel.title, fontsize=8)
    ax.set_facecolor(UNSEEN)
    sizes = np.nan_to_num(np.abs(panel.weights))
    largest = sizes.max(axis=1 if panel.by_row else None, keepdims=True)
    share = panel.weights / np.where(largest > 0, largest, 1.0)
    ax.imshow(np.ma.masked_invalid(share), cmap=WEIGHTS, vmin=-1, vmax=1, interpolation="nearest")
    rows, columns = share.shape
    lines = {"colors": "white", "linewidth": 0.6 if columns <= 40 else 0.15}
    ax.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, **lines)
    ax.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, **lines)
    if panel.mark:
        row, column = panel.mark
        ax.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILION, linewidth=1.6)
        )
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xlabel(panel.across, fontsize=7, color=GREY, labelpad=2)
    ax.set_ylabel(panel.down, fontsize=7, color=GREY, labelpad=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *PICTURES], help="pictures; by default all")
    for name in parser.parse_args().names or PICTURES:
        path = draw(name, PICTURES[name]())
        print(f"{path.name} {path.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    main()
