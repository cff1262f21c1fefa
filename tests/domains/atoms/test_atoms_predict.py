"""`zoo predict domain=atoms`: structures in, the same structures with energy, forces and stress out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import read, write
from pair_potential import PairPotential, registered
from typer.testing import CliRunner

import zoo as library
from domains.atoms import ZooCalculator
from zoo.cli import app
from zoo.errors import ConfigError, DataError, ZooError
from zoo.weights.checkpoint import save_model


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Holds `model.safetensors`; the model can be loaded only in here."""
    monkeypatch.chdir(tmp_path)
    with registered() as name:
        facts = {"mean_energies": {"H": -1.0, "C": -1.0, "O": -2.0, "Cu": -3.5}}
        save_model(library.create_model(name), "model.safetensors", extra=facts)
        yield tmp_path


def predict(*arguments: object) -> str:
    """What the command prints; a ZooError is raised as it is."""
    given = ["predict", "checkpoint=model.safetensors", *map(str, arguments), "device=cpu", "dtype=float64"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def frames(path: str) -> list[Any]:
    found = read(path, ":")
    assert isinstance(found, list)
    return found


def crystal(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.08, seed=seed)
    return atoms


def expected(atoms: Atoms) -> Atoms:
    """A copy with a calculator of the same potential."""
    found = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    found.calc = ZooCalculator(PairPotential(), dtype="float64")
    return found


def labelled(atoms: Atoms, group: str) -> Atoms:
    """With energy, forces and stress of the effective medium theory."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    atoms.info["config_type"] = group
    return atoms


# ---- results -----------------------------------------------------------------------------------------------


def test_results_are_those_of_the_calculator_in_the_order_of_the_input() -> None:
    source = [crystal().repeat(2), molecule("CH3CH2OH"), crystal(1)]
    write("in.extxyz", source)
    out = predict("domain=atoms", "input=in.extxyz", "output=out.extxyz", "max_atoms=10")
    assert "out.extxyz" in out
    for atoms, found in zip(source, frames("out.extxyz"), strict=True):
        same = expected(atoms)
        np.testing.assert_array_equal(found.numbers, atoms.numbers)
        np.testing.assert_allclose(found.positions, atoms.positions, atol=1e-7)
        assert found.get_potential_energy() == pytest.approx(same.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(found.get_forces(), same.get_forces(), atol=1e-6)
        if atoms.pbc.all():
            np.testing.assert_allclose(found.get_stress(), same.get_stress(), atol=1e-8)


@pytest.mark.parametrize("name", ["in.traj", "in.db", "in.cif", "POSCAR"])
def test_formats_of_the_field_are_read(name: str) -> None:
    write(name, crystal())
    predict(f"input={name}", "output=out.extxyz")
    (found,) = frames("out.extxyz")
    assert found.get_potential_energy() == pytest.approx(expected(crystal()).get_potential_energy(), abs=1e-4)


def test_what_else_the_file_says_is_passed_on() -> None:
    slab = fcc111("Cu", (1, 1, 2), vacuum=5)
    slab.set_constraint(FixAtoms([0]))
    slab.info = {"name": "a slab", "charge": 1, "config_type": "surface"}
    slab.set_array("site", np.array([3, 4]))
    write("in.extxyz", slab)
    predict("input=in.extxyz", "output=out.extxyz")
    (found,) = frames("out.extxyz")
    assert found.info["name"] == "a slab"
    assert found.info["charge"] == 1
    assert found.info["config_type"] == "surface"
    np.testing.assert_array_equal(found.arrays["site"], [3, 4])
    np.testing.assert_array_equal(found.constraints[0].index, [0])


@pytest.mark.parametrize(("index", "count"), [("0", 1), ("-1", 1), (":2", 2), ("::2", 2)])
def test_frames_are_chosen_as_in_python(index: str, count: int) -> None:
    source = [crystal(seed) for seed in range(4)]
    write("in.extxyz", source)
    predict("input=in.extxyz", "output=out.extxyz", f"index={index}")
    found = frames("out.extxyz")
    wanted = source[int(index)] if ":" not in index else source[0]
    assert len(found) == count
    np.testing.assert_allclose(found[0].positions, wanted.positions, atol=1e-7)


# ---- labels ------------------------------------------------------------------------------------------------


def test_labels_are_kept_and_compared_by_config_type(folder: Path) -> None:
    source = [labelled(crystal(i).repeat(1 + i % 2), "bulk" if i < 2 else "hot") for i in range(4)]
    write("in.extxyz", source)
    out = predict("input=in.extxyz", "output=out.extxyz", "plots=plots")
    found = frames("out.extxyz")
    for atoms, one in zip(source, found, strict=True):
        assert one.info["REF_energy"] == pytest.approx(atoms.get_potential_energy())
        np.testing.assert_allclose(one.arrays["REF_forces"], atoms.get_forces(), atol=1e-7)
        full = np.reshape(one.info["REF_stress"], (3, 3))
        np.testing.assert_allclose(
            full[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]], atoms.get_stress(), atol=1e-7
        )
    errors = [np.abs(one.get_potential_energy() - one.info["REF_energy"]) / len(one) for one in found]
    forces = np.concatenate([(one.get_forces() - one.arrays["REF_forces"]).ravel() for one in found])
    assert f"{1e3 * np.mean(errors):.2f}" in out
    assert f"{1e3 * np.abs(forces).mean():.1f}" in out
    assert "bulk" in out
    assert "hot" in out
    assert (folder / "plots" / "parity.png").stat().st_size


def test_a_prediction_is_a_labelled_file_again() -> None:
    """Predicted twice, the second time the labels are still those of the first file."""
    write("in.extxyz", [labelled(crystal(), "bulk")])
    predict("input=in.extxyz", "output=once.extxyz")
    predict("input=once.extxyz", "output=twice.extxyz")
    once, twice = frames("once.extxyz")[0], frames("twice.extxyz")[0]
    assert twice.info["REF_energy"] == once.info["REF_energy"]
    assert twice.get_potential_energy() == pytest.approx(once.get_potential_energy())


def test_labels_in_other_units_and_under_other_names() -> None:
    atoms = labelled(crystal(), "bulk")
    energy = atoms.get_potential_energy()
    atoms.calc = None
    atoms.info["E_dft"] = energy / units.Hartree
    write("in.extxyz", atoms)
    predict("input=in.extxyz", "output=out.extxyz", "keys.energy=E_dft", "units.energy=Ha")
    assert frames("out.extxyz")[0].info["REF_energy"] == pytest.approx(energy)


def test_without_labels_there_is_no_picture(folder: Path) -> None:
    write("in.extxyz", crystal())
    assert "no labels to compare with" in predict("input=in.extxyz", "plots=plots")
    assert not (folder / "plots").exists()


# ---- what cannot be ----------------------------------------------------------------------------------------


def test_bad_structures_are_named_by_file_and_frame(folder: Path) -> None:
    bad = molecule("H2O")
    bad.positions[2] = bad.positions[1]
    write("in.extxyz", [crystal(), bad])
    with pytest.raises(DataError, match=r"in\.extxyz, frame 1: Atom 1 \(H\) .* two atoms at one place"):
        predict("input=in.extxyz", "output=out.extxyz")
    assert not (folder / "out.extxyz").exists()


def test_elements_that_were_not_in_training_are_refused() -> None:
    write("in.extxyz", molecule("SiH4"))
    with pytest.raises(DataError, match=r"Atom 0 \(Si\) .* Known: H, C, O, Cu"):
        predict("input=in.extxyz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["output=out.csv"], r"the suffix must be .extxyz or .xyz"),
        (["output=in.extxyz"], "would replace the input"),
        (["max_atoms=0"], "max_atoms=0: at least 1"),
        (["input=absent.cif"], "There is no file absent.cif"),
        (["keys.energie=a"], "Did you mean 'keys.energy'"),
        (["units.energy=calories"], "calories"),
        (["input=empty.xyz"], "is empty"),
        (["input=text.xyz"], "cannot be read"),
    ],
)
def test_settings_of_a_prediction_that_cannot_be(options: list[str], message: str) -> None:
    write("in.extxyz", crystal())
    Path("empty.xyz").touch()
    Path("text.xyz").write_text("no structure\n")
    with pytest.raises(ZooError, match=message):
        predict("input=in.extxyz", *options)


def test_an_unknown_option_of_prediction_is_met_with_the_nearest() -> None:
    write("in.extxyz", crystal())
    with pytest.raises(ConfigError, match="Did you mean 'max_atoms'"):
        predict("input=in.extxyz", "max_atom=3")
