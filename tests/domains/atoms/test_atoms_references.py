"""Reference energies of the elements: given, of free atoms, fitted; and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from atoms_small import frame, save

from domains.atoms.references import element_references, is_isolated, least_squares, reference_energies
from domains.atoms.survey import Survey
from zoo.errors import ConfigError, DataError

TRUTH = {"H": -13.6, "C": -1029.5, "O": -2042.25}


def energy_of(symbols: str) -> float:
    return sum(TRUTH[symbol] for symbol in Atoms(symbols).get_chemical_symbols())


@pytest.fixture
def survey() -> Survey:
    return Survey.of([frame(s, energy_of(s)) for s in ("H2O", "CH4", "CO2", "C2H6O", "H2")])


def test_least_squares_find_exact_references_in_float64(survey: Survey) -> None:
    found = least_squares(survey)
    assert found == pytest.approx({1: -13.6, 6: -1029.5, 8: -2042.25}, abs=1e-9)
    assert np.abs(survey.energies - reference_energies(found, survey)).max() < 1e-9


def test_elements_of_fixed_proportion_share_their_energy() -> None:
    survey = Survey.of([frame("H2O", -76.0), frame("H2O", -78.0)])
    found = least_squares(survey)
    assert reference_energies(found, survey) == pytest.approx([-77.0, -77.0])
    assert set(found) == {1, 8}


def test_frames_without_energy_do_not_count(survey: Survey) -> None:
    more = Survey.of([*survey.frames, frame("CO", float("nan"))])
    assert least_squares(more) == pytest.approx(least_squares(survey), abs=1e-9)
    with pytest.raises(DataError, match="no frame with an energy"):
        least_squares(Survey.of([frame("CO", float("nan"))]))


def test_free_atoms_are_known_by_group_or_by_being_alone() -> None:
    assert is_isolated(frame("H", -13.6))
    assert is_isolated(frame("H", -13.6, group="IsolatedAtom"))
    assert not is_isolated(frame("H2", -27.0, group="IsolatedAtom"))
    one = frame("Cu", -3.7)
    one.atoms.set_cell([2.5] * 3)
    one.atoms.pbc = True
    assert not is_isolated(one)


def test_references_of_free_atoms(survey: Survey) -> None:
    atoms = [frame(symbol, energy) for symbol, energy in TRUTH.items()]
    assert element_references("isolated", survey, atoms) == {1: -13.6, 6: -1029.5, 8: -2042.25}
    with pytest.raises(DataError, match="The training data has no free atoms"):
        element_references("isolated", survey)
    with pytest.raises(DataError, match=r"has C, .*no reference energy in isolated \(it has H, O\)"):
        element_references("isolated", survey, [atoms[0], atoms[2]])
    with pytest.raises(DataError, match=r"free atom H has -13.0000 eV here and -13.6000 eV before"):
        element_references("isolated", survey, [*atoms, frame("H", -13.0)])


def test_references_from_files(survey: Survey, tmp_path: Path) -> None:
    (tmp_path / "e0s.yaml").write_text("H: -13.6\nC: -1029.5\n8: -2042.25\n")
    expected = {1: -13.6, 6: -1029.5, 8: -2042.25}
    assert element_references(tmp_path / "e0s.yaml", survey) == expected
    atoms = [Atoms(symbol) for symbol in TRUTH]
    for image, energy in zip(atoms, TRUTH.values(), strict=True):
        image.calc = SinglePointCalculator(image, energy=energy)
    path = save(tmp_path / "free.extxyz", atoms)
    assert element_references(str(path), survey) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"H": -13.6}, DataError, r"frame .* has C, O, for which there is no reference energy in data.E0s"),
        ({"Hx": -13.6}, ConfigError, "'Hx' is no element"),
        ({"H": "low"}, ConfigError, "energy of H is a number in eV, not 'low'"),
        ("isolatd", ConfigError, "data.E0s=isolatd is neither a file nor one of .* Did you mean 'isolated'"),
    ],
)
def test_references_that_cannot_be(choice: Any, error: type[Exception], message: str, survey: Survey) -> None:
    with pytest.raises(error, match=message):
        element_references(choice, survey)
