"""`zoo relax` and `zoo md`, with a potential whose minima and dynamics are known."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.constraints import FixAtoms
from ase.io import read, write
from pair_potential import PairPotential, registered

import zoo as library
from domains.atoms import ZooCalculator
from domains.atoms.md import Course, Moment, draw_velocities
from domains.atoms.relax import relax_structure
from zoo.errors import ConfigError, DataError, ZooError
from zoo.weights.checkpoint import save_model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Holds `model.safetensors` and `direct.safetensors`; a model that can be loaded only in here."""
    monkeypatch.chdir(tmp_path)
    with registered() as name:
        save_model(library.create_model(name), "model.safetensors", extra={"E0s": "given"})
        direct = library.create_model(name, forces="direct", stress=False)
        save_model(direct, "direct.safetensors", extra={"E0s": "given"})
        yield tmp_path


def zoo(verb: str, *arguments: object, checkpoint: str = "model.safetensors") -> str:
    """What the command prints; a ZooError is raised as it is."""
    return command_line.zoo(verb, f"checkpoint={checkpoint}", *arguments, "device=cpu")


def crystal(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.08, seed=seed)
    return atoms


def frames(path: str) -> list[Any]:
    found = read(path, ":")
    assert isinstance(found, list)
    return found


def log(path: str) -> dict[str, np.ndarray]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


# ---- relaxation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["fire", "bfgs", "lbfgs"])
def test_two_atoms_relax_to_where_the_potential_is_lowest(optimizer: str) -> None:
    atoms = Atoms("Cu2", positions=[(0, 0, 0), (2.3, 0, 0)])
    atoms.calc = ZooCalculator(PairPotential(cutoff=500.0), dtype="float64")
    assert relax_structure(atoms, optimizer=optimizer, fmax=1e-4)
    assert atoms.get_distance(0, 1) == pytest.approx(2.6, abs=1e-3)


def test_a_free_cell_ends_without_stress_and_at_the_pressure_asked_for() -> None:
    atoms = crystal()
    atoms.calc = ZooCalculator(PairPotential(), dtype="float64")
    assert relax_structure(atoms, optimizer="bfgs", cell="free", fmax=1e-4)
    assert np.abs(atoms.get_stress()).max() < 1e-5
    relaxed = atoms.get_volume()
    assert relax_structure(atoms, optimizer="bfgs", cell="isotropic", fmax=1e-4, pressure=5.0)
    assert atoms.get_stress()[:3].mean() == pytest.approx(-5.0 * units.GPa, abs=1e-5)
    assert atoms.get_volume() < relaxed


def test_the_cell_of_a_slab_moves_only_along_its_periodic_axes() -> None:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8)
    before = atoms.cell.array.copy()
    atoms.calc = ZooCalculator(PairPotential(), dtype="float64")
    relax_structure(atoms, cell="free", steps=15)
    np.testing.assert_allclose(atoms.cell.array[2], before[2], atol=1e-9)
    assert np.abs(atoms.cell.array[:2] - before[:2]).max() > 1e-3


def test_the_command_writes_structures_trajectory_log_and_picture(folder: Path) -> None:
    write("in.extxyz", [crystal(0), Atoms("Cu2", positions=[(0, 0, 0), (2.4, 0, 0)])])
    out = zoo("relax", "domain=atoms", "input=in.extxyz", "fmax=0.03", "output=out")
    for name in ("relaxed.extxyz", "trajectory.extxyz", "log.csv", "relaxation.png"):
        assert f"out/{name}" in out
        assert (folder / "out" / name).stat().st_size
    relaxed = frames("out/relaxed.extxyz")
    assert [len(atoms) for atoms in relaxed] == [4, 2]
    assert all(atoms.info["converged"] for atoms in relaxed)
    for atoms in relaxed:
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.03
    table = log("out/log.csv")
    for i, atoms in enumerate(relaxed):
        energies = table["energy_eV"][table["frame"] == i]
        assert energies[-1] < energies[0]
        assert energies[-1] == pytest.approx(atoms.get_potential_energy())
    assert len(frames("out/trajectory.extxyz")) == len(table["step"])


