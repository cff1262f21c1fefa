"""Loss, metrics, normalisers and the report of potentials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from atoms_small import mixed_file
from omegaconf import OmegaConf
from torch import Tensor

from domains.atoms import metrics
from domains.atoms.data import AtomsData
from domains.atoms.losses import PotentialLoss, force_error, stress_error
from domains.atoms.models.potential import Potential, Scale
from domains.atoms.report import tables
from domains.atoms.structures import Structures
from domains.atoms.task import AtomsTask, set_scale
from zoo.errors import CheckpointError, ConfigError, DataError


class Springs(Potential):
    """A potential of one number: every pair of atoms of a structure is a spring."""

    def __init__(self, forces: str | None = "conservative", stress: bool = True) -> None:
        super().__init__(forces=forces, stress=stress, cutoff=4.0, margin=0.5, max_atomic_number=60)
        self.network = torch.nn.Identity()
        self.stiffness = torch.nn.Parameter(torch.tensor(0.1))

    def graph(self, structures: Structures) -> Any:
        x = structures.positions
        same = structures.batch[:, None] == structures.batch
        squared = ((x[:, None] - x) ** 2).sum(-1) * same
        energy = x.new_zeros(len(structures)).index_add(0, structures.batch, squared.sum(1))
        found = {"energy": self.stiffness * energy}
        return found if self.forces != "direct" else found | {"forces": self.stiffness * x}


def three() -> tuple[Structures, dict[str, Tensor]]:
    """Structures of 2, 1 and 2 atoms, one atom fixed, with targets; one energy and one force unknown."""
    structures = Structures.of(
        torch.rand(5, 3), torch.tensor([1, 8, 1, 8, 8]), natoms=torch.tensor([2, 1, 2])
    )
    structures.fixed[1] = True
    targets = {
        "energy": torch.tensor([1.0, torch.nan, 4.0], dtype=torch.float64),
        "forces": torch.rand(5, 3),
        "stress": torch.full((3, 3, 3), torch.nan),
        "index": torch.arange(3),
    }
    targets["forces"][4] = torch.nan
    targets["stress"][2] = 0.5
    return structures, targets


# ---- loss --------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    structures, targets = three()
    scale = Scale(10)
    scale.element_references[1], scale.element_references[8] = 0.5, -1.0
    scale.energy_mean.fill_(0.25)
    scale.energy_rmsd.fill_(2.0)
    scale.force_rmsd.fill_(4.0)
    scale.stress_rmsd.fill_(0.5)
    outputs = {"energy": torch.rand(3), "forces": torch.rand(5, 3), "stress": torch.rand(3, 3, 3)}
    wanted = [(1.0 - (0.5 - 1.0) - 0.25) / 2, (4.0 + 2.0 - 0.25) / 2]
    energy = sum(abs(float(outputs["energy"][i]) - t) / 2 for i, t in zip((0, 2), wanted, strict=True)) / 2
    length = (outputs["forces"] - targets["forces"] / 4).norm(dim=1)
    forces = float((length[0] + length[2] + length[3]) / 3)
    stress = float((outputs["stress"][2] - 1.0).abs().mean())
    found = PotentialLoss(2, 3, 5)(outputs, targets, structures, scale)
    assert float(found) == pytest.approx(2 * energy + 3 * forces + 5 * stress, rel=1e-5)
    only = PotentialLoss(2, 0, 0)(outputs, targets, structures, scale)
    assert float(only) == pytest.approx(2 * energy, rel=1e-5)


def test_forces_are_averaged_by_structure_or_over_all_atoms() -> None:
    structures = Structures.of(
        torch.zeros(4, 3), torch.ones(4, dtype=torch.long), natoms=torch.tensor([3, 1])
    )
    target = torch.zeros(4, 3)
    forces = torch.tensor([[3.0, 4, 0], [0, 0, 0], [0, 0, 0], [0, 0, 1.0]])
    assert float(force_error(forces, target, structures, "per_structure")) == pytest.approx((5 / 3 + 1) / 2)
    assert float(force_error(forces, target, structures, "mean")) == pytest.approx(6 / 4)
    forces[3] = 0
    assert float(force_error(forces, target, structures, "per_structure")) == pytest.approx(5 / 3)


def test_the_gradient_is_finite_where_errors_vanish_or_targets_are_unknown() -> None:
    structures, targets = three()
    forces = targets["forces"].nan_to_num().requires_grad_()
    force_error(forces, targets["forces"], structures, "per_structure").backward()
    stress = torch.zeros(3, 3, 3, requires_grad=True)
    stress_error(stress, targets["stress"]).backward()
    for tensor in (forces, stress):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"energy": -1.0}, "loss.energy=-1.0"), ({"reduction": "sum"}, "loss.reduction=sum is not one of")],
)
def test_losses_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PotentialLoss(**options)


# ---- metrics -----------------------------------------------------------------------------------------------


def test_metrics_are_their_formulas() -> None:
    structures, targets = three()
    outputs = {"energy": torch.tensor([1.5, 7.0, 3.0]), "forces": torch.rand(5, 3)}
    rows = metrics.frame_errors(outputs, targets, structures).numpy()
    found = metrics.summary(rows)
    known = torch.tensor([True, False, True, True, False])
    f, t = outputs["forces"][known], targets["forces"][known]
    assert found["energy_mae"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["energy_per_atom_mae"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["force_mae"] == pytest.approx(float((f - t).abs().mean()), rel=1e-6)
    assert found["force_rmse"] == pytest.approx(float((f - t).square().mean().sqrt()), rel=1e-6)
    cosine = torch.nn.functional.cosine_similarity(f, t).mean()
    assert found["force_cosine"] == pytest.approx(float(cosine), rel=1e-6)
    magnitude = (f.norm(dim=1) - t.norm(dim=1)).abs().mean()
    assert found["force_magnitude"] == pytest.approx(float(magnitude), rel=1e-6)
    assert found["efwt"] == 0.0
    assert "stress_mae" not in found


def test_stress_is_counted_where_it_is_known() -> None:
    structures, targets = three()
    outputs = {"energy": torch.zeros(3), "stress": torch.zeros(3, 3, 3)}
    found = metrics.summary(metrics.frame_errors(outputs, targets, structures).numpy())
    assert found["stress_mae"] == pytest.approx(0.5)
    assert found["stress_mae_gpa"] == pytest.approx(0.5 * 160.21766208)


def test_energies_and_forces_within_threshold() -> None:
    structures, targets = three()
    targets["energy"][1] = 2.0
    outputs = {"energy": targets["energy"].clone(), "forces": targets["forces"].nan_to_num()}
    outputs["energy"][0] += 0.03
    outputs["forces"][2, 1] += 0.04
    found = metrics.summary(metrics.frame_errors(outputs, targets, structures).numpy())
    assert found["efwt"] == pytest.approx(1 / 3)


def test_the_baseline_is_no_forces_and_mean_energies() -> None:
    structures, targets = three()
    outputs = {"energy": torch.rand(3), "forces": torch.rand(5, 3)}
    rows = metrics.frame_errors(outputs, targets, structures).numpy()
    found = metrics.baseline_summary(rows, np.array([2.0, 0.0, 1.0]))
    known = targets["forces"][[0, 2, 3]]
    assert found["force_mae"] == pytest.approx(float(known.abs().mean()), rel=1e-6)
    assert found["energy_mae"] == pytest.approx((1.0 + 3.0) / 2)
    assert "energy_mae" not in metrics.baseline_summary(rows, None)


def test_groups_and_repeated_frames() -> None:
    structures, targets = three()
    outputs = {"energy": torch.zeros(3), "forces": torch.zeros(5, 3)}
    rows = metrics.frame_errors(outputs, targets, structures).numpy()
    once = metrics.unique_rows([rows[1:], rows])
    assert np.array_equal(once, rows, equal_nan=True)
    groups = metrics.by_group(once, ["b", "a", "b"])
    assert list(groups) == ["a", "b"]
    assert groups["b"]["energy_mae"] == pytest.approx(2.5)
    assert "energy_mae" not in groups["a"]


# ---- the task ----------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> AtomsData:
    found = AtomsData("extxyz", mixed_file(tmp_path / "a.extxyz", 20), batch_size=4)
    found.setup("fit")
    return found


@pytest.mark.parametrize("forces", ["conservative", "direct", None])
def test_normalisers_come_from_the_training_part(forces: str | None, data: AtomsData) -> None:
    model = Springs(forces, stress=forces == "conservative")
    set_scale(model, data)
    known = np.concatenate([f.forces for f in data.parts["train"] if f.forces is not None])
    rms = float(np.sqrt((known**2).mean()))
    fitted = data.references()
    left = [f.energy - sum(fitted[n] for n in f.atoms.numbers) for f in data.parts["train"]]
    if forces is not None:
        assert float(model.scale.force_rmsd) == pytest.approx(rms)
    expected = rms if forces == "conservative" else float(np.std(left))
    assert float(model.scale.energy_rmsd) == pytest.approx(expected, rel=1e-6)
    assert float(model.scale.element_references[29]) == pytest.approx(fitted[29])


def test_frames_without_forces_cannot_train_a_model_of_forces(data: AtomsData) -> None:
    data.surveys["train"].force_values = 0
    with pytest.raises(DataError, match=r"have no forces other than zero: set model.forces=null"):
        set_scale(Springs(), data)


def test_elements_beyond_the_model_are_refused(data: AtomsData) -> None:
    model = Springs()
    model.max_atomic_number = 29
    with pytest.raises(DataError, match="The data have Ag; the model knows the elements up to number 29"):
        set_scale(model, data)


def test_weights_are_refused_on_elements_they_have_not_seen(data: AtomsData) -> None:
    with pytest.raises(CheckpointError, match="trained on Ag; the data also have Cu"):
        AtomsTask.check({"mean_energies": {"Ag": -2.8}}, data, "it")


def test_results_name_the_margin_and_the_turn(data: AtomsData) -> None:
    import pytorch_lightning as pl

    model = Springs()
    model.zoo_config = {"name": "springs"}  # pyright: ignore[reportAttributeAccessIssue]
    set_scale(model, data)
    task = AtomsTask(model, OmegaConf.create({"loss": {"forces": 1.0}}), data.extra())
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.test(task, data, verbose=False)
    results = task.results(data)
    assert results["frames"] == {"train": 16, "val": 2, "test": 2}
    assert results["rotation"]["force_relative"] < 1e-4
    tested = data.parts["test"]
    known = np.concatenate([f.forces for f in tested if f.forces is not None])
    assert results["baseline"]["force_mae"] == pytest.approx(np.abs(known).mean(), rel=1e-5)
    fitted = data.references()
    away = [abs(f.energy - sum(fitted[n] for n in f.atoms.numbers)) / len(f) for f in tested]
    assert results["baseline"]["energy_per_atom_mae"] == pytest.approx(np.mean(away), rel=1e-5)
    words = " ".join(str(part) for part in tables(results)[1:])
    assert f"{1e3 * results['mean']['force_mae']:.1f} meV/Å" in words
    assert "equivariant" in words
