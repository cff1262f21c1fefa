"""What the terminal shows of a tested potential."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table

FIELDS: tuple[tuple[str, str, float, int], ...] = (
    ("energy_per_atom_mae", "E MAE\nmeV/atom", 1e3, 2),
    ("force_mae", "F MAE\nmeV/Å", 1e3, 1),
    ("force_rmse", "F RMSE\nmeV/Å", 1e3, 1),
    ("force_cosine", "cosine\nof F", 1, 3),
    ("stress_mae", "S MAE\nmeV/Å³", 1e3, 2),
    ("stress_mae_gpa", "S MAE\nGPa", 1, 3),
    ("efwt", "EFwT\n%", 100, 1),
)
"""Key, heading, factor, digits: of energies E, forces F, stress S. `results.json` holds more."""


def tables(results: Mapping[str, Any]) -> Sequence[RenderableType]:
    """The errors, and a verdict in words."""
    return [error_table(results), *_verdict(results)]


def error_table(results: Mapping[str, Any], title: str = "Test errors") -> Table:
    """A row per `config_type`, then all together, then what costs nothing.

    Args:
        results: `groups` by name, `mean` and `baseline`, each as `metrics.summary` makes them.
    """
    rows = [results["mean"], results["baseline"], *results["groups"].values()]
    shown = [field for field in FIELDS if any(row.get(field[0]) is not None for row in rows)]
    table = Table(title=f"{title}; F per component of free atoms", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("config_type", overflow="fold")
    table.add_column("frames", justify="right", no_wrap=True)
    for _, heading, _, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    if len(results["groups"]) > 1:
        for name, row in results["groups"].items():
            table.add_row(name or "-", f"{row['frames']:.0f}", *_cells(row, shown))
        table.add_section()
    table.add_row("all", f"{results['mean']['frames']:.0f}", *_cells(results["mean"], shown), style="bold")
    table.add_row("baseline", "", *_cells(results["baseline"], shown))
    return table


def _cells(row: Mapping[str, float | None], shown: Sequence[tuple[str, str, float, int]]) -> list[str]:
    return [
        "" if (value := row.get(key)) is None else f"{value * factor:.{digits}f}"
        for key, _, factor, digits in shown
    ]


def _verdict(results: Mapping[str, Any]) -> list[str]:
    own, other, lines = results["mean"], results["baseline"], []
    words = (
        ("force_mae", "Forces: MAE {0:.1f} meV/Å, {2} of that of no forces ({1:.1f})."),
        (
            "energy_per_atom_mae",
            "Energy: MAE {0:.2f} meV/atom, {2} of that of mean energies by element ({1:.2f}).",
        ),
    )
    for key, text in words:
        if own.get(key) is not None and other.get(key):
            share = own[key] / other[key]
            lines.append(text.format(1e3 * own[key], 1e3 * other[key], f"{share:.1%}"))
    turned = results["rotation"]
    if results["forces"] is not None and turned["force"] > 0:
        lines.append(
            f"Turned at random, forces differ by {turned['force_relative']:.1e} of their size and energies "
            f"by {1e3 * turned['energy_per_atom']:.2g} meV/atom: "
            + ("equivariant." if turned["force_relative"] < 1e-3 else "not equivariant, see data.rotate.")
        )
    return lines