def test_fixed_atoms_of_the_file_are_held() -> None:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=8)
    atoms.rattle(0.1, seed=0)
    atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
    write("slab.extxyz", atoms)
    zoo("relax", "input=slab.extxyz", "output=out")
    (found,) = frames("out/relaxed.extxyz")
    np.testing.assert_allclose(found.positions[:4], atoms.positions[:4], atol=1e-7)
    assert np.abs(found.positions[4:] - atoms.positions[4:]).max() > 1e-3


def test_what_is_not_relaxed_is_said_and_kept() -> None:
    write("in.extxyz", crystal())
    with pytest.raises(ZooError, match=r"1 of 1 structures did not come below fmax=0.0001 .* in 3 steps"):
        zoo("relax", "input=in.extxyz", "fmax=1e-4", "steps=3", "output=out")
    (found,) = frames("out/relaxed.extxyz")
    assert not found.info["converged"]
    assert found.info["relaxation_steps"] == 3


def test_direct_forces_are_announced() -> None:
    write("in.extxyz", molecule("H2O"))
    for verb, options in (("relax", ["fmax=1000"]), ("md", ["steps=1", "every=1"])):
        assert "no slopes of its energy" in zoo(
            verb, "input=in.extxyz", *options, checkpoint="direct.safetensors"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["optimizer=firre"], "Did you mean 'fire'"),
        (["cell=frei"], "Did you mean 'free'"),
        (["fmax=0"], "must be above 0"),
        (["pressure=2"], "set cell=free or isotropic"),
        (["cell=free"], "periodic along no axis"),
        (["index=7"], "none of them in index=7"),
        (["index=a"], "index=a is no frame"),
        (["input=absent.xyz"], "There is no file absent.xyz"),
        (["input=null"], "zoo relax needs structures: input=FILE"),
    ],
)
def test_settings_of_a_relaxation_that_cannot_be(options: list[str], message: str) -> None:
    write("in.extxyz", molecule("H2O"))
    with pytest.raises(ZooError, match=message):
        zoo("relax", "input=in.extxyz", *options)


def test_a_cell_needs_a_model_with_stress() -> None:
    write("in.extxyz", crystal())
    with pytest.raises(ConfigError, match="predicts no stress, only energy, forces"):
        zoo("relax", "input=in.extxyz", "cell=free", checkpoint="direct.safetensors")


def test_a_trajectory_is_not_written_over() -> None:
    write("in.extxyz", molecule("H2O"))
    zoo("relax", "input=in.extxyz")
    with pytest.raises(ConfigError, match=r"trajectory.extxyz in relaxed already"):
        zoo("relax", "input=in.extxyz")


# ---- dynamics ----------------------------------------------------------------------------------------------


def test_constant_energy_conserves_it() -> None:
    write("in.extxyz", crystal())
    out = zoo("md", "input=in.extxyz", "steps=120", "timestep=2", "every=5", "dtype=float64", "output=out")
    table = log("out/log.csv")
    assert np.ptp(table["total_eV"]) < 2e-3
    assert np.ptp(table["potential_eV"]) > 20 * np.ptp(table["total_eV"])
    assert table["temperature_K"][0] == pytest.approx(300)
    np.testing.assert_array_equal(table["step"], np.arange(0, 121, 5))
    assert "meV/atom/ps" in out
    assert len(frames("out/trajectory.extxyz")) == 25
    assert Path("out/md.png").stat().st_size


def test_the_drift_printed_is_the_slope_of_the_energy() -> None:
    course = Course(4, "nve")
    for step in range(50):
        energy = -3.0 + 0.002 * step / 100
        course.moments.append(Moment(step, step / 100, energy, 0.0, energy, 0.0, 1.0, energy))
    assert course.drift() == pytest.approx(0.5)
    course.ensemble = "nvt"
    assert course.drift() is None


def test_the_thermostat_brings_the_temperature() -> None:
    write("in.extxyz", bulk("Cu", cubic=True) * (2, 2, 1))
    options = ("temperature=600", "friction=0.1", "timestep=3", "steps=250", "every=5")
    zoo("md", "input=in.extxyz", "ensemble=nvt", *options)
    later = log("md/log.csv")["temperature_K"][15:]
    assert later.mean() == pytest.approx(600, rel=0.2)


