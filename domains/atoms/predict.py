"""From files of structures and a trained potential to the same structures with energy, forces and stress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from domains.atoms import metrics
from domains.atoms.evaluation import DTYPES, Results, as_potential, evaluate_batch
from domains.atoms.exchange import configurations, progress, with_results, write_frames
from domains.atoms.models.potential import Potential
from domains.atoms.report import error_table
from domains.atoms.sources import Frame
from domains.atoms.sources.units import Units
from domains.atoms.structures import Structures
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from ase import Atoms

SUFFIXES = (".extxyz", ".xyz")
FEW = 12
"""So many frames have a row each in the table; of more, a `config_type` has one."""


@dataclass(frozen=True)
class Labelled:
    """A frame of the input and what the potential says of it."""

    frame: Frame
    results: Results


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Write `cfg.input` with energy, forces and stress to `cfg.output`, and compare them with its labels.

    Args:
        model: a `Potential`, in eval mode.
        facts: stored with its weights.
        cfg: as `configs/predict.yaml` with `configs/predict/atoms.yaml`.

    Returns:
        The files written: the structures, then a picture where there are labels and `cfg.plots`.

    Raises:
        ConfigError: a setting that cannot be.
        DataError: structures that cannot be read, or that the model cannot take.
        ZooError: the output cannot be written.
    """
    output = Path(cfg.output)
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"output={cfg.output}: the suffix must be {' or '.join(SUFFIXES)}.")
    if cfg.dtype not in DTYPES:
        raise ConfigError(f"dtype={cfg.dtype} is not one of {', '.join(DTYPES)}.")
    frames = configurations(
        cfg.input, cfg.index, "predict", keys=dict(cfg["keys"]), units=Units.of(dict(cfg.units))
    )
    if output.resolve() == Path(cfg.input).resolve():
        raise ConfigError(f"output={output} would replace the input: choose another.")
    potential = as_potential(model, facts, cfg.orientations).to(chosen_device(cfg.device), DTYPES[cfg.dtype])
    labelled = _labelled(potential, frames, cfg.max_atoms)
    written = [write_frames(output, [with_results(_with_labels(one.frame), one.results) for one in labelled])]
    console.print(_overview(labelled))
    rows = error_rows(labelled)
    if rows is not None:
        groups = [frame.group for frame in frames]
        errors = {
            "mean": metrics.summary(rows),
            "baseline": metrics.baseline_summary(rows, None),
            "groups": metrics.by_group(rows, groups),
        }
        console.print(error_table(errors, "Errors against the labels"))
        if cfg.plots:
            written.append(_draw(labelled, potential, errors["mean"], Path(cfg.plots) / "parity.png"))
    elif cfg.plots:
        console.print("The input has no labels to compare with: no picture.")
    return written


def _labelled(potential: Potential, frames: Sequence[Frame], max_atoms: int) -> list[Labelled]:
    names = [frame.origin for frame in frames]
    with progress() as bar:
        task = bar.add_task("Predicting", total=len(frames))
        found = evaluate_batch(
            potential,
            [frame.atoms for frame in frames],
            max_atoms=max_atoms,
            names=names,
            step=lambda count: bar.advance(task, count),
        )
    return [Labelled(frame, results) for frame, results in zip(frames, found, strict=True)]


def _with_labels(frame: Frame) -> Atoms:
    """The atoms of a frame, its labels under the names REF_energy, REF_forces and REF_stress."""
    atoms = frame.atoms.copy()
    if frame.group:
        atoms.info["config_type"] = frame.group
    if np.isfinite(frame.energy):
        atoms.info["REF_energy"] = frame.energy
    if frame.forces is not None:
        atoms.set_array("REF_forces", frame.forces)
    if frame.stress is not None:
        atoms.info["REF_stress"] = frame.stress.reshape(-1)
    return atoms


# ---- what the terminal shows -------------------------------------------------------------------------------


