"""Frame averaging: how far a turned structure is from the same energy and turned forces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from allscaip_small import batch_of, frames, small_allscaip
from ase import Atoms
from ase.build import bulk, molecule
from scipy.spatial.transform import Rotation
from torch import Tensor

import zoo
from domains.atoms.calculator import ZooCalculator
from domains.atoms.frames import FrameAveraged, averaged, principal_frames, random_rotations
from domains.atoms.models.potential import Potential
from zoo.errors import ConfigError

TURN = Rotation.from_euler("xyz", [20, 50, 110], degrees=True).as_matrix()


def turned(atoms: Atoms) -> Atoms:
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ TURN.T)
    copy.positions = atoms.positions @ TURN.T
    return copy


def rotation_error(potential: Potential, atoms: Atoms) -> dict[str, float]:
    """Of energy, and of forces and stress turned back."""
    there, here = (potential(batch_of(frame, double=True)) for frame in (turned(atoms), atoms))
    turn = torch.from_numpy(TURN)
    errors: dict[str, Tensor] = {"energy": there["energy"] - here["energy"]}
    errors["forces"] = there["forces"] @ turn - here["forces"]
    if "stress" in here:
        errors["stress"] = turn.mT @ there["stress"] @ turn - here["stress"]
    return {name: float(error.detach().abs().max()) for name, error in errors.items()}


def small_escaip() -> Potential:
    """Direct forces, which do not turn with the structure."""
    torch.manual_seed(0)
    options = {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "frequency_list": [3, 2, 2, 1],
        "cutoff": 4.0,
    }
    model = zoo.create_model("escaip_mini", forces="direct", **options)
    assert isinstance(model, Potential)
    return model.double().eval()


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("forces", ["conservative", "direct"])
def test_principal_frames_remove_the_error_of_rotation(forces: str, index: int) -> None:
    """For a molecule, a crystal and a slab."""
    atoms = frames()[index]
    model = small_allscaip(double=True, forces=forces, stress=forces == "conservative" and index == 1)
    plain, mean = rotation_error(model, atoms), rotation_error(FrameAveraged(model), atoms)
    for name, error in mean.items():
        assert plain[name] > 1e-4
        assert error < 1e-8, name


def test_direct_forces_of_escaip_become_equivariant() -> None:
    model, atoms = small_escaip(), frames()[0]
    assert rotation_error(model, atoms)["forces"] > 1e-3
    assert rotation_error(FrameAveraged(model), atoms)["forces"] < 1e-8


def test_more_random_rotations_leave_less_error() -> None:
    model, atoms = small_allscaip(double=True, forces="direct", num_layers=1), molecule("H2O")
    errors = [rotation_error(FrameAveraged(model, count), atoms)["forces"] for count in (1, 48)]
    assert errors[1] < 0.4 * errors[0]


def test_forces_with_fixed_rotations_are_slopes_of_the_mean_energy() -> None:
    potential, atoms, step = FrameAveraged(small_allscaip(double=True), 3), frames()[0], 1e-5
    force = float(potential(batch_of(atoms, double=True))["forces"][1, 2].detach())
    ends = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[1, 2] += sign * step
        ends.append(float(potential(batch_of(moved, double=True))["energy"]))
    assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(force, rel=1e-5)


def test_a_batch_is_its_members_one_by_one() -> None:
    potential, members = FrameAveraged(small_allscaip(double=True)), frames()
    together = potential(batch_of(*members, double=True))
    alone = [potential(batch_of(frame, double=True)) for frame in members]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([one[name] for one in alone]))


def test_units_and_elements_are_those_of_the_potential() -> None:
    model = small_allscaip()
    model.scale.energy_rmsd.fill_(2.0)
    model.scale.element_references[1] = -13.6
    potential, batch = FrameAveraged(model, 1), batch_of(molecule("H2"))
    expected = potential(batch)["energy"].double() * 2 - 27.2
    torch.testing.assert_close(potential.evaluate(batch)["energy"], expected)
    assert (potential.invariant, potential.extensive) == (False, False)


def test_training_reaches_the_potential_inside() -> None:
    model = small_allscaip(double=True).train()
    FrameAveraged(model)(batch_of(*frames(), double=True))["forces"].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad and p.ndim > 1)


def test_axes_are_rotations() -> None:
    left_handed = bulk("Cu", cubic=True)
    left_handed.set_cell(left_handed.cell.array[[1, 0, 2]], scale_atoms=False)
    batch = batch_of(*frames(), left_handed, double=True)
    for axes in (principal_frames(batch), random_rotations(5, seed=0)):
        torch.testing.assert_close(axes @ axes.mT, torch.eye(3, dtype=torch.float64).expand_as(axes))
        torch.testing.assert_close(torch.linalg.det(axes), torch.ones(len(axes), dtype=torch.float64))


def test_random_rotations_turn_uniformly() -> None:
    mean = random_rotations(4000, seed=1).mean(0)
    assert float(mean.abs().max()) < 4 / np.sqrt(4000)


def test_no_rotation_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="rotations is at least 1, not 0"):
        FrameAveraged(small_allscaip(), 0)


def test_the_calculator_averages() -> None:
    model, atoms = small_allscaip(double=True), frames()[0]
    energies = []
    for frame in (atoms, turned(atoms)):
        frame.calc = ZooCalculator(model, device="cpu", dtype="float64", orientations="principal")
        energies.append(frame.get_potential_energy())
    assert energies[1] == pytest.approx(energies[0], abs=1e-8)


@pytest.mark.parametrize("orientations", ["pca", True, 1.5])
def test_other_orientations_are_refused(orientations: Any) -> None:
    with pytest.raises(ConfigError, match="neither 'principal' nor a number of rotations"):
        averaged(small_allscaip(), orientations)


def test_forces_in_principal_frames_are_not_passed_off_as_slopes() -> None:
    model = small_allscaip()
    assert averaged(model, None) is model
    assert (averaged(model, "principal").forces, averaged(model, 2).forces) == ("direct", "conservative")
