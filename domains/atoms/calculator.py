"""A trained potential as a calculator of ASE."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from omegaconf import OmegaConf
from torch import Tensor

from domains.atoms.evaluation import DTYPES, as_potential, beside, check_finite, prepared, results_of
from domains.atoms.frames import averaged
from domains.atoms.graph.pairs import pair_vectors
from domains.atoms.models.potential import Potential
from domains.atoms.structures import Structures
from zoo.devices import chosen_device
from zoo.errors import ConfigError

if TYPE_CHECKING:
    from ase import Atoms


class ZooCalculator(Calculator):
    """Energy, forces and stress for all that ASE does with them.

    >>> atoms.calc = ZooCalculator("runs/atoms/escaip_mini/2026-01-31_12-00-00")  # doctest: +SKIP
    >>> atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()  # doctest: +SKIP

    Energies are in eV, forces in eV/Å, stress in eV/Å^3, in Voigt's order and with ASE's sign. Total charge
    and multiplicity are read from `atoms.info["charge"]` and `atoms.info["spin"]`. Neighbouring pairs are
    searched with a skin and kept until an atom has moved half of it, or elements, cell or periodicity change.

    Args:
        weights: a run folder, a checkpoint of ours, an official file, or a potential (which is copied).
        device: auto, cpu or cuda.
        dtype: float32 or float64; None: as the potential is.
        skin: Å that the list of pairs reaches farther than needed; 0 searches at every step.
        model: name of the model of an official file, where its tensors do not tell.
        orientations: "principal", or a number of random ones: the mean over turned copies, for potentials
            that are not invariant to rotation (see `frames.FrameAveraged`).

    Raises:
        CheckpointError: the weights cannot be read, or are those of no potential.
        ConfigError: another device or dtype, a negative skin, other orientations.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012 (as in ASE)

    def __init__(
        self,
        weights: str | Path | Potential,
        *,
        device: str = "auto",
        dtype: str | None = "float32",
        skin: float = 0.5,
        model: str | None = None,
        orientations: str | int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if dtype is not None and dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype} is not one of {', '.join(DTYPES)}.")
        if skin < 0:
            raise ConfigError(f"skin={skin}: at least 0 Å.")
        potential = (
            copy.deepcopy(weights) if isinstance(weights, Potential) else load_potential(weights, model)
        )
        self.potential = averaged(potential, orientations)
        self.potential.to(chosen_device(device), DTYPES[dtype] if dtype else None)
        self.potential.eval().requires_grad_(False)
        known = self.potential.predicts
        self.implemented_properties = [p for p in type(self).implemented_properties if p in known]
        self.implemented_properties.insert(1, "free_energy")
        self.pairs = KeptPairs(self.potential, skin)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation, charge and multiplicity included."""
        changes = list(super().check_state(atoms, tol=tol))
        if self.atoms is not None and _electrons(atoms) != _electrons(self.atoms):
            changes.append("info")
        return changes

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """A result by ASE's name.

        Raises:
            PropertyNotImplementedError: the potential does not predict it, or there is no volume.
            DataError: a configuration that cannot be, an unknown element, a result that is not finite.
        """
        if name not in self.implemented_properties:
            raise PropertyNotImplementedError(self._why_not(name))
        try:
            return super().get_property(name, atoms, allow_calculation)
        except PropertyNotImplementedError:
            raise PropertyNotImplementedError(
                f"No {name} of a configuration without volume: give it a cell."
            ) from None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = ("energy",),
        system_changes: Any = tuple(all_changes),
    ) -> None:
        """All that the potential predicts, whatever is asked for, into `results`."""
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise ConfigError("There are no atoms to calculate: set atoms.calc, or give them.")
        structures = self.pairs.structures(self.atoms)
        with torch.no_grad():
            found = results_of(self.potential.evaluate(structures), structures)[0]
        check_finite(found, "The configuration")
        self.results = found

    def require(self, name: str) -> None:
        """A ConfigError where the potential does not predict `name`."""
        if name not in self.implemented_properties:
            raise ConfigError(self._why_not(name))

    def _why_not(self, name: str) -> str:
        known = ", ".join(sorted(self.potential.predicts))
        if name != "stress":
            return f"This potential predicts no {name}. It predicts {known}."
        return (
            f"This potential predicts no stress, only {known}. Relaxing cells and constant pressure need a "
            "model with forces=conservative and stress=true."
        )


class KeptPairs:
    """The structure of one configuration after the other, its pairs kept while they are still all there.

    Pairs are searched up to `cutoff + margin + skin`. As long as no atom has moved more than skin / 2, no
    pair closer than `cutoff + margin` can be missing. Moves are counted to the nearest image, and added to
    the wrapped positions of the search: atoms may be wrapped in between.

    Attributes:
        searches: how often pairs were searched.
    """

    def __init__(self, potential: Potential, skin: float) -> None:
        self.potential, self.skin = potential, skin
        self.searches = 0
        self._kept: tuple[Atoms, Structures, Structures] | None = None

    def structures(self, atoms: Atoms) -> Structures:
        """The configuration as a batch of one, with its pairs.

        Raises:
            DataError: see `prepared`.
        """
        moves = self._moves(atoms)
        if self._kept is None or moves is None:
            return self._search(atoms)
        _, exact, placed = self._kept
        positions = exact.positions + torch.from_numpy(moves)
        return replace(placed, positions=positions.to(placed.positions))

    def _search(self, atoms: Atoms) -> Structures:
        self.searches += 1
        self._kept = None
        exact = prepared(atoms, self.potential, "The configuration", self.skin)
        placed = beside(exact, self.potential)
        # Atoms that could meet before the next search are to be found by it.
        if self.skin > 0 and _shortest(exact) > self.skin:
            self._kept = (atoms.copy(), exact, placed)
        return placed

    def _moves(self, atoms: Atoms) -> np.ndarray | None:
        """How far each atom is `(N, 3)` from where pairs were searched; None where these no longer serve."""
        if self._kept is None:
            return None
        before = self._kept[0]
        same = (
            np.array_equal(before.numbers, atoms.numbers)
            and np.array_equal(before.pbc, atoms.pbc)
            and np.array_equal(before.cell.array, atoms.cell.array)
            and _electrons(before) == _electrons(atoms)
        )
        if not same:
            return None
        moves = atoms.positions - before.positions
        if atoms.pbc.any():
            cell = atoms.cell.complete().array
            images = np.round(np.linalg.solve(cell.T, moves.T).T) * atoms.pbc
            moves = moves - images @ cell
        # Not `> skin / 2`: that would be false of positions that are no numbers.
        return moves if bool((np.linalg.norm(moves, axis=1) < self.skin / 2).all()) else None


def load_potential(path: str | Path, model: str | None = None) -> Potential:
    """The potential of a run folder, a checkpoint of ours or an official file, in eval mode.

    Args:
        model: name of the model of an official file, where its tensors do not tell.

    Raises:
        CheckpointError: the weights cannot be read, or are those of no potential.
    """
    from zoo.training.run import load_trained

    is_run = (Path(path) / "config.yaml").is_file()
    named = {"run": str(path), "checkpoint": None} if is_run else {"run": None, "checkpoint": str(path)}
    return as_potential(*load_trained(OmegaConf.create({**named, "model": model}), "predict"))


def _shortest(structures: Structures) -> float:
    pairs = structures.pairs
    assert pairs is not None
    lengths: Tensor = pair_vectors(structures, pairs).norm(dim=1)
    return float(lengths.min()) if len(lengths) else float("inf")


def _electrons(atoms: Atoms) -> tuple[Any, Any]:
    return atoms.info.get("charge", 0), atoms.info.get("spin", 0)
