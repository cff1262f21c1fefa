"""The embedded data: alloys labelled by ASE's effective-medium theory.

EMT (Jacobsen, Stoltze & Nørskov 1996) is a cheap, smooth many-body potential of the fcc metals Al, Ni, Cu,
Pd, Ag, Pt and Au with energies, forces and stress: an honest stand-in for density functional theory where
nothing can be downloaded. Kinds of frames, equally often, named by `config_type`:

- `bulk`: fcc supercells of one to four metals, rattled;
- `strained`: the same, sheared and stretched by up to 6 %;
- `hot`: rattled by more, as in a melt;
- `surface`: (111), (100) or (110) slabs with vacuum, periodic along two axes, the lowest layer fixed;
- `cluster`: cut-out balls, not periodic.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from zoo.errors import ConfigError, require
from zoo.files import atomic_path
from zoo.paths import cache_dir

if TYPE_CHECKING:
    from ase import Atoms

METALS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}
"""Lattice constants in Å."""
VERSION = 1
"""Raised when other frames are generated for the same seed."""
NEAREST = 0.8
"""Of the nearest-neighbour distance: frames with atoms closer than this are drawn again."""


def emt_frames(count: int, seed: int) -> list[Atoms]:
    """`count` labelled frames; the calculator holds energy, forces, and stress of periodic cells.

    Raises:
        ConfigError: fewer than one frame of each kind.
        MissingExtra: ASE is not installed.
    """
    require("ase", "atoms")
    kinds: list[tuple[str, Callable[[np.random.Generator], Atoms]]] = list(KINDS.items())
    if count < len(kinds):
        raise ConfigError(f"data.frames={count}: at least {len(kinds)} are needed, one of each kind.")
    frames = []
    for i in range(count):
        kind, make = kinds[i % len(kinds)]
        draw = np.random.default_rng((VERSION, seed, i))
        frames.append(_labelled(_apart(make, draw), kind))
    return frames


def emt_file(count: int, seed: int, folder: Path | None = None) -> Path:
    """The frames as extended XYZ, made on first use, in the cache of the zoo or in `folder`."""
    name = f"emt-{count}-{seed}-v{VERSION}.extxyz"
    path = (folder or cache_dir() / "atoms") / name
    if not path.is_file():
        from ase.io import write

        frames = emt_frames(count, seed)
        with atomic_path(path) as part:
            write(part, frames, format="extxyz")
    return path


# ---- kinds of frames ---------------------------------------------------------------------------------------


def _bulk(draw: np.random.Generator, rattle: float = 0.12) -> Atoms:
    """2 x 2 x 2, 2 x 2 x 1 cubic or 3 x 3 x 3 primitive cells: 16 to 32 atoms."""
    from ase.build import bulk

    metals = _metals(draw)
    a = _lattice_constant(metals) * draw.uniform(0.97, 1.03)
    cubic = bool(draw.random() < 0.5)
    repeat = (2, 2, int(draw.integers(1, 3))) if cubic else (3, 3, 3)
    atoms = bulk("Cu", "fcc", a=a, cubic=cubic).repeat(repeat)
    _mix(atoms, metals, draw)
    atoms.positions += draw.normal(0, draw.uniform(0.02, rattle), (len(atoms), 3))
    return atoms


def _strained(draw: np.random.Generator) -> Atoms:
    atoms = _bulk(draw, rattle=0.06)
    strain = draw.uniform(-0.06, 0.06, (3, 3))
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    return atoms


def _hot(draw: np.random.Generator) -> Atoms:
    return _bulk(draw, rattle=0.2)


def _surface(draw: np.random.Generator) -> Atoms:
    from ase.build import fcc100, fcc110, fcc111
    from ase.constraints import FixAtoms

    metals = _metals(draw)
    build = (fcc111, fcc100, fcc110)[draw.integers(3)]
    layers = int(draw.integers(3, 5))
    atoms = build("Cu", (2, 2, layers), a=_lattice_constant(metals), vacuum=6.0)
    _mix(atoms, metals, draw)
    lowest = atoms.get_tags() == layers
    shift = draw.normal(0, draw.uniform(0.02, 0.15), (len(atoms), 3))
    atoms.positions += np.where(lowest[:, None], 0, shift)
    atoms.set_constraint(FixAtoms(mask=lowest))
    return atoms


def _cluster(draw: np.random.Generator) -> Atoms:
    from ase import Atoms
    from ase.build import bulk

    metals = _metals(draw)
    large = bulk("Cu", "fcc", a=_lattice_constant(metals), cubic=True).repeat(4)
    centre = large.cell.sum(0) / 2 + draw.uniform(-1, 1, 3)
    nearest = np.argsort(np.linalg.norm(large.positions - centre, axis=1))[: draw.integers(5, 25)]
    atoms = Atoms(numbers=large.numbers[nearest], positions=large.positions[nearest] - centre)
    _mix(atoms, metals, draw)
    atoms.positions += draw.normal(0, draw.uniform(0.05, 0.2), (len(atoms), 3))
    return atoms


KINDS: dict[str, Callable[[np.random.Generator], Atoms]] = {
    "bulk": _bulk,
    "strained": _strained,
    "hot": _hot,
    "surface": _surface,
    "cluster": _cluster,
}


def _metals(draw: np.random.Generator) -> list[str]:
    return draw.choice(list(METALS), size=int(draw.integers(1, 5)), replace=False).tolist()


def _lattice_constant(metals: list[str]) -> float:
    """By Vegard's law."""
    return float(np.mean([METALS[metal] for metal in metals]))


def _mix(atoms: Atoms, metals: list[str], draw: np.random.Generator) -> None:
    """Random occupation of the sites, in place."""
    atoms.set_chemical_symbols(draw.choice(metals, size=len(atoms)).tolist())


def _apart(make: Callable[[np.random.Generator], Atoms], draw: np.random.Generator) -> Atoms:
    """The first drawn frame whose atoms keep their distance."""
    from ase.neighborlist import neighbor_list

    while True:
        atoms = make(draw)
        limit = NEAREST * min(METALS[s] for s in set(atoms.get_chemical_symbols())) / np.sqrt(2)
        if not len(neighbor_list("i", atoms, limit)):
            return atoms


def _labelled(atoms: Atoms, kind: str) -> Atoms:
    from ase.calculators.emt import EMT
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms.calc = EMT()
    labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}
    if atoms.pbc.all():
        labels["stress"] = atoms.get_stress(apply_constraint=False)
    constraints = atoms.constraints
    plain = type(atoms)(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell,
        pbc=atoms.pbc,
        constraint=constraints,
        info={"config_type": kind},
    )
    plain.calc = SinglePointCalculator(plain, **labels)
    return plain
