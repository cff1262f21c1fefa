"""Training and judging of interatomic potentials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from torch import Tensor, nn

from domains.atoms import metrics, references, report
from domains.atoms.batches import random_rotation, rotated, rotated_labels
from domains.atoms.data import AtomsData
from domains.atoms.losses import PotentialLoss
from domains.atoms.models.potential import Potential
from domains.atoms.transfer import transfer
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.registry import model_signature
from zoo.training.callbacks import gather
from zoo.training.task import Mean, Task, checked, new_model

SHOWN_ATOMS = 20_000
"""Up to so many atoms of the tested frames are kept for pictures of forces."""
TURNED = 16
"""Frames that are turned to measure how far a model is from equivariant."""


class AtomsTask(Task):
    """Trains a potential on energies, forces and stress; judges it by frame and by `config_type`.

    Args:
        model: a `Potential`, its `scale` set.
        cfg: the run's config; `loss` is read beside what `Task` reads.
        facts: the `extra()` of the data the model was made for.
    """

    monitor: ClassVar[str] = "val/loss"
    changes: ClassVar[tuple[str, ...]] = ("forces", "stress")

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any]) -> None:
        super().__init__(model, cfg)
        self.potential = cast(Potential, model)
        self.facts = facts
        options = checked("loss", _loss, OmegaConf.select(cfg, "loss", default=OmegaConf.create()))
        self.error = _loss(**options)
        self.means = {name: Mean() for name in ("energy_per_atom_mae", "force_mae", "stress_mae")}
        self.seen: list[Tensor] = []
        self.rows = np.zeros((0, len(metrics.COLUMNS)))
        self.shown: list[dict[str, np.ndarray]] = []
        self.turned: list[Tensor] = []

    @classmethod
    def build(cls, cfg: DictConfig, data: AtomsData, model: nn.Module | None = None) -> Self:
        """The task for `data`; a new model gets the element references and normalisers of the training part.

        Without `model.stress`, stress is learnt where forces are conservative and frames have it.
        """
        if model is None:
            model = new_model(_with_stress(cfg, data), data)
            set_scale(cast(Potential, model), data)
        if cfg.compile and cast(Potential, model).forces == "conservative":
            raise ConfigError(
                "compile=true: training conservative forces differentiates twice, which compiled code "
                "cannot. Leave it out, or train model.forces=direct."
            )
        return cls(model, cfg, data.extra())

    @staticmethod
    def check(facts: Mapping[str, Any], data: AtomsData, source: str) -> None:
        """See that the data have what there are references for.

        Raises:
            CheckpointError: an element that the weights were not trained on.
        """
        known = facts.get("mean_energies")
        if known is None:
            return
        unknown = [s for s in map(references.symbol, data.surveys["test"].numbers) if s not in known]
        if unknown:
            raise CheckpointError(
                f"{source} was trained on {', '.join(known)}; the data also have {', '.join(unknown)}. "
                "Train it on these with zoo finetune."
            )

    @classmethod
    def transfer(cls, path: Path, data: AtomsData, **changes: Any) -> nn.Module:
        """The model of a checkpoint, with other forces if asked for; says what was taken over."""
        model = transfer(path, changes)
        if data.E0s is not None:
            model.scale.element_references.copy_(_vector(data.references(), model.max_atomic_number))
        else:
            _require_references(model, data)
        return model

    def setup(self, stage: str) -> None:
        cast(AtomsData, self.data).use(self.potential.cutoff + self.potential.margin)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return self.potential.evaluate(batch["structures"])

    # ---- loss and metrics --------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any], stage: str) -> tuple[Tensor, Tensor]:
        structures = batch["structures"]
        outputs = self.potential(structures)
        count = torch.tensor(float(len(structures)), device=structures.positions.device)
        if stage != "train":
            self._judge(self.potential.physical(outputs, structures), batch, stage)
        return self.error(outputs, batch, structures, self.potential.scale) * count, count

    def _judge(self, outputs: dict[str, Tensor], batch: Mapping[str, Any], stage: str) -> None:
        structures = batch["structures"]
        rows = metrics.frame_errors(outputs, batch, structures)
        table = dict(zip(metrics.COLUMNS, rows.unbind(1), strict=True))
        error = (table["energy"] - table["energy_target"]).abs() / table["natoms"]
        known = error.isfinite()
        self.means["energy_per_atom_mae"].update(error[known].sum(), known.sum())
        self.means["force_mae"].update(table["force_abs"].sum(), table["force_values"].sum())
        self.means["stress_mae"].update(table["stress_abs"].sum(), table["stress_values"].sum())
        if stage == "test":
            self.seen.append(rows.cpu())
            self._keep(outputs, batch)
            if sum(map(len, self.turned)) < TURNED:
                self.turned.append(self._turned(outputs, batch))

    def _keep(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> None:
        """Forces and stress of the first frames, for pictures."""
        if sum(len(part["forces"]) for part in self.shown) >= SHOWN_ATOMS:
            return
        free = ~batch["structures"].fixed
        kept = {
            "index": batch["index"][batch["structures"].batch][free],
            "forces_target": batch["forces"][free],
        }
        if "forces" in outputs:
            kept["forces"] = outputs["forces"][free]
        if "stress" in outputs:
            kept |= {"stress": outputs["stress"], "stress_target": batch["stress"], "frame": batch["index"]}
        self.shown.append({name: value.detach().float().cpu().numpy() for name, value in kept.items()})

    def _turned(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Any]) -> Tensor:
        """Per structure: |E difference| per atom, mean |F difference| and mean |F| once turned at random."""
        structures = batch["structures"]
        turn = random_rotation(np.random.default_rng(0)).to(structures.positions.device)
        other = self.potential.evaluate(rotated(structures, turn))
        shift = (other["energy"] - outputs["energy"]).abs() / structures.natoms
        if "forces" not in outputs:
            return torch.stack([shift, torch.zeros_like(shift), torch.zeros_like(shift)], 1).cpu()
        labels = {"forces": outputs["forces"], "stress": batch["stress"]}
        turned = rotated_labels(labels, turn)["forces"]
        zeros = shift.new_zeros(len(structures))
        by_atom = [(other["forces"] - turned).abs().mean(1).double(), turned.abs().mean(1).double()]
        parts = [zeros.index_add(0, structures.batch, value) / structures.natoms for value in by_atom]
        return torch.stack([shift, *parts], 1).cpu()

    def metrics(self, stage: str) -> dict[str, Tensor]:
        """Per atom and component: eV/atom, eV/Å, eV/Å^3; those that there are labels for."""
        found = {name: mean.compute() for name, mean in self.means.items() if mean.count > 0}
        for mean in self.means.values():
            mean.reset()
        if stage == "test":
            self.rows = metrics.unique_rows(part.numpy() for parts in gather(self.seen) for part in parts)
            self.turned = [part for parts in gather(self.turned) for part in parts]
            self.shown = [part for parts in gather(self.shown) for part in parts]
            self.seen = []
        return found

    # ---- results -----------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def results(self, data: AtomsData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = self.rows
        mean_energies = self._mean_energies(data)
        turned = torch.cat(self.turned).mean(0) if self.turned else torch.zeros(3)
        return {
            "data": data.name,
            "model": self.name,
            "forces": self.potential.forces,
            "frames": {part: len(data.parts[part]) for part in data.parts},
            "atoms": {part: int(data.surveys[part].natoms.sum()) for part in data.parts},
            "mean": _rounded(metrics.summary(rows)),
            "baseline": _rounded(metrics.baseline_summary(rows, mean_energies)),
            "groups": {
                name: _rounded(found) for name, found in metrics.by_group(rows, data.tested_groups).items()
            },
            "references": references.by_symbol(
                {i: float(v) for i, v in enumerate(self.potential.scale.element_references.tolist()) if v}
            ),
            "rotation": {
                "energy_per_atom": float(turned[0]),
                "force": float(turned[1]),
                "force_relative": float(turned[1] / turned[2]) if turned[2] > 0 else 0.0,
            },
        }

    def _mean_energies(self, data: AtomsData) -> np.ndarray | None:
        """The sum of the elements' mean energies of each tested frame; fitted to these without others."""
        from ase.data import atomic_numbers

        stored = self.facts.get("mean_energies")
        survey = data.surveys["test"]
        try:
            if stored is None:
                fitted = references.least_squares(survey)
            else:
                fitted = {atomic_numbers[name]: energy for name, energy in stored.items()}
            return references.reference_energies(fitted, survey)[self.rows[:, 0].astype(int)]
        except DataError:
            return None

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        return report.tables(results)

    def plots(self, data: AtomsData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.atoms.plots import draw_results

        draw_results(self, data, results, folder)


def set_scale(model: Potential, data: AtomsData) -> None:
    """Element references and normalisers of the training part.

    Energies and stress of conservative models are in units of the root mean square force, which they must
    share, as forces are derivatives of the network's energy; direct forces and energies each have their own.

    Raises:
        DataError: the training frames have no forces but the model predicts them.
    """
    survey, scale = data.surveys["train"], model.scale
    fitted = data.references()
    scale.element_references.copy_(_vector(fitted, model.max_atomic_number))
    left = survey.energies - references.reference_energies(fitted, survey)
    spread = float(np.sqrt(np.nanmean(np.square(left - np.nanmean(left)))))
    if model.forces is None:
        scale.energy_rmsd.fill_(max(spread, 1e-6))
        return
    if not np.isfinite(survey.force_rms) or survey.force_rms == 0:
        raise DataError("The training frames have no forces other than zero: set model.forces=null.")
    scale.force_rmsd.fill_(survey.force_rms)
    scale.stress_rmsd.fill_(survey.force_rms)
    scale.energy_rmsd.fill_(survey.force_rms if model.forces == "conservative" else max(spread, 1e-6))


def _require_references(model: Potential, data: AtomsData) -> None:
    """Refuse elements that the checkpoint has no reference for.

    Raises:
        DataError: names them.
    """
    known = {i: float(v) for i, v in enumerate(model.scale.element_references.tolist()) if v}
    for part in ("train", "val", "test"):
        references.require_elements(known, data.surveys[part], "the checkpoint")


def _vector(fitted: Mapping[int, float], largest: int) -> Tensor:
    """`(largest + 1,)` float64 by atomic number.

    Raises:
        DataError: an element beyond what the model knows.
    """
    if fitted and max(fitted) > largest:
        raise DataError(
            f"The data have {references.symbol(max(fitted))}; the model knows the elements up to number "
            f"{largest}."
        )
    vector = torch.zeros(largest + 1, dtype=torch.float64)
    for number, energy in fitted.items():
        vector[number] = energy
    return vector


def _with_stress(cfg: DictConfig, data: AtomsData) -> DictConfig:
    """The config with `model.stress` decided by the data where it is null."""
    if cfg.model.get("stress") is not None:
        return cfg
    forces = cfg.model.get("forces", model_signature(cfg.model.name)["forces"].default)
    wanted = data.has_stress and forces == "conservative"
    return cast(DictConfig, OmegaConf.merge(cfg, {"model": {"stress": wanted}}))


def _loss(
    name: str | None = None,
    energy: float = 10.0,
    forces: float = 20.0,
    stress: float = 100.0,
    reduction: str = "per_structure",
) -> PotentialLoss:
    """The domain has one loss; its weights are chosen."""
    if name not in (None, "potential"):
        raise ConfigError(f"There is no loss.name={name} for atoms: leave it out, and set its weights.")
    return PotentialLoss(energy, forces, stress, reduction)


def _rounded(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: round(value, 8) if np.isfinite(value) else None for name, value in values.items()}
