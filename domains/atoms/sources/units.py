"""Units that files of atoms are written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zoo.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ase import Atoms

KINDS = ("length", "energy", "forces", "stress")


@dataclass(frozen=True)
class Units:
    """Factors from the units of a file to Å, eV, eV/Å and eV/Å^3."""

    length: float = 1.0
    energy: float = 1.0
    forces: float = 1.0
    stress: float = 1.0

    @classmethod
    def of(cls, given: Mapping[str, str | None] | None) -> Units:
        """From names such as `{"energy": "Ha", "forces": "Ha/Bohr", "length": "Bohr", "stress": "GPa"}`.

        Forces follow energy and length, and stress energy over length cubed, where not given.

        Raises:
            ConfigError: an unknown kind or unit.
        """
        names = {kind: name for kind, name in (given or {}).items() if name is not None}
        for kind in names:
            if kind not in KINDS:
                raise ConfigError(
                    f"data.units.{kind} is not one of {', '.join(KINDS)}.{did_you_mean(kind, KINDS)}"
                )
        length, energy = names.get("length", "Ang"), names.get("energy", "eV")
        return cls(
            length=_factor("length", length, lengths()),
            energy=_factor("energy", energy, energies()),
            forces=_ratio(names.get("forces", f"{energy}/{length}")),
            stress=_pressure(names.get("stress", f"{energy}/{length}^3")),
        )

    def convert_positions(self, atoms: Atoms) -> None:
        """To Å, in place."""
        if self.length != 1.0:
            atoms.set_cell(atoms.cell.array * self.length, scale_atoms=False)
            atoms.positions *= self.length


def lengths() -> dict[str, float]:
    from ase import units

    return {"Ang": 1.0, "Bohr": units.Bohr, "nm": 10.0}


def energies() -> dict[str, float]:
    from ase import units

    return {
        "eV": 1.0,
        "meV": 1e-3,
        "Ha": units.Hartree,
        "Ry": units.Rydberg,
        "kcal/mol": units.kcal / units.mol,
        "kJ/mol": units.kJ / units.mol,
    }


def _factor(kind: str, name: str, known: Mapping[str, float]) -> float:
    if name not in known:
        raise ConfigError(
            f"data.units.{kind}={name}: write one of {', '.join(known)}.{did_you_mean(name, known)}"
        )
    return known[name]


def _ratio(name: str) -> float:
    energy, _, length = name.rpartition("/")
    return _factor("forces", energy, energies()) / _factor("forces", length, lengths())


def _pressure(name: str) -> float:
    from ase import units

    pressures = {"GPa": units.GPa, "kbar": units.GPa / 10, "bar": units.bar}
    if name in pressures:
        return pressures[name]
    if not name.endswith("^3"):
        raise ConfigError(
            f"data.units.stress={name}: write one of {', '.join(pressures)}, or ENERGY/LENGTH^3."
        )
    energy, _, length = name.removesuffix("^3").rpartition("/")
    return _factor("stress", energy, energies()) / _factor("stress", length, lengths()) ** 3
