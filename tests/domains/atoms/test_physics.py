"""`zoo check`: each law by a number, on potentials that keep it and on ones that do not."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from pair_potential import PairPotential, registered
from torch import Tensor
from typer.testing import CliRunner

import zoo as library
from domains.atoms import ZooCalculator
from domains.atoms.graph.pairs import pair_vectors, pairs_of
from domains.atoms.models.potential import Potential
from domains.atoms.physics import Check, Laboratory, own_structures, physics_report
from domains.atoms.structures import Structures
from zoo.cli import app
from zoo.errors import ConfigError, ZooError
from zoo.weights.checkpoint import save_model


def structures() -> list[Atoms]:
    found = [bulk("Cu", cubic=True), molecule("CH4")]
    for i, atoms in enumerate(found):
        atoms.rattle(0.05, seed=i)
    return found


def laboratory(potential: Potential) -> Laboratory:
    return Laboratory(potential.double().eval(), structures(), 1e-8, np.random.default_rng(0))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {found.name: found for found in checks}


class Tilted(PairPotential):
    """Energy that knows up from down, and forces that hide it."""

    def evaluate(self, structures: Structures) -> dict[str, Tensor]:
        found = super().evaluate(structures)
        heights = structures.positions[:, 2] - structures.positions[structures.batch * 0][:, 2]
        extra = 0.01 * heights.new_zeros(len(structures)).index_add(0, structures.batch, heights)
        return found | {"energy": found["energy"] + extra}


class Stepped(PairPotential):
    """A tenth of an eV for every pair nearer than 3 Å."""

    def evaluate(self, structures: Structures) -> dict[str, Tensor]:
        found = super().evaluate(structures)
        pairs = pairs_of(structures, self.cutoff)
        near = 0.05 * (pair_vectors(structures, pairs).norm(dim=1) < 3).double()
        steps = near.new_zeros(len(structures)).index_add(0, structures.batch[pairs.centre], near)
        return found | {"energy": found["energy"] + steps}


# ---- the checks --------------------------------------------------------------------------------------------


def test_a_potential_that_keeps_all_laws_passes_all_checks() -> None:
    calculator = ZooCalculator(PairPotential(length=1.6, depth=0.1), dtype="float64")
    checks = physics_report(calculator, structures(), nve_ps=0.02)
    assert [found.name for found in checks if not found.passed] == []
    known = by_name(checks)
    for law in ("translation", "permutation", "rotation", "batch of all, or alone", "supercell"):
        assert known[f"{law}: energy"].limit is not None
        assert known[f"{law}: forces"].value < 1e-9
    assert known["F = -dE/dx"].value < 1e-6
    assert known["stress = dE/dstrain / V"].value < 1e-6
    assert known["an atom leaves: jump of energy"].value < 1e-4
    assert known["drift at constant energy"].unit == "meV/atom/ps"


def test_direct_forces_are_measured_and_found_wanting() -> None:
    checks = by_name(
        physics_report(
            ZooCalculator(PairPotential(forces="direct", stress=False), dtype="float64"),
            structures(),
            nve_ps=0,
        )
    )
    assert all(found.passed for found in checks.values())
    for name in ("rotation: forces", "F = -dE/dx"):
        assert checks[name].limit is None
        assert checks[name].value > 0.1
    assert "stress = dE/dstrain / V" not in checks
    assert checks["translation: forces"].limit is not None


def test_an_energy_that_is_not_translation_invariant_fails() -> None:
    found = by_name(laboratory(Tilted()).translation())
    assert not found["translation: energy"].passed
    assert found["translation: forces"].passed


def test_rotation_is_only_measured_where_the_architecture_is_not_invariant() -> None:
    potential = Tilted()
    assert not by_name(laboratory(potential).rotation())["rotation: energy"].passed
    potential.invariant = False
    found = by_name(laboratory(potential).rotation())["rotation: energy"]
    assert found.passed
    assert found.value > 1e-4


def test_forces_that_are_no_slopes_of_the_energy_fail() -> None:
    found = by_name(laboratory(Tilted()).slopes())["F = -dE/dx"]
    assert found.limit == 1e-6
    assert not found.passed


def test_a_jump_is_measured_to_its_height() -> None:
    found = by_name(laboratory(Stepped()).smoothness())["an atom leaves: jump of energy"]
    assert found.value == pytest.approx(0.1, abs=1e-3)


def test_cells_below_the_cutoff_are_among_those_doubled() -> None:
    found = laboratory(PairPotential()).supercell()[0]
    assert found.passed
    smallest = float(found.note.split()[2])
    assert smallest < 5.0 / 2


def test_energies_of_free_atoms_do_not_hide_errors() -> None:
    """A total energy of -1e6 eV would make any relative error small."""
    potential = Tilted()
    potential.scale.element_references.fill_(-1e6)
    assert not by_name(laboratory(potential).translation())["translation: energy"].passed


def test_own_structures_are_of_elements_that_the_model_was_trained_on() -> None:
    potential = PairPotential()
    assert [set(atoms.numbers) for atoms in own_structures(potential)] == [{1, 6, 8}, {29}]
    potential.elements = frozenset({14})
    (silicon,) = own_structures(potential)
    assert set(silicon.numbers) == {14}


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    with registered() as name:
        made = library.create_model(name, length=1.6, depth=0.1)
        save_model(made, "model.safetensors", extra={"E0s": "given"})
        yield tmp_path


def zoo_check(*arguments: str) -> str:
    given = ["check", "checkpoint=model.safetensors", *arguments, "device=cpu"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "100"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_the_command_prints_every_number_and_writes_them(folder: Path) -> None:
    write("in.extxyz", structures())
    out = zoo_check("input=in.extxyz", "nve_ps=0.02", "output=checks.csv")
    assert "F = -dE/dx" in out
    assert "holds" in out
    with open("checks.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["check"] for row in rows} >= {"translation: energy", "net force", "drift at constant energy"}
    assert all(row["passed"] == "True" for row in rows)


def test_what_fails_is_named(folder: Path) -> None:
    """In float32 a time step of 20 fs does not conserve the energy."""
    write("in.extxyz", structures())
    with pytest.raises(ZooError, match=r"1 of \d+ checks failed: drift at constant energy\."):
        zoo_check("input=in.extxyz", "index=1", "nve_ps=0.4", "timestep=20", "temperature=1000")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nve_ps=-1"], "nve_ps=-1 must be at least 0"),
        (["output=checks.txt"], "the suffix must be .csv"),
        (["dtype=float16"], "dtype=float16 is not one of float32, float64"),
    ],
)
def test_settings_of_a_check_that_cannot_be(folder: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo_check("nve_ps=0", *options)
