"""Errors of potentials, by frame and summed up.

Forces: MAE and RMSE are per component, over free atoms; cosine and magnitude are per atom. Stress: per
component of the 3 x 3 tensor. Units: eV, eV/Å, eV/Å^3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.atoms.structures import Structures

COLUMNS = (
    *("index", "natoms", "energy", "energy_target"),
    *("force_abs", "force_square", "force_values", "force_worst", "force_zero_abs", "force_zero_square"),
    *("cosine", "cosines", "magnitude", "atoms"),
    *("stress_abs", "stress_square", "stress_values", "stress_zero_abs"),
)
"""Of the table of frames: sums of errors, and of the targets' own sizes (`zero`), with their counts."""
EFWT_ENERGY, EFWT_FORCE = 0.02, 0.03
"""OC20's "energy and forces within threshold": eV, and eV/Å for every component."""
GPA = 160.21766208
"""Per eV/Å^3."""
ZERO_FORCE = 1e-6
"""eV/Å: a force below has no direction."""


def frame_errors(outputs: Mapping[str, Tensor], batch: Mapping[str, Any], structures: Structures) -> Tensor:
    """A row of `COLUMNS` per structure, `(G, columns)` float64.

    Args:
        outputs: `energy`, and as far as the model has them `forces` and `stress`, in eV and Å.
        batch: the targets; those that are NaN do not count.
    """
    device = structures.positions.device
    count = len(structures)
    rows = dict.fromkeys(COLUMNS, torch.zeros(count, dtype=torch.float64, device=device))
    rows |= {"index": batch["index"].double(), "natoms": structures.natoms.double()}
    rows |= {"energy": outputs["energy"].double(), "energy_target": batch["energy"].double()}
    if "forces" in outputs:
        rows |= _force_errors(outputs["forces"].double(), batch["forces"].double(), structures)
    if "stress" in outputs:
        target = batch["stress"].double()
        known = target.isfinite() & outputs["stress"].isfinite()
        error = torch.where(known, outputs["stress"].double() - target, 0).flatten(1)
        rows |= {
            "stress_abs": error.abs().sum(1),
            "stress_square": error.square().sum(1),
            "stress_values": known.flatten(1).sum(1).double(),
            "stress_zero_abs": torch.where(known, target, 0).abs().flatten(1).sum(1),
        }
    return torch.stack([rows[name] for name in COLUMNS], 1)


def _force_errors(forces: Tensor, target: Tensor, structures: Structures) -> dict[str, Tensor]:
    counted = target.isfinite().all(1) & ~structures.fixed
    forces, target = (torch.where(counted[:, None], value, 0) for value in (forces, target))
    error = forces - target
    sizes, target_sizes = forces.norm(dim=1), target.norm(dim=1)
    directed = counted & (target_sizes > ZERO_FORCE) & (sizes > ZERO_FORCE)
    cosine = (forces * target).sum(1) / (sizes * target_sizes).clamp(min=ZERO_FORCE**2)
    zeros = target.new_zeros(len(structures))

    def summed(values: Tensor) -> Tensor:
        return zeros.index_add(0, structures.batch, values)

    worst = zeros.scatter_reduce(0, structures.batch, error.abs().amax(1), "amax")
    return {
        "force_abs": summed(error.abs().sum(1)),
        "force_square": summed(error.square().sum(1)),
        "force_values": summed(3 * counted.double()),
        "force_worst": worst,
        "force_zero_abs": summed(target.abs().sum(1)),
        "force_zero_square": summed(target.square().sum(1)),
        "cosine": summed(torch.where(directed, cosine, 0)),
        "cosines": summed(directed.double()),
        "magnitude": summed((sizes - target_sizes).abs()),
        "atoms": summed(counted.double()),
    }


def summary(rows: np.ndarray) -> dict[str, float]:
    """The metrics of some frames; only those that there are labels and outputs for.

    Args:
        rows: `(F, columns)` as `frame_errors` makes them.
    """
    table = {name: rows[:, i] for i, name in enumerate(COLUMNS)}
    known = np.isfinite(table["energy_target"])
    found: dict[str, float] = {"frames": len(rows)}
    if known.any():
        error = (table["energy"] - table["energy_target"])[known]
        per_atom = error / table["natoms"][known]
        found |= {
            "energy_mae": _mean(np.abs(error)),
            "energy_per_atom_mae": _mean(np.abs(per_atom)),
            "energy_per_atom_rmse": float(np.sqrt(np.mean(per_atom**2))),
        }
    if (values := table["force_values"].sum()) > 0:
        found |= {
            "force_mae": table["force_abs"].sum() / values,
            "force_rmse": np.sqrt(table["force_square"].sum() / values),
            "force_cosine": table["cosine"].sum() / max(table["cosines"].sum(), 1),
            "force_magnitude": table["magnitude"].sum() / table["atoms"].sum(),
        }
        within = (np.abs(table["energy"] - table["energy_target"]) < EFWT_ENERGY) & (
            table["force_worst"] < EFWT_FORCE
        )
        if known.any():
            found["efwt"] = _mean(within[known & (table["force_values"] > 0)])
    if (values := table["stress_values"].sum()) > 0:
        found |= {
            "stress_mae": table["stress_abs"].sum() / values,
            "stress_rmse": np.sqrt(table["stress_square"].sum() / values),
            "stress_mae_gpa": GPA * table["stress_abs"].sum() / values,
        }
    return {name: float(value) for name, value in found.items()}


def baseline_summary(rows: np.ndarray, references: np.ndarray | None) -> dict[str, float]:
    """What costs nothing: no forces, no stress, and as energies the means by element.

    Args:
        references: `(F,)` the sum of the elements' mean energies in each frame; None: not known.
    """
    plain = rows.copy()
    places = {name: i for i, name in enumerate(COLUMNS)}
    for name in ("force", "stress"):
        plain[:, places[f"{name}_abs"]] = rows[:, places[f"{name}_zero_abs"]]
    plain[:, places["force_square"]] = rows[:, places["force_zero_square"]]
    plain[:, places["energy"]] = np.nan if references is None else references
    found = summary(plain)
    energies = () if references is None else ("energy_mae", "energy_per_atom_mae", "energy_per_atom_rmse")
    kept = ("frames", *energies, "force_mae", "force_rmse", "stress_mae", "stress_mae_gpa")
    return {name: found[name] for name in kept if name in found}


def by_group(rows: np.ndarray, groups: Sequence[str]) -> dict[str, dict[str, float]]:
    """The metrics of each `config_type`, in order of first appearance."""
    names = [groups[int(index)] for index in rows[:, 0]]
    return {group: summary(rows[[name == group for name in names]]) for group in dict.fromkeys(sorted(names))}


def unique_rows(parts: Iterable[np.ndarray]) -> np.ndarray:
    """The rows of all processes, each frame once, in the order of the frames."""
    rows = np.concatenate([part.reshape(-1, len(COLUMNS)) for part in parts])
    _, first = np.unique(rows[:, 0], return_index=True)
    return rows[first]


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
