"""The loss of the published runs: energies per atom, forces per vector, stress per component."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from domains.atoms.models.potential import Scale
from domains.atoms.structures import Structures
from zoo.errors import ConfigError, did_you_mean

REDUCTIONS = ("per_structure", "mean")


@dataclass(frozen=True)
class PotentialLoss:
    """`energy * L_E + forces * L_F + stress * L_S` in the units of the network, targets brought to them.

    `L_E`: mean over structures of |e - t| / atoms. `L_F`: the length of the error vector of each free atom;
    `per_structure`, averaged over the atoms of a structure, then over the structures where it is not zero;
    `mean`, over all free atoms. `L_S`: mean of |s - t| over structures and components. Targets that are not
    finite do not count.

    Args:
        energy, forces, stress: weights; a term of weight 0, or that the model has no output for, is left out.
        reduction: of the forces.

    Raises:
        ConfigError: a weight below zero, or another reduction.
    """

    energy: float = 10.0
    forces: float = 20.0
    stress: float = 100.0
    reduction: str = "per_structure"

    def __post_init__(self) -> None:
        for name in ("energy", "forces", "stress"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)}: weights are not negative.")
        if self.reduction not in REDUCTIONS:
            raise ConfigError(
                f"loss.reduction={self.reduction} is not one of {', '.join(REDUCTIONS)}."
                f"{did_you_mean(self.reduction, REDUCTIONS)}"
            )

    def __call__(
        self, outputs: Mapping[str, Tensor], targets: Mapping[str, Any], structures: Structures, scale: Scale
    ) -> Tensor:
        """The loss of a batch, 0-dimensional.

        Args:
            outputs: of the network: `energy (G,)`, and as far as it has them `forces (N, 3)` and
                `stress (G, 3, 3)`.
            targets: the same in eV and Å, the energies in float64 with all element references.
            scale: of the model.
        """
        total = self.energy * energy_error(outputs["energy"], targets["energy"], structures, scale)
        if self.forces and "forces" in outputs:
            error = force_error(
                outputs["forces"], targets["forces"] / scale.force_rmsd, structures, self.reduction
            )
            total = total + self.forces * error
        if self.stress and "stress" in outputs:
            total = total + self.stress * stress_error(
                outputs["stress"], targets["stress"] / scale.stress_rmsd
            )
        return total


def energy_error(energy: Tensor, target: Tensor, structures: Structures, scale: Scale) -> Tensor:
    """Mean over structures of the error per atom; references are taken off in float64."""
    wanted = (target.double() - scale.references(structures) - scale.energy_mean) / scale.energy_rmsd
    known = wanted.isfinite()
    error = torch.where(known, energy - wanted.to(energy), 0).abs() / structures.natoms
    return error.sum() / known.sum().clamp(min=1)


def force_error(forces: Tensor, target: Tensor, structures: Structures, reduction: str) -> Tensor:
    """Mean length of the error vectors of free atoms."""
    counted = target.isfinite().all(1) & ~structures.fixed
    error = torch.where(counted[:, None], forces - target.to(forces), 0)
    # A vector of zeros has no direction: its length is 0, and so is the gradient here.
    still = (error == 0).all(1)
    length = torch.where(still, 0, error.masked_fill(still[:, None], 1).norm(dim=1))
    if reduction == "mean":
        return length.sum() / counted.sum().clamp(min=1)
    zeros = length.new_zeros(len(structures))
    free = zeros.index_add(0, structures.batch, counted.to(length))
    mean = zeros.index_add(0, structures.batch, length) / torch.where(free > 0, free, structures.natoms)
    return mean.sum() / (mean != 0).sum().clamp(min=1)


def stress_error(stress: Tensor, target: Tensor) -> Tensor:
    """Mean over structures and components; nothing where there is no volume."""
    known = target.isfinite() & stress.isfinite()
    return torch.where(known, stress - target.to(stress), 0).abs().sum() / known.sum().clamp(min=1)
