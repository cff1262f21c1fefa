"""The pictures of relaxation and dynamics: how energy, forces and temperature went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.plots import BLUE, GREEN, GREY, GRID, STYLE, VERMILION, canvas

if TYPE_CHECKING:
    from domains.atoms.md import Course

_canvas = partial(canvas, style=STYLE | GRID)


def draw_relaxation(
    courses: Mapping[str, Sequence[tuple[int, float, float, float]]], fmax: float, path: str | Path
) -> None:
    """Energy above the end, and the largest force, by step; a line per structure.

    Args:
        courses: by name; rows of step, energy in eV, largest force in eV/Å, volume.
    """
    several = len(courses) > 1
    look = {"alpha": 0.5, "linewidth": 1.0} if several else {}
    with _canvas(path, (8.4, 3.0), ncols=2) as (_, axes):
        energies, forces = axes[0]
        for rows in courses.values():
            step, energy, force, _ = np.array(rows).T
            energies.plot(step, energy - energy[-1], color=BLUE, **look)
            forces.semilogy(step, force, color=VERMILION, **look)
        forces.axhline(fmax, color=GREY, linestyle="--", linewidth=1.0)
        place = forces.get_yaxis_transform()
        forces.text(0.99, fmax, f"fmax {fmax:g}", transform=place, ha="right", va="bottom", color=GREY)
        energies.set(xlabel="step", ylabel="energy above the last step (eV)")
        forces.set(xlabel="step", ylabel="largest force (eV/Å)")


def draw_dynamics(course: Course, temperature: float, path: str | Path) -> None:
    """Energies of the atoms and temperature by time; at constant pressure the volume, too."""
    rows = 3 if course.ensemble == "npt" else 2
    clock, atoms = course.column("time_ps"), course.num_atoms
    with _canvas(path, (8.4, 1.9 * rows + 0.4), nrows=rows, sharex=True) as (_, axes):
        lines = [("potential", "potential_eV", BLUE)]
        lines += [("conserved", "conserved_eV", GREEN)] if course.ensemble != "nvt" else []
        for label, column, colour in lines:
            values = course.column(column)
            axes[0, 0].plot(clock, 1000 * (values - values[0]) / atoms, color=colour, label=label)
        axes[0, 0].set(ylabel="meV/atom above the start")
        axes[0, 0].legend(frameon=False, loc="best")
        axes[1, 0].plot(clock, course.column("temperature_K"), color=VERMILION)
        axes[1, 0].set(ylabel="temperature (K)")
        if course.ensemble != "nve":
            axes[1, 0].axhline(temperature, color=GREY, linestyle="--", linewidth=1.0)
        if course.ensemble == "npt":
            axes[2, 0].plot(clock, course.column("volume_A3") / atoms, color=BLUE)
            axes[2, 0].set(ylabel="volume (Å$^3$/atom)")
        drift = course.drift()
        if drift is not None:
            axes[0, 0].set_title(f"drift {drift:+.3f} meV/atom/ps")
        axes[-1, 0].set(xlabel="time (ps)")
