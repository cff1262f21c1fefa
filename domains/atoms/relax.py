"""Relaxation: atoms, and cells, moved to where the forces vanish."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from rich import box
from rich.progress import Progress
from rich.table import Table
from torch import nn

from domains.atoms.evaluation import as_potential
from domains.atoms.exchange import (
    TRAJECTORY,
    TrajectoryFile,
    configurations,
    new_folder,
    progress,
    with_results,
    write_frames,
)
from domains.atoms.sources import Frame
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, ZooError, did_you_mean
from zoo.files import atomic_write

if TYPE_CHECKING:
    from ase import Atoms

    from domains.atoms.calculator import ZooCalculator

OPTIMIZERS = {
    "fire": "ase.optimize:FIRE",
    "bfgs": "ase.optimize:BFGS",
    "lbfgs": "ase.optimize:LBFGS",
}
CELLS = ("fixed", "free", "isotropic")
COLUMNS = ("frame", "step", "energy_eV", "fmax_eV_per_A", "volume_A3")


@dataclass
class Relaxation:
    """The course of one structure.

    Attributes:
        steps: `(step, energy in eV, largest force in eV/Å, volume in Å^3)`, the first before any move.
        converged: whether the largest force fell below the limit.
    """

    name: str
    atoms: Atoms
    steps: list[tuple[int, float, float, float]] = field(default_factory=list)
    converged: bool = False

    @property
    def ends(self) -> tuple[tuple[int, float, float, float], tuple[int, float, float, float]]:
        """The first and the last of `steps`."""
        return self.steps[0], self.steps[-1]


def relax(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Relax the structures of `cfg.input` one after the other, into the folder `cfg.output`.

    Args:
        model: a `Potential`.
        facts: stored with its weights.
        cfg: as `configs/relax.yaml`.

    Raises:
        ConfigError: a setting that cannot be, a cell to relax of a structure without one or by a model
            without stress.
        DataError: structures that cannot be read, or that the model cannot take.
        ZooError: a structure was not relaxed in `cfg.steps`; what was reached has been written.
    """
    from domains.atoms.calculator import ZooCalculator

    _check(cfg)
    frames = configurations(cfg.input, cfg.index, "relax")
    potential = as_potential(model, facts, cfg.orientations)
    calculator = ZooCalculator(potential, device=cfg.device, dtype=cfg.dtype, skin=cfg.skin)
    if cfg.cell != "fixed":
        for frame in frames:
            _check_cell(frame, calculator, isotropic=cfg.cell == "isotropic")
    if calculator.potential.forces == "direct":
        console.print("The forces of this model are no slopes of its energy: the energy may rise on the way.")
    folder = new_folder(cfg.output)
    done: list[Relaxation] = []
    with TrajectoryFile(folder / TRAJECTORY) as trajectory, progress() as bar:
        for frame in frames:
            done.append(_relaxed(frame, calculator, cfg, trajectory, bar))
    return _report(done, cfg, folder)


def relax_structure(
    atoms: Atoms,
    *,
    optimizer: str = "fire",
    fmax: float = 0.05,
    steps: int = 500,
    cell: str = "fixed",
    pressure: float = 0.0,
    observe: Callable[[], None] | None = None,
) -> bool:
    """Relax `atoms`, which have a calculator, in place.

    Args:
        optimizer: fire, bfgs or lbfgs.
        fmax: eV/Å, of the largest force; of a cell that moves also the stress times volume by atom.
        cell: fixed; free: along periodic axes; isotropic: the volume alone.
        pressure: GPa, on a cell that moves.
        observe: called before the first and after each step.

    Returns:
        Whether the limit was reached.
    """
    from ase import units
    from ase.filters import FrechetCellFilter

    from zoo.registry import load_object

    moved: Any = atoms
    if cell != "fixed":
        x, y, z = (bool(axis) for axis in atoms.pbc)
        mask = [x, y, z, y and z, x and z, x and y]
        moved = FrechetCellFilter(
            atoms,
            mask=None if cell == "isotropic" else mask,
            hydrostatic_strain=cell == "isotropic",
            scalar_pressure=pressure * units.GPa,
        )
    dynamics = load_object(OPTIMIZERS[optimizer])(moved, logfile=None)
    if observe:
        dynamics.attach(observe)
    return bool(dynamics.run(fmax=fmax, steps=steps))


