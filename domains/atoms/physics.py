"""Whether a potential keeps the laws of physics: each check is a number, and some must be zero.

What must hold does so up to rounding, whatever the weights: translation, permutation, batching; with
conservative forces also that these are slopes, add up to zero and conserve energy; turning where the
architecture is invariant. The rest is measured, and says how far a model is from a law it was not built on.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from domains.atoms.calculator import ZooCalculator
from domains.atoms.evaluation import Results, as_potential, evaluate_batch
from domains.atoms.exchange import configurations, progress
from domains.atoms.md import Course, draw_velocities, moment
from domains.atoms.models.potential import Potential
from zoo.cli.console import console
from zoo.errors import ConfigError, ZooError
from zoo.files import atomic_write

if TYPE_CHECKING:
    from ase import Atoms

EXACT = {"float64": 1e-8, "float32": 1e-5}
"""eV/atom that may remain of an exact law; of forces a hundred times as many eV/Å."""
SLOPES = 1e-6
"""Relative, of central differences in float64."""
MOVE = 1e-4
"""Å, of finite differences; also the strain, without unit."""
FAR = 50.0
"""Å between two copies that should not know of each other."""
PATH, BENDS, HALVINGS = 60, 2, 15
"""Steps of the path on which an atom leaves others, bends of it that are looked at, and how closely."""
PROBED = 6
"""So many components of forces are compared with differences of energies."""
DRIFT = 1.0
"""meV/atom/ps that a conservative potential may drift."""


@dataclass(frozen=True)
class Check:
    """What was measured: a value in a unit, and the limit it must keep, or None where it is only measured."""

    name: str
    value: float
    unit: str
    limit: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Within its limit; of what is only measured, always."""
        return self.limit is None or self.value <= self.limit