def test_constant_pressure_moves_the_volume_and_conserves_its_own_energy() -> None:
    write("in.extxyz", bulk("Cu", cubic=True))
    out = zoo("md", "input=in.extxyz", "ensemble=npt", "timestep=4", "steps=80", "dtype=float64")
    table = log("md/log.csv")
    assert np.ptp(table["volume_A3"]) > 0.5
    assert np.ptp(table["conserved_eV"]) < 0.1 * np.ptp(table["total_eV"])
    assert "Å^3/atom" in out


def test_the_same_seed_gives_the_same_trajectory() -> None:
    write("in.extxyz", crystal())
    options = ("input=in.extxyz", "ensemble=nvt", "steps=20", "dtype=float64")
    for output, seed in (("a", 3), ("b", 3), ("c", 4)):
        zoo("md", *options, f"seed={seed}", f"output={output}")
    a, b, c = (frames(f"{name}/final.extxyz")[0].positions for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3


def test_dynamics_go_on_with_the_velocities_of_a_file() -> None:
    """Two runs of 10 steps end where one of 20 does."""
    write("in.extxyz", crystal())
    options = ("dtype=float64", "every=10")
    zoo("md", "input=in.extxyz", "steps=20", "output=whole", *options)
    zoo("md", "input=in.extxyz", "steps=10", "output=first", *options)
    zoo("md", "input=first/final.extxyz", "velocities=keep", "steps=10", "output=second", *options)
    whole, parts = (frames(f"{name}/final.extxyz")[0] for name in ("whole", "second"))
    np.testing.assert_allclose(parts.positions, whole.positions, atol=1e-6)


def test_velocities_drawn_have_the_temperature_and_no_drift() -> None:
    atoms = crystal().repeat(2)
    draw_velocities(atoms, 500.0, np.random.default_rng(0))
    assert atoms.get_temperature() == pytest.approx(500)
    np.testing.assert_allclose(atoms.get_momenta().sum(0), 0, atol=1e-10)


def test_fixed_atoms_get_no_velocity() -> None:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=8)
    atoms.set_constraint(FixAtoms([0, 1, 2, 3]))
    draw_velocities(atoms, 400.0, np.random.default_rng(0))
    assert not atoms.get_velocities()[:4].any()
    assert atoms.get_temperature() == pytest.approx(400)


def test_a_trajectory_that_flies_apart_is_stopped() -> None:
    write("in.extxyz", Atoms("H2", positions=[(0, 0, 0), (0.02, 0, 0)]))
    with pytest.raises(DataError, match=r"Step \d+ of the dynamics: .* flew apart: take a shorter timestep"):
        zoo("md", "input=in.extxyz", "timestep=30", "every=1")
    assert frames("md/trajectory.extxyz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["ensemble=nph"], "ensemble=nph is not one of nve, nvt, npt"),
        (["velocities=zero"], "velocities=zero is not one of draw, keep"),
        (["velocities=keep"], "has none: set velocities=draw"),
        (["timestep=0"], "timestep=0 must be above 0"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["temperature=-1"], "temperature=-1 K is too low"),
        (["pressure=1"], "pressure=1 needs ensemble=npt"),
        (["ensemble=npt"], "periodic along all three axes"),
        (["index=:"], "zoo md starts from one frame"),
        (["timestp=1"], "Did you mean 'timestep'"),
    ],
)
def test_settings_of_dynamics_that_cannot_be(options: list[str], message: str) -> None:
    write("in.extxyz", [molecule("H2O"), molecule("H2O")])
    with pytest.raises(ConfigError, match=message):
        zoo("md", "input=in.extxyz", *options)


def test_constant_pressure_needs_a_model_with_stress() -> None:
    write("in.extxyz", crystal())
    with pytest.raises(ConfigError, match="predicts no stress"):
        zoo("md", "input=in.extxyz", "ensemble=npt", checkpoint="direct.safetensors")


def test_a_domain_without_the_verb_says_so() -> None:
    save_model(library.create_model("stid", num_nodes=3), "stid.safetensors", extra={"data": "file"})
    with pytest.raises(ConfigError, match="Domain 'traffic' has no relax"):
        zoo("relax", "input=in.extxyz", checkpoint="stid.safetensors")
    with pytest.raises(ConfigError, match="for domain=traffic, not for domain=atoms"):
        zoo("md", "domain=atoms", "input=in.extxyz", checkpoint="stid.safetensors")