def _relaxed(
    frame: Frame, calculator: ZooCalculator, cfg: DictConfig, trajectory: TrajectoryFile, bar: Progress
) -> Relaxation:
    atoms = frame.atoms.copy()
    atoms.calc = calculator
    course = Relaxation(frame.origin, atoms)
    task = bar.add_task(atoms.get_chemical_formula(), total=cfg.steps)

    def observe() -> None:
        energy, fmax = atoms.get_potential_energy(), _largest(atoms.get_forces())
        volume = abs(float(np.linalg.det(atoms.cell.array)))
        step = len(course.steps)
        course.steps.append((step, energy, fmax, volume))
        trajectory.write(atoms)
        text = f"{atoms.get_chemical_formula()}  {energy:.4f} eV  fmax {fmax:.3f} eV/Å"
        bar.update(task, completed=step, description=text)

    options = {key: cfg[key] for key in ("optimizer", "fmax", "steps", "cell", "pressure")}
    try:
        course.converged = relax_structure(atoms, **options, observe=observe)
    except DataError as error:
        raise DataError(
            f"{frame.origin}, step {len(course.steps)} of the relaxation: {error} What came before is in "
            f"{trajectory.path}."
        ) from None
    course.atoms = with_results(atoms, calculator.results)
    bar.remove_task(task)
    return course


def _largest(forces: np.ndarray) -> float:
    return float(np.linalg.norm(forces, axis=1).max())


# ---- results -----------------------------------------------------------------------------------------------


def _report(done: Sequence[Relaxation], cfg: DictConfig, folder: Path) -> list[Path]:
    """Write and say what became of the structures; a ZooError where one was not relaxed."""
    from domains.atoms.course_plots import draw_relaxation

    for course in done:
        course.atoms.info |= {"converged": course.converged, "relaxation_steps": len(course.steps) - 1}
    with atomic_write(folder / "log.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        table.writerows((i, *row) for i, course in enumerate(done) for row in course.steps)
    written = [
        write_frames(folder / "relaxed.extxyz", [course.atoms for course in done]),
        folder / TRAJECTORY,
        folder / "log.csv",
        folder / "relaxation.png",
    ]
    draw_relaxation({course.name: course.steps for course in done}, cfg.fmax, written[-1])
    console.print(_table(done))
    left = [course for course in done if not course.converged]
    if left:
        raise ZooError(
            f"{len(left)} of {len(done)} structures did not come below fmax={cfg.fmax} eV/Å in "
            f"{cfg.steps} steps, the first of them {left[0].name} ({left[0].steps[-1][2]:.3f} eV/Å). How far "
            f"they came is in {written[0]}: go on with it as input and another output, or raise steps."
        )
    return written


def _table(done: Sequence[Relaxation]) -> Table:
    table = Table(
        "structure", title="Relaxed", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for heading in ("atoms", "steps", "eV\nbefore", "\nafter", "largest force\neV/Å after", "volume"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for course in done:
        (_, energy, _, volume), (steps, last_energy, force, last_volume) = course.ends
        table.add_row(
            course.atoms.get_chemical_formula(),
            str(len(course.atoms)),
            str(steps),
            *(f"{value:.4f}" for value in (energy, last_energy, force)),
            f"{100 * (last_volume / volume - 1):+.2f}%" if volume > 0 else "",
            "" if course.converged else "stopped early",
        )
    return table


# ---- settings ----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig) -> None:
    for key, options in (("optimizer", OPTIMIZERS), ("cell", CELLS)):
        if cfg[key] not in options:
            hint = did_you_mean(str(cfg[key]), options)
            raise ConfigError(f"{key}={cfg[key]} is not one of {', '.join(options)}.{hint}")
    if cfg.fmax <= 0 or cfg.steps < 1:
        raise ConfigError(f"fmax={cfg.fmax} must be above 0 eV/Å, and steps={cfg.steps} at least 1.")
    if cfg.pressure and cfg.cell == "fixed":
        raise ConfigError(f"pressure={cfg.pressure} acts on a cell that moves: set cell=free or isotropic.")


def _check_cell(frame: Frame, calculator: ZooCalculator, *, isotropic: bool) -> None:
    if not frame.atoms.pbc.any():
        raise ConfigError(
            f"{frame.origin} is periodic along no axis: it has no cell to relax. Set cell=fixed."
        )
    if isotropic and not frame.atoms.pbc.all():
        raise ConfigError(f"{frame.origin} is not periodic along all axes: set cell=free or fixed.")
    calculator.require("stress")
