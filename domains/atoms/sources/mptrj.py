"""The JSON file of MPTrj: material -> frame -> structure and labels (Deng et al. 2023).

Its stress is in kbar and positive under compression; here it is -0.1 GPa per kbar.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.atoms.sources.frames import Frame, LabelReader, full_tensor
from zoo.errors import DataError

if TYPE_CHECKING:
    from ase import Atoms

ENERGIES = ("corrected_total_energy", "uncorrected_total_energy")
"""The first is the usual one to train on; data.keys.energy chooses the other."""
HEAD = 4096


def is_mptrj(path: Path) -> bool:
    """Whether a JSON file holds structures of pymatgen, which a database of ASE does not."""
    with open(path, encoding="utf-8", errors="replace") as file:
        head = file.read(HEAD)
    return '"structure"' in head or '"lattice"' in head or '"uncorrected_total_energy"' in head


def read(path: Path, reader: LabelReader) -> list[Frame]:
    """All frames of the file, grouped by nothing.

    Raises:
        DataError: the file is no such JSON; names material and frame.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except ValueError as error:
        raise DataError(f"{path} is no whole JSON file: {error}") from None
    found = [
        (*_row(entry, f"{path}, {material}, {name}"), f"{path}, {material}, {name}")
        for material, frames in content.items()
        for name, entry in frames.items()
    ]
    if not found:
        raise DataError(f"{path} holds no frame.")
    reader.choose([values for _, values, _ in found], str(path))
    return [reader.frame(atoms, values, origin) for atoms, values, origin in found]


def _row(entry: dict[str, Any], origin: str) -> tuple[Atoms, dict[str, Any]]:
    from ase import Atoms, units

    try:
        structure = entry["structure"]
        sites = structure["sites"]
        atoms = Atoms(
            symbols=[site["species"][0]["element"] for site in sites],
            scaled_positions=np.array([site["abc"] for site in sites]).reshape(-1, 3),
            cell=structure["lattice"]["matrix"],
            pbc=True,
        )
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{origin} is no structure as MPTrj has them: {error!r} is missing.") from None
    values = {name: entry[name] for name in ENERGIES if entry.get(name) is not None}
    if entry.get("force") is not None:
        values["forces"] = entry["force"]
    if entry.get("stress") is not None:
        values["stress"] = -0.1 * units.GPa * full_tensor(entry["stress"], f"{origin}: the stress")
    return atoms, values