def _overview(labelled: Sequence[Labelled]) -> Table:
    """Sizes, energies by atom and the largest force, by frame or by `config_type`."""
    few = len(labelled) <= FEW
    chosen: dict[str, list[Labelled]] = {}
    for one in labelled:
        name = f"{one.frame.origin}  {one.frame.group}" if few else one.frame.group or "-"
        chosen.setdefault(name.strip(), []).append(one)
    table = Table("frame" if few else "config_type", title="Predicted", title_justify="left")
    for heading in (*(() if few else ("frames",)), "atoms", "eV/atom", "largest force\neV/Å"):
        table.add_column(heading, justify="right")
    for name, part in chosen.items():
        sizes = [len(one.frame) for one in part]
        energies = [one.results["energy"] / len(one.frame) for one in part]
        forces = [np.linalg.norm(f, axis=1).max() for one in part if len(f := one.results.get("forces", ()))]
        table.add_row(
            name,
            *(() if few else (str(len(part)),)),
            _span(sizes, "d"),
            _span(energies, ".4f"),
            f"{max(forces):.4f}" if forces else "",
        )
    return table


def _span(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


# ---- comparison with labels --------------------------------------------------------------------------------


def error_rows(labelled: Sequence[Labelled]) -> np.ndarray | None:
    """Rows as `metrics.frame_errors` makes them, `(frames, columns)`; None where the input has no labels."""
    if not any(_targets(one) for one in labelled):
        return None
    rows = []
    for i, one in enumerate(labelled):
        outputs = {name: torch.as_tensor(value) for name, value in _outputs(one).items()}
        known = _targets(one)
        targets = {
            name: torch.as_tensor(known.get(name, np.nan)).expand(value.shape)
            for name, value in outputs.items()
        }
        structures = Structures.from_ase([one.frame.atoms])
        rows.append(metrics.frame_errors(outputs, {"index": torch.tensor([i]), **targets}, structures))
    return torch.cat(rows).numpy()


def _outputs(one: Labelled) -> dict[str, np.ndarray]:
    """Predictions as a batch of one has them: `energy (1,)`, `forces (N, 3)`, `stress (1, 3, 3)`."""
    found = {"energy": np.array([one.results["energy"]])}
    if "forces" in one.results:
        found["forces"] = one.results["forces"]
    if "stress" in one.results:
        xx, yy, zz, yz, xz, xy = one.results["stress"]
        found["stress"] = np.array([[[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]])
    return found


def _targets(one: Labelled) -> dict[str, np.ndarray]:
    """Labels in the shapes of `_outputs`, as far as they are known."""
    frame = one.frame
    found = {}
    if np.isfinite(frame.energy):
        found["energy"] = np.array([frame.energy])
    if frame.forces is not None:
        found["forces"] = frame.forces
    if frame.stress is not None:
        found["stress"] = frame.stress[None]
    return found


def _draw(labelled: Sequence[Labelled], potential: Potential, mean: Mapping[str, float], path: Path) -> Path:
    from domains.atoms.plots import parity

    references = potential.scale.element_references.cpu().numpy()
    drawn = (
        ("energy", "eV/atom", "energy_per_atom_mae"),
        ("forces", "eV/Å", "force_mae"),
        ("stress", "eV/Å³", "stress_mae"),
    )
    panels = [
        _panel(part, name, unit, mean.get(error), references)
        for name, unit, error in drawn
        if (part := [one for one in labelled if name in _targets(one) and name in _outputs(one)])
    ]
    parity(panels, path)
    return path


def _panel(
    labelled: Sequence[Labelled], name: str, unit: str, mae: float | None, references: np.ndarray
) -> dict[str, Any]:
    """One quantity, value by value; energies by atom, without those of the free atoms."""
    from domains.atoms.plots import panel_of

    targets, outputs = [_targets(one)[name] for one in labelled], [_outputs(one)[name] for one in labelled]
    if name == "energy":
        free = [references[one.frame.atoms.numbers].sum() for one in labelled]
        sizes = [len(one.frame) for one in labelled]
        targets, outputs = (
            [(value - zero) / size for value, zero, size in zip(values, free, sizes, strict=True)]
            for values in (targets, outputs)
        )
    groups = [np.repeat(one.frame.group, target.size) for one, target in zip(labelled, targets, strict=True)]
    flat = [np.concatenate([value.reshape(-1) for value in values]) for values in (targets, outputs)]
    title = "energy over references" if name == "energy" else name
    return panel_of(title, unit, flat[0], flat[1], np.concatenate(groups), mae)
