"""One labelled configuration of atoms, and how its labels are found in what a file carries.

Units inside the zoo: Å, eV, eV/Å, eV/Å^3, stress by ASE's sign (positive under tension).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from domains.atoms.sources.units import Units
from zoo.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

NAMES: dict[str, tuple[str, ...]] = {
    "energy": (
        *("REF_energy", "energy", "ref_energy", "dft_energy", "DFT_energy", "total_energy", "free_energy"),
        *("Energy", "corrected_total_energy", "y"),
    ),
    "forces": ("REF_forces", "forces", "ref_forces", "dft_forces", "DFT_forces", "force", "Forces"),
    "stress": ("REF_stress", "stress", "ref_stress", "dft_stress", "DFT_stress"),
    "virial": ("REF_virials", "REF_virial", "virial", "virials", "dft_virial", "DFT_virial"),
    "group": ("config_type",),
    "charge": ("charge", "total_charge"),
    "spin": ("spin", "spin_multiplicity", "multiplicity"),
}
"""What files call each label, the more telling names first."""
GEOMETRY = ("numbers", "positions", "cell", "pbc", "natoms")
RESULTS = ("energy", "free_energy", "energies", "forces", "stress")
"""What ASE calls the results of a calculation."""


@dataclass(frozen=True)
class Frame:
    """A configuration with what is known of it.

    Attributes:
        atoms: without calculator; `info` holds `charge` and `spin` where given, constraints are `FixAtoms`.
        energy: of the whole configuration; NaN: unknown.
        forces: `(N, 3)`; a row of NaN: unknown; None: none.
        stress: `(3, 3)`; None: unknown, or not periodic along all three axes.
        group: what tables sum up, the `config_type`.
        origin: file and frame, for messages.
    """

    atoms: Atoms
    energy: float
    forces: np.ndarray | None
    stress: np.ndarray | None
    group: str
    origin: str

    def __len__(self) -> int:
        return len(self.atoms)


@dataclass
class LabelReader:
    """Takes labels out of named values.

    Args:
        keys: names of `energy`, `forces`, `stress`, `virial`, `group`, `charge`, `spin` in the file; what is
            not given is looked for by the usual names.
        units: of the file.
        nan: `error`, or `mask` labels that are not finite.
        needs_energy: refuse frames without energy.
        needs_forces: refuse frames of several atoms without forces.
        keep_rest: atoms keep in `info` and `arrays` what else the file says of them, labels left out.
    """

    keys: Mapping[str, str | None] = field(default_factory=dict)
    units: Units = field(default_factory=Units)
    nan: str = "error"
    needs_energy: bool = True
    needs_forces: bool = False
    keep_rest: bool = False
    left_out: Counter[str] = field(default_factory=Counter)
    chosen: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.keys:
            if name not in NAMES:
                raise ConfigError(
                    f"data.keys.{name} is no label.{did_you_mean(name, NAMES)} Labels: {', '.join(NAMES)}."
                )
        if self.nan not in ("error", "mask"):
            raise ConfigError(f"data.nan={self.nan} is not one of error, mask.")

    def choose(self, frames: Sequence[Mapping[str, Any]], source: str) -> None:
        """Decide by which names these frames carry their labels.

        Raises:
            DataError: there are no energies, or a name that was given is nowhere; lists what there is.
        """
        found = Counter(name for values in frames for name in values)
        for label, names in NAMES.items():
            given = self.keys.get(label)
            if given and given not in found:
                raise DataError(
                    f"{source} has no {given!r} (data.keys.{label}).{did_you_mean(given, found)} "
                    f"{_list(found)}"
                )
            usual = max(names, key=lambda name: found[name])
            if given or found[usual]:
                self.chosen[label] = given or usual
        if self.needs_energy and "energy" not in self.chosen:
            raise DataError(
                f"{source} has no energies under any usual name ({', '.join(NAMES['energy'][:4])}, ...). "
                f"{_list(found)} Set data.keys.energy=NAME."
            )
        if self.needs_forces and "forces" not in self.chosen:
            raise DataError(
                f"{source} has no forces under any usual name ({', '.join(NAMES['forces'][:4])}, ...). "
                f"{_list(found)} Set data.keys.forces=NAME, or train energies alone: "
                "model.forces=null data.forces=false."
            )

    def frame(self, atoms: Atoms, values: Mapping[str, Any], origin: str) -> Frame:
        """The frame of some atoms and the values a file has beside them.

        Raises:
            DataError: a label is missing, of the wrong shape, or not finite.
        """
        taken = {label: values[name] for label, name in self.chosen.items() if name in values}
        self.units.convert_positions(atoms)
        rest, atoms = atoms, _bare(atoms, taken, origin)
        if self.keep_rest:
            _pass_on(rest, atoms, [*self.chosen.values(), *RESULTS])
        energy = self._energy(taken, values, origin)
        return Frame(
            atoms=atoms,
            energy=energy,
            forces=self._forces(taken, atoms, values, origin),
            stress=self._stress(taken, atoms, origin),
            group=str(taken.get("group", "")),
            origin=origin,
        )

    def _energy(self, taken: Mapping[str, Any], values: Mapping[str, Any], origin: str) -> float:
        if "energy" not in taken and not self.needs_energy:
            return float("nan")
        if "energy" not in taken:
            raise DataError(f"{origin} has no {self.chosen['energy']!r}. {_list(values)}")
        value = np.asarray(taken["energy"], dtype=np.float64)
        if value.size != 1:
            raise DataError(
                f"{origin}: the energy {self.chosen['energy']!r} has {value.size} values, not one."
            )
        return float(self._finite(value.reshape(()), "energy", origin)) * self.units.energy

    def _forces(
        self, taken: Mapping[str, Any], atoms: Atoms, values: Mapping[str, Any], origin: str
    ) -> np.ndarray | None:
        if "forces" not in taken:
            if len(atoms) == 1 and not atoms.pbc.any():
                return np.zeros((1, 3))
            if self.needs_forces:
                raise DataError(f"{origin} has no {self.chosen['forces']!r}. {_list(values)}")
            return None
        forces = np.asarray(taken["forces"], dtype=np.float64)
        if forces.shape != (len(atoms), 3):
            raise DataError(
                f"{origin}: forces of shape {list(forces.shape)}, not [{len(atoms)}, 3] as there are atoms."
            )
        forces = self._finite(forces, "forces", origin) * self.units.forces
        return np.where(np.isfinite(forces).all(1, keepdims=True), forces, np.nan)

    def _stress(self, taken: Mapping[str, Any], atoms: Atoms, origin: str) -> np.ndarray | None:
        label = next((name for name in ("stress", "virial") if name in taken), None)
        if label is None:
            return None
        if not atoms.pbc.all():
            self.left_out[f"{label} of frames that are not periodic along all three axes"] += 1
            return None
        value = self._finite(full_tensor(taken[label], f"{origin}: {self.chosen[label]!r}"), label, origin)
        if not np.isfinite(value).all():
            return None
        if label == "virial":
            return -value * self.units.energy / atoms.get_volume()
        return value * self.units.stress

    def _finite(self, value: np.ndarray, label: str, origin: str) -> np.ndarray:
        bad = ~np.isfinite(value)
        if bad.any():
            if self.nan == "error":
                where = f" of atom {np.argwhere(bad)[0][0]}" if label == "forces" else ""
                raise DataError(
                    f"{origin}: the {label}{where} is not finite. Leave the frame out, or set data.nan=mask."
                )
            self.left_out[f"{label} that were not finite"] += 1
        return np.where(bad, np.nan, value)


def full_tensor(value: Any, what: str) -> np.ndarray:
    """`(3, 3)` of nine numbers, or of six in Voigt's order xx, yy, zz, yz, xz, xy.

    Raises:
        DataError: another number of values, or nine that are not symmetric.
    """
    flat = np.asarray(value, dtype=np.float64).reshape(-1)
    if flat.size == 6:
        xx, yy, zz, yz, xz, xy = flat
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if flat.size != 9:
        raise DataError(f"{what} has {flat.size} values; 6 (Voigt) or 9 are expected.")
    full = flat.reshape(3, 3)
    if np.abs(full - full.T).max() > 1e-3 * max(np.abs(full).max(), 1e-3):
        raise DataError(f"{what} is not symmetric: {np.array2string(full, precision=4)}.")
    return (full + full.T) / 2


def values_of(atoms: Atoms) -> dict[str, Any]:
    """Everything that some atoms carry beside their geometry, by name."""
    arrays = {name: value for name, value in atoms.arrays.items() if name not in GEOMETRY}
    results = atoms.calc.results if atoms.calc is not None else {}
    return {**atoms.info, **arrays, **results}


def _bare(atoms: Atoms, taken: Mapping[str, Any], origin: str) -> Atoms:
    """Species, positions, cell, fixed atoms, charge and spin alone."""
    from ase import Atoms
    from ase.constraints import FixAtoms

    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.index] = True
    info = {}
    for label in ("charge", "spin"):
        if label in taken:
            number = float(np.asarray(taken[label]).reshape(-1)[0])
            if number != round(number):
                raise DataError(f"{origin}: {label} {number:g} is not a whole number.")
            info[label] = int(number)
    constraint = FixAtoms(mask=fixed) if fixed.any() else None
    return Atoms(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell,
        pbc=atoms.pbc,
        info=info,
        constraint=constraint,
    )


def _pass_on(source: Atoms, target: Atoms, left_out: Sequence[str]) -> None:
    """Give what one has in `info` and `arrays` beside its geometry to the other, which keeps its own."""
    target.info = {k: v for k, v in source.info.items() if k not in left_out} | target.info
    for name, values in source.arrays.items():
        if name not in target.arrays and name not in left_out:
            target.set_array(name, values)


def _list(names: Iterable[str]) -> str:
    known = sorted(str(name) for name in names)
    return f"It has: {', '.join(known[:20])}." if known else "It has no values at all."
