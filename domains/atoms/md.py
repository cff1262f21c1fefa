"""Molecular dynamics, at constant energy, temperature or pressure."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from omegaconf import DictConfig
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
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

ENSEMBLES = {"nve": "constant energy", "nvt": "Langevin", "npt": "constant pressure, isotropic"}
HOTTEST = 1e5
"""K: no trajectory that got this hot was about atoms any more."""
THERMOSTAT, BAROSTAT = 100.0, 1000.0
"""Times, in steps, in which constant pressure lets temperature and volume swing back (as ASE advises)."""


@dataclass(frozen=True)
class Moment:
    """A line of the log: step, ps, eV, K, Å^3; `conserved` is the energy that exact motion would keep."""

    step: int
    time_ps: float
    potential_eV: float
    kinetic_eV: float
    total_eV: float
    temperature_K: float
    volume_A3: float
    conserved_eV: float


COLUMNS = [entry.name for entry in fields(Moment)]


@dataclass
class Course:
    """What a trajectory went through, every so many steps."""

    num_atoms: int
    ensemble: str
    moments: list[Moment] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray:
        """`(moments,)` of one column of the log."""
        return np.array([getattr(moment, name) for moment in self.moments])

    def drift(self) -> float | None:
        """Slope of the conserved energy in meV/atom/ps; None where the thermostat draws at random."""
        if self.ensemble == "nvt" or len(self.moments) < 2:
            return None
        return (
            1000
            * float(np.polyfit(self.column("time_ps"), self.column("conserved_eV"), 1)[0])
            / self.num_atoms
        )


def md(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Molecular dynamics of the structure of `cfg.input`, into the folder `cfg.output`.

    Args:
        model: a `Potential`.
        facts: stored with its weights.
        cfg: as `configs/md.yaml`.

    Raises:
        ConfigError: a setting that cannot be, or that the model or the structure does not allow.
        DataError: a structure that cannot be read or taken; a trajectory that flew apart.
    """
    from domains.atoms.calculator import ZooCalculator

    _check(cfg)
    (frame, *others) = configurations(cfg.input, cfg.index, "md")
    if others:
        raise ConfigError(f"zoo md starts from one frame: index={cfg.index} chooses {len(others) + 1}.")
    atoms = frame.atoms
    potential = as_potential(model, facts, cfg.orientations)
    atoms.calc = ZooCalculator(potential, device=cfg.device, dtype=cfg.dtype, skin=cfg.skin)
    _check_pressure(atoms, cfg)
    rng = np.random.default_rng(cfg.seed)
    if cfg.velocities == "draw":
        draw_velocities(atoms, cfg.temperature, rng)
    elif not atoms.has("momenta"):
        raise ConfigError(f"velocities=keep, but {frame.origin} has none: set velocities=draw.")
    if potential.forces == "direct":
        console.print("The forces of this model are no slopes of its energy: they do not conserve it.")
    folder = new_folder(cfg.output)
    started = time.perf_counter()
    course = run(atoms, cfg, rng, folder)
    seconds = time.perf_counter() - started
    return _report(course, atoms, cfg, folder, seconds)


def draw_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Momenta by Maxwell and Boltzmann, scaled to be exactly of this temperature (K).

    Without fixed atoms the centre of mass rests.
    """
    from ase import units

    masses = atoms.get_masses()[:, None]
    momenta = rng.standard_normal((len(atoms), 3)) * np.sqrt(masses * units.kB * temperature)
    if not atoms.constraints and len(atoms) > 1:
        momenta -= masses * momenta.sum(0) / masses.sum()
    atoms.set_momenta(momenta)
    found = atoms.get_temperature()
    if found > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(temperature / found))


def dynamics(atoms: Atoms, cfg: Mapping[str, Any], rng: np.random.Generator) -> Any:
    """ASE's integrator of `cfg.ensemble`."""
    from ase import units
    from ase.md.langevin import Langevin
    from ase.md.nose_hoover_chain import IsotropicMTKNPT
    from ase.md.verlet import VelocityVerlet

    step = cfg["timestep"] * units.fs
    if cfg["ensemble"] == "nve":
        return VelocityVerlet(atoms, step)
    if cfg["ensemble"] == "nvt":
        friction = cfg["friction"] / units.fs
        return Langevin(
            atoms, step, temperature_K=cfg["temperature"], friction=friction, fixcm=False, rng=rng
        )
    return IsotropicMTKNPT(
        atoms,
        step,
        temperature_K=cfg["temperature"],
        pressure_au=cfg["pressure"] * units.GPa,
        tdamp=THERMOSTAT * step,
        pdamp=BAROSTAT * step,
    )


