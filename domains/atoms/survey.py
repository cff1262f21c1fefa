"""One pass over frames: what they hold, and what in them looks wrong before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import track

from zoo.cli.console import console
from zoo.errors import DataError

if TYPE_CHECKING:
    from domains.atoms.sources import Frame

ELEMENTS = 119
"""Atomic numbers 0 to 118."""
MANY = 5000
"""Above so many frames a progress bar is shown."""
ALL_ELECTRON = {
    1: -0.5,
    6: -37.8,
    7: -54.6,
    8: -75.1,
    9: -99.8,
    14: -289.4,
    15: -341.3,
    16: -398.1,
    17: -460.1,
}
"""Total energies of free atoms in hartree, to tell units by."""
OTHER_UNITS = {"Ha": 1.0, "kcal/mol": 627.5, "kJ/mol": 2625.5}
"""Per hartree."""
LARGE_FORCE, LARGE_STRESS = 300.0, 10.0
"""eV/Å and eV/Å^3: root mean squares above are taken for other units."""
NEAR, FAR = 0.5, 6.0
"""Å: typical distances to the nearest atom outside are taken for other units."""
JUMP = 50.0
"""eV per atom that no chemistry explains, only other labels."""


@dataclass
class Survey:
    """What a part of the data holds.

    Attributes:
        counts: `(F, 119)` atoms of each atomic number.
        energies: `(F,)` in eV; NaN: unknown.
        groups: of each frame.
        force_square: sum of the squares of all known force components, in (eV/Å)^2.
        force_values: their number.
        stress_square: the same of stress, in (eV/Å^3)^2.
        stress_values: their number.
        periodic: number of frames with a periodic axis.
    """

    frames: Sequence[Frame]
    counts: np.ndarray
    energies: np.ndarray
    groups: list[str]
    force_square: float
    force_values: int
    stress_square: float
    stress_values: int
    periodic: int

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> Survey:
        """One pass over all frames, which may be read one by one."""
        counts = np.zeros((len(frames), ELEMENTS), dtype=np.int32)
        energies = np.full(len(frames), np.nan)
        groups: list[str] = []
        square: dict[str, float] = {"forces": 0.0, "stress": 0.0}
        values, periodic = Counter[str](), 0
        places = range(len(frames))
        shown = track(places, "Looking at the frames", console=console, transient=True)
        for i in shown if len(frames) > MANY else places:
            frame = frames[i]
            numbers = frame.atoms.numbers
            if len(numbers) == 0:
                raise DataError(f"{frame.origin} has no atoms.")
            if numbers.min() < 1 or numbers.max() >= ELEMENTS:
                raise DataError(f"{frame.origin} has an atom that is no element.")
            counts[i] = np.bincount(numbers, minlength=ELEMENTS)
            energies[i] = frame.energy
            groups.append(frame.group)
            periodic += bool(frame.atoms.pbc.any())
            for name, label in (("forces", frame.forces), ("stress", frame.stress)):
                if label is not None:
                    known = label[np.isfinite(label)]
                    square[name] += float(np.square(known).sum())
                    values[name] += known.size
        return cls(
            frames=frames,
            counts=counts,
            energies=energies,
            groups=groups,
            force_square=square["forces"],
            force_values=values["forces"],
            stress_square=square["stress"],
            stress_values=values["stress"],
            periodic=periodic,
        )

    def __len__(self) -> int:
        return len(self.energies)

    @property
    def natoms(self) -> np.ndarray:
        """`(F,)`"""
        return self.counts.sum(1)

    @property
    def numbers(self) -> list[int]:
        """The elements that occur."""
        return np.flatnonzero(self.counts.any(0)).tolist()

    @property
    def force_rms(self) -> float:
        """Of the components, in eV/Å; NaN without forces."""
        return float(np.sqrt(self.force_square / self.force_values)) if self.force_values else np.nan

    def check_units(self) -> None:
        """Refuse labels and positions that look like those of other units or of other kinds.

        Raises:
            DataError: says what looks wrong, and how to read it, or to take it as it is.
        """
        if not len(self):
            return
        source = self.frames[0].origin.rpartition(", ")[0]
        for problem in (self._distances(), self._labels(), self._total_energies(), self._per_atom()):
            if problem:
                raise DataError(f"{source}: {problem} Or take all as it is: data.check=false.")

    def _distances(self) -> str:
        from scipy.spatial import KDTree

        nearest = []
        for i in np.linspace(0, len(self) - 1, min(len(self), 20)).astype(int):
            positions = self.frames[i].atoms.positions
            if 1 < len(positions) <= 10_000 and np.isfinite(positions).all():
                nearest.append(np.median(KDTree(positions).query(positions, k=2)[0][:, 1]))
        typical = float(np.median(nearest)) if nearest else 1.0
        if NEAR <= typical <= FAR:
            return ""
        return (
            f"atoms lie {typical:.3g} Å apart, which looks like another unit of length. "
            f"Set data.units.length={'nm' if typical < NEAR else 'Bohr'} if that is it."
        )

    def _labels(self) -> str:
        if self.force_values and self.force_rms > LARGE_FORCE:
            return (
                f"forces of {self.force_rms:.3g} eV/Å on average look like another unit. "
                "Set data.units.forces, for example kJ/mol/nm."
            )
        stress = np.sqrt(self.stress_square / self.stress_values) if self.stress_values else 0.0
        if stress > LARGE_STRESS:
            return (
                f"a stress of {stress:.3g} eV/Å^3 on average looks like another unit. "
                "Set data.units.stress, for example GPa or kbar (and mind the sign: positive under tension)."
            )
        return ""

    def _total_energies(self) -> str:
        """Whether all-electron energies come out in hartree or in what chemists use."""
        known = [number for number in self.numbers if number in ALL_ELECTRON]
        if known != self.numbers or 6 not in known:
            return ""
        hartree = self.counts[:, known] @ np.array([ALL_ELECTRON[number] for number in known])
        ratio = float(np.nanmedian(self.energies / hartree)) if np.isfinite(self.energies).any() else np.nan
        for unit, factor in OTHER_UNITS.items():
            if abs(ratio / factor - 1) < 0.02:
                return (
                    f"energies are {factor:g} times the total energies of these atoms in hartree, so they "
                    f"are in {unit}, not eV. Set data.units.energy={unit}."
                )
        return ""

    def _per_atom(self) -> str:
        """Whether energies do not grow with the number of atoms, or some are of another kind."""
        known = np.isfinite(self.energies)
        counts, energies = self.counts[known][:, self.numbers].astype(np.float64), self.energies[known]
        natoms = counts.sum(1)
        if len(energies) < 5:
            return ""
        per_atom = energies / natoms
        away = np.abs(_left(counts / natoms[:, None], per_atom))
        if natoms.max() >= 1.5 * natoms.min() and natoms.min() > 1:
            total, mean = _left(counts, energies) / natoms, _left(counts / natoms[:, None], energies)
            spread = np.abs(mean).mean()
            if spread < 0.1 * np.abs(total).mean() and np.abs(energies).mean() > 10 * spread:
                return (
                    "energies do not grow with the number of atoms: they look like energies per atom, and "
                    "the energy of the whole frame is needed. Multiply them, or set data.keys.energy."
                )
        if (away > JUMP).any():
            worst = int(np.flatnonzero(known)[away.argmax()])
            return (
                f"the energy per atom jumps: {self.frames[worst].origin.rpartition(', ')[2]} has "
                f"{self.energies[worst] / self.natoms[worst]:.2f} eV per atom, {away.max():.0f} eV from what "
                "the others of its elements have. Are total energies mixed with energies per atom?"
            )
        return ""


def _left(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """What linear least squares leave unexplained."""
    return targets - inputs @ np.linalg.lstsq(inputs, targets, rcond=None)[0]
