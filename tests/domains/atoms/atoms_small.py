"""Small frames and a small model for the tests of training potentials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from domains.atoms.sources import Frame

TINY_MODEL = (
    "model=escaip_mini",
    "model.hidden_size=8",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.knn_k=6",
    "model.cutoff=4.0",
    "model.edge_distance_expansion_size=8",
    "model.edge_distance_embedding_size=8",
    "model.frequency_list=[2,1,1]",
)


def crystal(seed: int = 0, repeat: tuple[int, int, int] = (1, 1, 1), metals: str = "CuAg") -> Atoms:
    """A rattled alloy of 4 atoms a cell, labelled by EMT."""
    draw = np.random.default_rng(seed)
    atoms = bulk("Cu", "fcc", a=3.8, cubic=True).repeat(repeat)
    symbols = [metals[i : i + 2] for i in range(0, len(metals), 2)]
    atoms.set_chemical_symbols(draw.choice(symbols, len(atoms)).tolist())
    atoms.positions += draw.normal(0, 0.1, atoms.positions.shape)
    return labelled(atoms, group="crystal")


def cluster(seed: int = 0, count: int = 5) -> Atoms:
    """Some copper atoms without a cell, labelled by EMT."""
    draw = np.random.default_rng(seed)
    grid = np.argwhere(np.ones((2, 2, 2)))[:count] * 2.5
    return labelled(Atoms("Cu" * count, grid + draw.normal(0, 0.1, (count, 3))), group="cluster")


def labelled(atoms: Atoms, group: str = "") -> Atoms:
    """With EMT's energy, forces and, in a crystal, stress."""
    atoms.calc = EMT()
    labels: dict[str, Any] = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        labels["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **labels)
    if group:
        atoms.info["config_type"] = group
    return atoms


def water(energy: float = -14.0, **arrays: Any) -> Atoms:
    """A molecule without labels other than those given."""
    atoms = molecule("H2O")
    atoms.info["energy_total"] = energy
    for name, value in arrays.items():
        atoms.arrays[name] = value
    return atoms


def save(path: Path, frames: Sequence[Atoms]) -> Path:
    """An extended XYZ file."""
    write(path, list(frames), format="extxyz")
    return path


def frame(symbols: str, energy: float, *, group: str = "", **labels: Any) -> Frame:
    """Atoms in a row, 2 Å apart."""
    atoms = Atoms(symbols)
    atoms.positions[:, 0] = 2.0 * np.arange(len(atoms))
    forces = labels.get("forces", np.zeros((len(atoms), 3)))
    return Frame(atoms, energy, forces, labels.get("stress"), group, f"test.extxyz, frame {energy:g}")


def mixed_file(path: Path, count: int = 12) -> Path:
    """Crystals and clusters in turn."""
    return save(path, [crystal(i) if i % 2 else cluster(i, 4 + i % 3) for i in range(count)])