def run(atoms: Atoms, cfg: Mapping[str, Any], rng: np.random.Generator, folder: Path) -> Course:
    """Integrate `cfg.steps` steps, writing trajectory and log to `folder` on the way.

    Raises:
        DataError: the trajectory flew apart; names the step.
    """
    course = Course(len(atoms), cfg["ensemble"])
    motion = dynamics(atoms, cfg, rng)
    with (
        TrajectoryFile(folder / TRAJECTORY) as trajectory,
        open(folder / "log.csv", "w", newline="", encoding="utf-8") as log,
        progress() as bar,
    ):
        csv.writer(log).writerow(COLUMNS)
        task = bar.add_task("Starting", total=cfg["steps"])

        def observe() -> None:
            now = moment(atoms, motion, cfg["timestep"])
            if not now.temperature_K < HOTTEST:
                raise DataError(f"the temperature is {now.temperature_K:.3g} K.")
            course.moments.append(now)
            _log(log, now)
            trajectory.write(atoms)
            text = f"{now.time_ps:.2f} ps  {now.temperature_K:.0f} K  {now.potential_eV:.3f} eV"
            bar.update(task, completed=now.step, description=text)

        motion.attach(observe, interval=cfg["every"])
        try:
            motion.run(cfg["steps"])
        except DataError as error:
            raise DataError(
                f"Step {motion.nsteps} of the dynamics: {error} The trajectory flew apart: take a shorter "
                f"timestep, or a model that was trained on such structures. What came before is in {folder}."
            ) from None
    return course


def moment(atoms: Atoms, motion: Any, timestep: float) -> Moment:
    """Where a motion of ASE with steps of `timestep` fs has come to."""
    potential, kinetic = atoms.get_potential_energy(), float(atoms.get_kinetic_energy())
    total = potential + kinetic
    return Moment(
        step=motion.nsteps,
        time_ps=motion.nsteps * timestep / 1000,
        potential_eV=potential,
        kinetic_eV=kinetic,
        total_eV=total,
        temperature_K=float(atoms.get_temperature()),
        volume_A3=abs(float(np.linalg.det(atoms.cell.array))),
        conserved_eV=motion.get_conserved_energy() if hasattr(motion, "get_conserved_energy") else total,
    )


def _log(file: IO[str], moment: Moment) -> None:
    csv.writer(file).writerow(
        f"{value:.8g}" if isinstance(value, float) else value for value in astuple(moment)
    )
    file.flush()


# ---- results -----------------------------------------------------------------------------------------------


def _report(course: Course, atoms: Atoms, cfg: DictConfig, folder: Path, seconds: float) -> list[Path]:
    from domains.atoms.course_plots import draw_dynamics

    assert atoms.calc is not None
    written = [
        write_frames(folder / "final.extxyz", [with_results(atoms, atoms.calc.results)]),
        folder / TRAJECTORY,
        folder / "log.csv",
        folder / "md.png",
    ]
    draw_dynamics(course, cfg.temperature, written[-1])
    console.print(_table(course, cfg, seconds))
    return written


def _table(course: Course, cfg: DictConfig, seconds: float) -> Table:
    """Means over the second half, when the start is forgotten, and the drift over the whole."""
    later = slice(len(course.moments) // 2, None)
    temperature = course.column("temperature_K")[later]
    picoseconds = course.moments[-1].time_ps
    rows = {
        "ensemble": f"{cfg.ensemble}, {ENSEMBLES[cfg.ensemble]}",
        "time": f"{picoseconds:.3f} ps, {cfg.steps} steps of {cfg.timestep} fs, {course.num_atoms} atoms",
        "temperature": f"{temperature.mean():.0f} ± {temperature.std():.0f} K (second half)",
    }
    if cfg.ensemble == "npt":
        volume = course.column("volume_A3")[later] / course.num_atoms
        rows["volume"] = f"{volume.mean():.3f} ± {volume.std():.3f} Å^3/atom (second half)"
    drift = course.drift()
    if drift is not None:
        rows["energy drift"] = f"{drift:+.3f} meV/atom/ps"
    rows["speed"] = f"{cfg.steps / seconds:.1f} steps/s, {86.4 * picoseconds / seconds:.3g} ns/day"
    table = Table(show_header=False, box=None)
    for row in rows.items():
        table.add_row(*row)
    return table


# ---- settings ----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig) -> None:
    for key, options in (("ensemble", ENSEMBLES), ("velocities", ("draw", "keep"))):
        if cfg[key] not in options:
            hint = did_you_mean(str(cfg[key]), options)
            raise ConfigError(f"{key}={cfg[key]} is not one of {', '.join(options)}.{hint}")
    for key in ("timestep", "friction"):
        if cfg[key] <= 0:
            raise ConfigError(f"{key}={cfg[key]} must be above 0.")
    for key in ("steps", "every"):
        if cfg[key] < 1:
            raise ConfigError(f"{key}={cfg[key]} must be at least 1.")
    if cfg.temperature < 0 or (cfg.temperature == 0 and cfg.ensemble == "npt"):
        raise ConfigError(f"temperature={cfg.temperature} K is too low.")
    if cfg.pressure and cfg.ensemble != "npt":
        raise ConfigError(f"pressure={cfg.pressure} needs ensemble=npt.")


def _check_pressure(atoms: Atoms, cfg: DictConfig) -> None:
    """Constant pressure needs a stress, a cell, and atoms that all may move."""
    if cfg.ensemble != "npt":
        return
    cast(Any, atoms.calc).require("stress")
    if not atoms.pbc.all():
        raise ConfigError("ensemble=npt needs a structure that is periodic along all three axes.")
    if atoms.constraints:
        raise ConfigError("ensemble=npt cannot hold atoms fixed: take ensemble=nvt, or free them.")