def check(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Check a potential on the structures of `cfg.input`, or on some of its own.

    Args:
        model: a `Potential`.
        facts: stored with its weights.
        cfg: as `configs/check.yaml` with `configs/check/atoms.yaml`.

    Raises:
        DataError: structures that cannot be read, or that the model cannot take.
        ZooError: something that must hold does not.
    """
    if cfg.nve_ps < 0 or cfg.timestep <= 0:
        raise ConfigError(f"nve_ps={cfg.nve_ps} must be at least 0, and timestep={cfg.timestep} above 0.")
    potential = as_potential(model, facts, cfg.orientations)
    structures = (
        [frame.atoms for frame in configurations(cfg.input, cfg.index, "check")]
        if cfg.input
        else own_structures(potential)
    )
    calculator = ZooCalculator(potential, device=cfg.device, dtype=cfg.dtype)
    options = {name: cfg[name] for name in ("dtype", "nve_ps", "timestep", "temperature", "seed")}
    with progress() as bar:
        task = bar.add_task("Checking", total=None)
        checks = physics_report(
            calculator, structures, **options, begin=lambda name: bar.update(task, description=name)
        )
    console.print(_table(checks))
    written = [_write(checks, Path(cfg.output))] if cfg.output else []
    broken = [found.name for found in checks if not found.passed]
    if broken:
        raise ZooError(f"{len(broken)} of {len(checks)} checks failed: {', '.join(broken)}.")
    return written


def physics_report(
    calculator: ZooCalculator,
    structures: Sequence[Atoms],
    *,
    dtype: str = "float64",
    nve_ps: float = 1.0,
    timestep: float = 0.5,
    temperature: float = 300.0,
    seed: int = 0,
    begin: Callable[[str], None] | None = None,
) -> list[Check]:
    """All checks, in the worst case over the structures.

    Args:
        calculator: of the potential, in `dtype`: finite differences mean little in float32.
        structures: molecules or crystals; of each kind that some checks need one is made where there is none.
        nve_ps: ps at constant energy; 0: none.
        timestep: fs.
        temperature: K.
        seed: of moves, turns and velocities.
        begin: called with what comes next.
    """
    laboratory = Laboratory(calculator.potential, structures, EXACT[dtype], np.random.default_rng(seed))
    steps: list[tuple[str, Callable[[], list[Check]]]] = [
        ("translation", laboratory.translation),
        ("permutation", laboratory.permutation),
        ("rotation", laboratory.rotation),
        ("batching", laboratory.batching),
        ("a lone atom", laboratory.lone_atom),
        ("forces as slopes", laboratory.slopes),
        ("stress as a slope", laboratory.strains),
        ("net force", laboratory.net_force),
        ("supercell", laboratory.supercell),
        ("far copies", laboratory.extensivity),
        ("smoothness", laboratory.smoothness),
        ("dynamics", lambda: laboratory.dynamics(calculator, nve_ps, timestep, temperature)),
    ]
    found = []
    for name, measure in steps:
        if begin:
            begin(name)
        found += measure()
    return found


class Laboratory:
    """The checks of one potential on some structures.

    Args:
        exact: eV/atom that may remain of an exact law.
    """

    def __init__(
        self, potential: Potential, structures: Sequence[Atoms], exact: float, draw: np.random.Generator
    ) -> None:
        self.potential, self.exact, self.draw = potential, exact, draw
        self.use_pbc: bool | None = getattr(potential, "use_pbc", None)
        self.structures = [self._placed(atoms) for atoms in structures]
        self.results = self._results(self.structures)
        self.conservative = potential.forces == "conservative"
        self.forces = "forces" in potential.predicts
        number = int(self.structures[0].numbers[0])
        crystals = [atoms for atoms in self.structures if atoms.pbc.any()]
        molecules = [atoms for atoms in self.structures if not atoms.pbc.any()]
        # A model that knows no periodicity takes a crystal for a molecule.
        own = [] if self.use_pbc is False else [small_crystal(number, potential.cutoff / 2.3)]
        self.crystals = own and [*crystals[:2], *own]
        self.molecule = molecules[0] if molecules else cut_out(crystals[0])

    # ---- symmetries ----

    def translation(self) -> list[Check]:
        """All atoms moved alike, out of the cell too."""
        moved = [atoms.copy() for atoms in self.structures]
        for atoms in moved:
            atoms.positions += self.draw.normal(scale=7.0, size=3)
        return self._compared("translation", moved, lambda i, forces: forces)

    def permutation(self) -> list[Check]:
        """The same atoms in another order."""
        orders = [self.draw.permutation(len(atoms)) for atoms in self.structures]
        mixed = [atoms[order] for atoms, order in zip(self.structures, orders, strict=True)]
        return self._compared("permutation", mixed, lambda i, forces: forces[orders[i]])

    def rotation(self) -> list[Check]:
        """Everything turned; exact for invariant energies and their slopes."""
        from scipy.spatial.transform import Rotation

        turn = Rotation.random(rng=self.draw).as_matrix()
        turned = [atoms.copy() for atoms in self.structures]
        for atoms in turned:
            atoms.set_cell(atoms.cell.array @ turn.T)
            atoms.positions = atoms.positions @ turn.T
        invariant = self.potential.invariant
        return self._compared(
            "rotation", turned, lambda i, forces: forces @ turn.T, invariant, invariant and self.conservative
        )

    def batching(self) -> list[Check]:
        """All structures in one pass against each alone."""
        alone = [self._results([atoms])[0] for atoms in self.structures]
        return self._errors("batch of all, or alone", self.results, alone, True, True)

    def lone_atom(self) -> list[Check]:
        """An atom without neighbours can be computed, and feels no force."""
        from ase import Atoms

        found = self._results([Atoms(numbers=self.structures[0].numbers[:1], positions=[[0, 0, 0]])])[0]
        if not self.forces:
            return []
        force = float(np.abs(found["forces"]).max())
        return [Check("lone atom: force", force, "eV/Å", self._force_limit(self.conservative))]

    # ---- slopes ----

    def slopes(self) -> list[Check]:
        """Forces against central differences of the energy, at some components."""
        if not self.forces:
            return []
        worst = 0.0
        for atoms, result in zip(self.structures, self.results, strict=True):
            size = max(np.abs(result["forces"]).max(), 1e-3)
            for flat in self.draw.permutation(3 * len(atoms))[:PROBED]:
                atom, axis = divmod(int(flat), 3)
                slope = self._difference(atoms, lambda image, by: _push(image, atom, axis, by))  # noqa: B023
                worst = max(worst, abs(slope + result["forces"][atom, axis]) / size)
        return [Check("F = -dE/dx", worst, "of the largest", self._slope_limit())]

    def strains(self) -> list[Check]:
        """Stress against central differences of the energy by strain."""
        if "stress" not in self.potential.predicts or not self.crystals:
            return []
        worst = 0.0
        for atoms, result in zip(self.crystals, self._results(self.crystals), strict=True):
            slopes = np.zeros((3, 3))
            for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
                slopes[i, j] = self._difference(atoms, lambda image, by: _strain(image, i, j, by))  # noqa: B023
            by_hand = slopes[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / atoms.get_volume()
            size = max(np.abs(result["stress"]).max(), 1e-5)
            worst = max(worst, float(np.abs(by_hand - result["stress"]).max() / size))
        return [Check("stress = dE/dstrain / V", worst, "of the largest", self._slope_limit())]

    def net_force(self) -> list[Check]:
        """Forces add up to zero where nothing outside pulls."""
        if not self.forces:
            return []
        largest = max(float(np.abs(result["forces"].sum(0)).max()) for result in self.results)
        return [Check("net force", largest, "eV/Å", self._force_limit(self.conservative))]

    # ---- sizes ----

    def supercell(self) -> list[Check]:
        """Twice the cell along the first periodic axis: the same energy by atom, the same forces."""
        if not self.crystals:
            return []
        doubled = []
        for atoms in self.crystals:
            axis = int(np.flatnonzero(atoms.pbc)[0])
            doubled.append(atoms.repeat([2 if k == axis else 1 for k in range(3)]))
        wanted = [
            {"energy": 2 * once["energy"], "forces": np.tile(once.get("forces", np.zeros((0, 3))), (2, 1))}
            for once in self._results(self.crystals)
        ]
        holds = self.potential.extensive
        found = self._errors("supercell", self._results(doubled), wanted, holds, holds)
        smallest = min(float(atoms.cell.lengths()[atoms.pbc].min()) for atoms in self.crystals)
        return [replace(found[0], note=f"cells of {smallest:.1f} Å and more"), *found[1:]]

    def extensivity(self) -> list[Check]:
        """Two copies far apart have twice the energy."""
        copy = self.molecule.copy()
        copy.positions[:, 0] += FAR + np.ptp(copy.positions[:, 0])
        once, twice = self._results([self.molecule, self.molecule + copy])
        error = abs(twice["energy"] - 2 * once["energy"]) / len(self.molecule)
        limit = self.exact if self.potential.extensive else None
        return [Check(f"two copies {FAR:.0f} Å apart", error, "eV/atom", limit)]

    def smoothness(self) -> list[Check]:
        """The largest jump of energy and forces while an atom goes away from others.

        Where the energy bends most on the path, steps are halved until only a jump is left of them. Models
        that count neighbours, as EScAIP does for its bond-orientational order, have one.
        """
        molecule, cutoff = self.molecule, self.potential.cutoff
        ways = np.linspace(0.5 * cutoff, 1.02 * cutoff, PATH)
        bends = np.abs(np.diff(self._energies_on(molecule, ways), 2))
        chosen = np.unique(np.concatenate([[i, i + 1] for i in bends.argsort()[-BENDS:]]))
        low, high = ways[chosen], ways[chosen + 1]
        below, above = self._energies_on(molecule, low), self._energies_on(molecule, high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            between = self._energies_on(molecule, middle)
            first = np.abs(between - below) > np.abs(above - between)
            low, high = np.where(first, low, middle), np.where(first, middle, high)
            below, above = np.where(first, below, between), np.where(first, between, above)
        jumps = np.abs(above - below)
        note = f"at {low[int(np.argmax(jumps))]:.2f} Å from the next atom"
        found = [Check("an atom leaves: jump of energy", float(jumps.max()), "eV", None, note)]
        if self.forces:
            ends = [self._results([leaving(molecule, way) for way in part]) for part in (low, high)]
            jump = max(float(np.abs(b["forces"] - a["forces"]).max()) for a, b in zip(*ends, strict=True))
            found.append(Check("an atom leaves: jump of forces", jump, "eV/Å", None))
        return found

    def _energies_on(self, molecule: Atoms, ways: np.ndarray) -> np.ndarray:
        return np.array([r["energy"] for r in self._results([leaving(molecule, way) for way in ways])])

    # ---- dynamics ----

    def dynamics(
        self, calculator: ZooCalculator, picoseconds: float, timestep: float, temperature: float
    ) -> list[Check]:
        """The drift of the total energy at constant energy."""
        from ase import units
        from ase.md.verlet import VelocityVerlet

        if not self.forces or picoseconds == 0:
            return []
        atoms = self.structures[0].copy()
        atoms.calc = calculator
        draw_velocities(atoms, temperature, self.draw)
        motion = VelocityVerlet(atoms, timestep * units.fs)
        course = Course(len(atoms), "nve")
        motion.attach(lambda: course.moments.append(moment(atoms, motion, timestep)), interval=10)
        motion.run(max(20, round(1000 * picoseconds / timestep)))
        drift = course.drift()
        assert drift is not None
        note = f"{picoseconds} ps of {atoms.get_chemical_formula()}, {timestep} fs"
        limit = DRIFT if self.conservative else None
        return [Check("drift at constant energy", abs(drift), "meV/atom/ps", limit, note)]

    # ---- common ----

    def _results(self, atoms: Sequence[Atoms]) -> list[Results]:
        """With the number of `atoms`; energies without those of the free atoms, which hide small errors."""
        references = self.potential.scale.element_references.cpu().numpy()
        found = evaluate_batch(self.potential, [self._placed(frame) for frame in atoms])
        return [
            result | {"energy": result["energy"] - references[frame.numbers].sum(), "atoms": len(frame)}
            for frame, result in zip(atoms, found, strict=True)
        ]

    def _placed(self, atoms: Atoms) -> Atoms:
        """In a wide cell, where the potential takes all structures for periodic."""
        if not self.use_pbc or atoms.pbc.any():
            return atoms
        boxed = atoms.copy()
        boxed.center(vacuum=FAR)
        return boxed

    def _largest(self) -> float:
        return max(float(np.abs(result["forces"]).max()) for result in self.results)

    def _force_limit(self, holds: bool) -> float | None:
        return 1e2 * self.exact if holds else None

    def _compared(
        self,
        name: str,
        changed: Sequence[Atoms],
        expected: Callable[[int, np.ndarray], np.ndarray],
        energy_holds: bool = True,
        forces_hold: bool = True,
    ) -> list[Check]:
        """Changed structures against the results of the unchanged ones, their forces as `expected`."""
        wanted = [
            result | ({"forces": expected(i, result["forces"])} if self.forces else {})
            for i, result in enumerate(self.results)
        ]
        return self._errors(name, self._results(changed), wanted, energy_holds, forces_hold)

    def _errors(
        self,
        name: str,
        found: Sequence[Results],
        wanted: Sequence[Results],
        energy_holds: bool,
        forces_hold: bool,
    ) -> list[Check]:
        pairs = list(zip(found, wanted, strict=True))
        energy = max(abs(a["energy"] - b["energy"]) / a["atoms"] for a, b in pairs)
        checks = [Check(f"{name}: energy", energy, "eV/atom", self.exact if energy_holds else None)]
        if self.forces:
            force = max(float(np.abs(a["forces"] - b["forces"]).max()) for a, b in pairs)
            note = "" if forces_hold else f"forces are up to {self._largest():.2g} eV/Å"
            checks.append(Check(f"{name}: forces", force, "eV/Å", self._force_limit(forces_hold), note))
        return checks

    def _difference(self, atoms: Atoms, change: Callable[[Atoms, float], None]) -> float:
        """Central difference of fourth order of the energy."""
        images = []
        for by in (-2 * MOVE, -MOVE, MOVE, 2 * MOVE):
            image = atoms.copy()
            change(image, by)
            images.append(image)
        a, b, c, d = (result["energy"] for result in self._results(images))
        return (a - 8 * b + 8 * c - d) / (12 * MOVE)

    def _slope_limit(self) -> float | None:
        return SLOPES if self.conservative and self.exact <= SLOPES else None


# ---- structures --------------------------------------------------------------------------------------------


def own_structures(potential: Potential) -> list[Atoms]:
    """A molecule and a crystal, rattled, of elements that the potential knows."""
    from ase import Atoms
    from ase.build import molecule

    known = potential.elements or frozenset(range(1, potential.max_atomic_number + 1))
    ethanol = molecule("CH3CH2OH")
    found = []
    if known >= set(ethanol.numbers.tolist()):
        found.append(ethanol)
    number = 29 if 29 in known else max(known)
    cube = [(0, 0, 0), (0, 0.5, 0.5), (0.5, 0, 0.5), (0.5, 0.5, 0)]
    crystal = Atoms(numbers=[number] * 4, scaled_positions=cube, cell=[_edge(number)] * 3, pbc=True)
    found.append(crystal.repeat((2, 2, 1)))
    for i, atoms in enumerate(found):
        atoms.rattle(0.08, seed=i)
    return found


def small_crystal(number: int, longest: float) -> Atoms:
    """Two atoms in a skewed cell whose edges are far below the cutoff."""
    from ase import Atoms

    edge = min(_edge(number), longest)
    cell = edge * np.array([[1.0, 0.05, 0.0], [0.1, 1.05, 0.02], [0.0, 0.15, 1.1]])
    return Atoms(numbers=[number] * 2, scaled_positions=[(0, 0, 0), (0.52, 0.47, 0.51)], cell=cell, pbc=True)


def cut_out(crystal: Atoms) -> Atoms:
    """The first atom of a crystal and up to 19 near it, without periodicity."""
    near = np.argsort(crystal.get_distances(0, range(len(crystal))))[:20]
    found = crystal[near]
    found.set_constraint()
    found.pbc = False
    found.cell = None
    return found


def leaving(molecule: Atoms, distance: float) -> Atoms:
    """A molecule and an atom like its first, `distance` Å outside of its farthest in some direction."""
    from ase import Atoms

    out = np.array([0.6, 0.48, 0.64])
    far = int((molecule.positions @ out).argmax())
    place = molecule.positions[far] + distance * out
    return molecule + Atoms(numbers=molecule.numbers[:1], positions=[place])


def _edge(number: int) -> float:
    """Å, of a cubic cell of four atoms in which bonds are about as long as two covalent radii."""
    from ase.data import covalent_radii

    return 1.42 * 2 * max(float(covalent_radii[number]), 0.7)


def _push(atoms: Atoms, atom: int, axis: int, by: float) -> None:
    atoms.positions[atom, axis] += by


def _strain(atoms: Atoms, i: int, j: int, by: float) -> None:
    change = np.eye(3)
    change[i, j] += by / 2
    change[j, i] += by / 2
    atoms.set_cell(atoms.cell.array @ change, scale_atoms=True)


# ---- what is shown -----------------------------------------------------------------------------------------


def _table(checks: Sequence[Check]) -> Table:
    """Those that must hold with their limit; the others only with what was measured."""
    table = Table("check", title="Physics", title_justify="left")
    for heading in ("measured", "limit", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in checks:
        mark = "" if found.limit is None else "[green]holds[/]" if found.passed else "[bold red]FAILS[/]"
        limit = "" if found.limit is None else f"{found.limit:.0e}"
        name = f"{found.name}\n[dim]{found.note}[/]" if found.note else found.name
        table.add_row(name, f"{found.value:.1e} {found.unit}", limit, mark)
    return table


def _write(checks: Sequence[Check], path: Path) -> Path:
    if path.suffix != ".csv":
        raise ConfigError(f"output={path}: the suffix must be .csv.")
    with atomic_write(path, "w") as file:
        table = csv.writer(file)
        table.writerow(("check", "value", "unit", "limit", "passed", "note"))
        for found in checks:
            limit = "" if found.limit is None else found.limit
            table.writerow((found.name, found.value, found.unit, limit, found.passed, found.note))
    return path
