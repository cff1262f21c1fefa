"""The calculator of ASE, and many configurations at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from pair_potential import PairPotential, energy_by_hand, registered

import zoo
from domains.atoms import ZooCalculator
from domains.atoms.evaluation import evaluate_batch, passes
from domains.atoms.graph.pairs import candidate_pairs
from domains.atoms.structures import Structures
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.weights.checkpoint import save_model


def calculator(**options: object) -> ZooCalculator:
    return ZooCalculator(PairPotential(), **({"dtype": "float64"} | options))  # type: ignore[arg-type]


def copper(repeats: int = 2, seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True) * (repeats, repeats, repeats)
    atoms.rattle(0.1, seed=seed)
    return atoms


def skewed(pbc: tuple[bool, bool, bool] = (True, True, True)) -> Atoms:
    """Five atoms, some outside of a cell that is smaller than the cutoff."""
    cell = np.array([[3.1, 0.2, 0.0], [0.9, 3.3, 0.1], [-0.7, 0.5, 4.2]])
    places = np.random.default_rng(1).uniform(-0.8, 1.8, (3, 3))
    return Atoms("CuAgCu", scaled_positions=places, cell=cell, pbc=pbc)


# ---- results -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, True, False), (False,) * 3])
def test_energy_is_that_of_the_sum_over_images_along_periodic_axes(pbc: tuple[bool, bool, bool]) -> None:
    atoms = skewed(pbc)
    atoms.calc = calculator()
    assert atoms.get_potential_energy() == pytest.approx(energy_by_hand(atoms, PairPotential()), rel=1e-12)


def test_forces_are_slopes_of_the_energy() -> None:
    atoms = skewed()
    atoms.calc = calculator()
    np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, 1e-4), atol=2e-6)


def test_stress_has_the_sign_and_the_order_of_ase() -> None:
    """Against ASE's own differences; all six components differ."""
    atoms = skewed()
    atoms.calc = calculator()
    stress = atoms.get_stress()
    assert len(set(np.round(stress, 6))) == 6
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, 1e-4), atol=2e-6)


def test_a_stretched_crystal_pulls_inwards() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.calc = calculator()
    pulled = atoms.copy()
    pulled.set_cell(1.1 * atoms.cell.array, scale_atoms=True)
    pulled.calc = atoms.calc
    assert pulled.get_stress()[:3].min() > 0


def test_the_free_energy_is_the_energy() -> None:
    atoms = skewed()
    atoms.calc = calculator()
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


def test_float32_agrees_to_rounding() -> None:
    atoms, exact = copper(), copper()
    atoms.calc, exact.calc = calculator(dtype="float32"), calculator()
    assert atoms.get_potential_energy() == pytest.approx(exact.get_potential_energy(), rel=1e-6)
    np.testing.assert_allclose(atoms.get_forces(), exact.get_forces(), atol=1e-5)


def test_the_potential_given_is_left_alone() -> None:
    potential = PairPotential().train()
    ZooCalculator(potential, dtype="float64")
    assert potential.training
    assert {p.dtype for p in potential.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in potential.parameters())


def test_units_and_references_reach_the_results() -> None:
    potential = PairPotential()
    potential.scale.energy_rmsd.fill_(2.0)
    potential.scale.force_rmsd.fill_(2.0)
    potential.scale.element_references[29] = -1000.0
    atoms, plain = copper(1), copper(1)
    atoms.calc, plain.calc = ZooCalculator(potential, dtype="float64"), calculator()
    assert atoms.get_potential_energy() == pytest.approx(2 * plain.get_potential_energy() - 4000)
    np.testing.assert_allclose(atoms.get_forces(), 2 * plain.get_forces())


def test_fixed_atoms_stay_where_they_are() -> None:
    atoms = fcc111("Cu", (2, 2, 3), vacuum=8)
    atoms.rattle(0.1, seed=0)
    atoms.set_constraint(FixAtoms(mask=atoms.positions[:, 2] < 9))
    held = atoms.constraints[0].index
    before = atoms.positions.copy()
    atoms.calc = calculator()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=20)
    np.testing.assert_array_equal(atoms.positions[held], before[held])
    assert np.abs(atoms.positions - before).max() > 0.01
    assert not atoms.get_forces()[held].any()


def test_the_charge_is_read_at_every_call() -> None:
    atoms = molecule("H2O")
    atoms.calc = ZooCalculator(PairPotential(charged=0.5), dtype="float64")
    neutral = atoms.get_potential_energy()
    atoms.info["charge"] = -2
    assert atoms.get_potential_energy() == pytest.approx(neutral + 2.0)
    atoms.info["charge"] = 1
    assert atoms.get_potential_energy() == pytest.approx(neutral + 0.5)


# ---- pairs that are kept -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_pairs_kept_are_never_wrong(pbc: tuple[bool, bool, bool]) -> None:
    """A walk across the boundary, with atoms wrapped now and then, against a search at every step."""
    walk = np.random.default_rng(0)
    kept, fresh = skewed(pbc), skewed(pbc)
    kept.calc, fresh.calc = calculator(skin=0.6), calculator(skin=0.0)
    steps = 60
    for step in range(steps):
        kept.positions += walk.normal((0.15, 0.0, 0.1), 0.05, (len(kept), 3))
        if step % 3 == 0:
            kept.wrap()
        fresh.positions = kept.positions
        assert kept.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), rel=1e-10)
        np.testing.assert_allclose(kept.get_forces(), fresh.get_forces(), atol=1e-9)
    assert fresh.calc.pairs.searches == steps
    assert kept.calc.pairs.searches < steps


def test_pairs_are_kept_while_atoms_move_little() -> None:
    atoms = copper()
    atoms.calc = calculator(skin=0.5)
    atoms.get_potential_energy()
    for sign in (1, -1, 1):
        atoms.positions[0] += 0.1 * sign
        atoms.get_forces()
    assert atoms.calc.pairs.searches == 1
    atoms.positions[0] += 0.26
    atoms.get_forces()
    assert atoms.calc.pairs.searches == 2


def test_wrapping_alone_needs_no_search() -> None:
    atoms = copper()
    atoms.calc = calculator(skin=0.5)
    before = atoms.get_forces()
    atoms.wrap()
    np.testing.assert_allclose(atoms.get_forces(), before, atol=1e-12)
    assert atoms.calc.pairs.searches == 1


@pytest.mark.parametrize("change", ["cell", "pbc", "numbers", "charge"])
def test_other_changes_bring_a_new_search(change: str) -> None:
    atoms = copper()
    atoms.calc = calculator(skin=0.5)
    atoms.get_potential_energy()
    if change == "cell":
        atoms.set_cell(1.001 * atoms.cell.array)
    elif change == "pbc":
        atoms.pbc = (True, True, False)
    elif change == "numbers":
        atoms.numbers[0] = 47
    else:
        atoms.info["charge"] = 1
    atoms.get_potential_energy()
    assert atoms.calc.pairs.searches == 2


def test_the_skin_holds_all_pairs_after_the_longest_allowed_moves() -> None:
    """Two atoms that come nearer by just less than the skin meet within the cutoff, and are seen."""
    atoms = Atoms("Cu2", positions=[(0, 0, 0), (5.45, 0, 0)])
    atoms.calc = calculator(skin=0.5)
    assert atoms.get_potential_energy() == 0
    atoms.positions[:, 0] += [0.24, -0.24]
    assert atoms.get_potential_energy() < 0
    assert atoms.calc.pairs.searches == 1


# ---- what cannot be ----------------------------------------------------------------------------------------


def test_atoms_that_run_into_each_other_are_refused_though_pairs_are_kept() -> None:
    atoms = Atoms("Cu2", positions=[(0, 0, 0), (0.3, 0, 0)])
    atoms.calc = calculator(skin=1.0)
    atoms.get_potential_energy()
    atoms.positions[1] = atoms.positions[0]
    with pytest.raises(DataError, match="two atoms at one place"):
        atoms.get_potential_energy()


def test_positions_that_are_no_numbers_are_refused() -> None:
    atoms = copper()
    atoms.calc = calculator()
    atoms.get_potential_energy()
    atoms.positions[3, 1] = np.nan
    with pytest.raises(DataError, match=r"Atom 3 \(Cu\) .* is no number"):
        atoms.get_potential_energy()


def test_an_element_beyond_the_embedding_is_refused() -> None:
    atoms = Atoms("U", positions=[(0, 0, 0)])
    atoms.calc = calculator()
    with pytest.raises(DataError, match=r"Atom 0 \(U\) .* up to number 90"):
        atoms.get_potential_energy()


def test_an_element_that_was_not_in_training_is_refused() -> None:
    potential = PairPotential()
    potential.elements = frozenset({29, 47})
    atoms = Atoms("CuAu", positions=[(0, 0, 0), (2.5, 0, 0)])
    atoms.calc = ZooCalculator(potential)
    with pytest.raises(DataError, match=r"Atom 1 \(Au\) .* Known: Cu, Ag"):
        atoms.get_potential_energy()


def test_stress_of_a_model_without_it_is_no_silent_zero() -> None:
    atoms = copper()
    atoms.calc = ZooCalculator(PairPotential(stress=False))
    assert "stress" not in atoms.calc.implemented_properties
    with pytest.raises(PropertyNotImplementedError, match="predicts no stress, only energy, forces"):
        atoms.get_stress()


def test_stress_without_a_volume_asks_for_a_cell() -> None:
    atoms = molecule("H2O")
    atoms.calc = calculator()
    with pytest.raises(PropertyNotImplementedError, match="without volume"):
        atoms.get_stress()


def test_a_broken_potential_is_found_out() -> None:
    potential = PairPotential(depth=float("nan"))
    atoms = copper()
    atoms.calc = ZooCalculator(potential)
    with pytest.raises(DataError, match="energy is not finite"):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "float16 is not one of"),
        ({"skin": -1.0}, "skin=-1"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        calculator(**options)


# ---- weights -----------------------------------------------------------------------------------------------


def test_a_checkpoint_becomes_a_calculator(tmp_path: Path) -> None:
    with registered() as name:
        facts = {"mean_energies": {"Cu": -3.5}}
        save_model(zoo.create_model(name, depth=0.5), tmp_path / "model.safetensors", extra=facts)
        found = ZooCalculator(tmp_path / "model.safetensors", dtype="float64")
    atoms = copper()
    atoms.calc = found
    assert atoms.get_potential_energy() == pytest.approx(energy_by_hand(atoms, PairPotential(depth=0.5)))
    assert found.potential.elements == {29}


def test_weights_of_another_domain_are_refused(tmp_path: Path) -> None:
    save_model(zoo.create_model("stid", num_nodes=3), tmp_path / "model.safetensors", extra={"data": "file"})
    with pytest.raises(CheckpointError, match="STID: no interatomic potential"):
        ZooCalculator(tmp_path / "model.safetensors")


# ---- many at once ------------------------------------------------------------------------------------------


def mixture() -> list[Atoms]:
    slab = fcc111("Cu", (2, 2, 2), vacuum=5)
    lone = Atoms("Cu", positions=[(0, 0, 0)])
    return [copper(), molecule("H2O"), skewed(), slab, lone, skewed((False, True, False))]


@pytest.mark.parametrize("max_atoms", [1, 10, 1000])
def test_many_give_what_each_gives_alone(max_atoms: int) -> None:
    """Crystals, molecules and a lone atom, whatever shares a pass."""
    potential, steps = PairPotential().double(), []
    found = evaluate_batch(potential, mixture(), max_atoms=max_atoms, step=steps.append)
    assert sum(steps) == len(found)
    for atoms, result in zip(mixture(), found, strict=True):
        atoms.calc = calculator()
        assert result["energy"] == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(result["forces"], atoms.get_forces(), atol=1e-10)
        if "stress" in result:
            np.testing.assert_allclose(result["stress"], atoms.get_stress(), atol=1e-12)
    assert [len(result["forces"]) for result in found] == [len(atoms) for atoms in mixture()]
    assert ["stress" in result for result in found] == [True, False, True, True, False, True]


def test_passes_hold_as_many_atoms_as_allowed() -> None:
    sizes = [30, 5, 5, 200, 40, 20]
    found = list(passes(sizes, 60))
    assert sorted(i for part in found for i in part) == list(range(6))
    assert [sum(sizes[i] for i in part) for part in found] == [60, 40, 200]


def test_a_bad_configuration_is_named_by_its_place() -> None:
    bad = molecule("H2O")
    bad.positions[1] = bad.positions[0]
    with pytest.raises(DataError, match=r"Configuration 2: .*two atoms at one place"):
        evaluate_batch(PairPotential(), [*mixture()[:2], bad, *mixture()[2:]])


def test_pairs_of_a_batch_are_those_of_its_members() -> None:
    """What is prepared one by one is what a search over the whole batch finds."""
    potential = PairPotential()
    together = Structures.from_ase(mixture(), torch.float64)
    together.pairs = candidate_pairs(together, potential.cutoff)
    energies = potential.double().evaluate(together)["energy"]
    found = [result["energy"] for result in evaluate_batch(potential, mixture())]
    np.testing.assert_allclose(found, energies.detach().numpy(), atol=1e-10)
