"""What a potential says of configurations given as ASE's `Atoms`, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from domains.atoms.frames import averaged
from domains.atoms.graph.pairs import candidate_pairs
from domains.atoms.models.potential import Potential
from domains.atoms.references import symbol
from domains.atoms.structures import Structures
from zoo.errors import CheckpointError, ConfigError, DataError, require

if TYPE_CHECKING:
    from ase import Atoms

DTYPES = {"float32": torch.float32, "float64": torch.float64}

Results = dict[str, Any]
"""By ASE's names: `energy`, `free_energy` in eV, `forces (N, 3)` in eV/Å, `stress (6,)` in eV/Å^3 and Voigt's
order xx, yy, zz, yz, xz, xy; only what the potential predicts, and stress only where there is a volume."""


def as_potential(
    model: nn.Module, facts: Mapping[str, Any], orientations: str | int | None = None
) -> Potential:
    """A loaded model that knows which elements were in its training, as far as its checkpoint says so.

    Args:
        orientations: average over these, see `frames.averaged`.

    Raises:
        CheckpointError: it is no potential.
        ConfigError: orientations that cannot be.
    """
    if not isinstance(model, Potential):
        raise CheckpointError(f"The weights are of a {type(model).__name__}: no interatomic potential.")
    seen = facts.get("mean_energies")
    if seen:
        numbers = require("ase.data", "atoms").atomic_numbers
        model.elements = frozenset(numbers[name] for name in seen)
    return averaged(model, orientations)


def evaluate_batch(
    potential: Potential,
    atoms: Sequence[Atoms],
    *,
    max_atoms: int = 500,
    names: Sequence[str] | None = None,
    step: Callable[[int], None] | None = None,
) -> list[Results]:
    """Results of many configurations, periodic or not, with up to `max_atoms` atoms in one pass.

    Configurations of about the same size share a pass; a larger one than `max_atoms` goes alone.

    Args:
        potential: on its device, in its precision; it should be in eval mode.
        atoms: total charge and multiplicity in `info["charge"]` and `info["spin"]`.
        names: of the configurations, for messages.
        step: called after each pass with the number of configurations it had.

    Returns:
        In the order given.

    Raises:
        DataError: a configuration that the potential cannot take, by its place in the list; a result that is
            not finite.
    """
    if max_atoms < 1:
        raise ConfigError(f"max_atoms={max_atoms}: at least 1.")
    names = names or [f"Configuration {i}" for i in range(len(atoms))]
    results: list[Results] = [{} for _ in atoms]
    for chosen in passes([len(frame) for frame in atoms], max_atoms):
        parts = [prepared(atoms[i], potential, names[i]) for i in chosen]
        batch = beside(Structures.concat(parts), potential)
        with torch.no_grad():
            found = results_of(potential.evaluate(batch), batch)
        for i, result in zip(chosen, found, strict=True):
            check_finite(result, names[i])
            results[i] = result
        if step:
            step(len(chosen))
    return results


def passes(sizes: Sequence[int], max_atoms: int) -> Iterator[list[int]]:
    """Indices of configurations that go through together, the smallest first."""
    chosen: list[int] = []
    count = 0
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        if chosen and count + sizes[i] > max_atoms:
            yield chosen
            chosen, count = [], 0
        chosen.append(i)
        count += sizes[i]
    if chosen:
        yield chosen


def prepared(atoms: Atoms, potential: Potential, name: str, skin: float = 0.0) -> Structures:
    """One structure with its pairs, in float64 on the CPU.

    Args:
        name: of the configuration, for messages.
        skin: Å that the pairs reach farther than the potential needs.

    Raises:
        DataError: atoms on each other, an unknown element, whatever `Structures.check` refuses.
    """
    try:
        structures = Structures.from_ase([atoms], torch.float64)
        potential.check_elements(structures)
        _check_trained(structures, potential)
        structures.pairs = candidate_pairs(structures, potential.cutoff + potential.margin + skin)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    return structures


def _check_trained(structures: Structures, potential: Potential) -> None:
    if potential.elements is None:
        return
    for atom, number in enumerate(structures.atomic_numbers.tolist()):
        if number not in potential.elements:
            known = ", ".join(symbol(number) for number in sorted(potential.elements))
            raise DataError(f"{structures.place(atom)}: no such element was in training. Known: {known}.")


def beside(structures: Structures, potential: Potential) -> Structures:
    """Structures on the device of a potential, in its precision."""
    weight = next(potential.parameters())
    return structures.to(weight.device, weight.dtype)


def results_of(outputs: dict[str, Tensor], structures: Structures) -> list[Results]:
    """Outputs of `Potential.evaluate` for a batch, by structure, as ASE wants them."""
    arrays = {name: value.detach().double().cpu().numpy() for name, value in outputs.items()}
    ends = np.cumsum(structures.natoms.tolist())[:-1]
    found: list[Results] = [{"energy": float(e), "free_energy": float(e)} for e in arrays["energy"]]
    if "forces" in arrays:
        for result, forces in zip(found, np.split(arrays["forces"], ends), strict=True):
            result["forces"] = forces
    for result, stress in zip(found, arrays.get("stress", ())):  # noqa: B905  (of none, or of all)
        if not np.isnan(stress).all():
            result["stress"] = voigt(stress)
    return found


def voigt(stress: np.ndarray) -> np.ndarray:
    """`(3, 3)` -> `(6,)` in ASE's order xx, yy, zz, yz, xz, xy."""
    symmetric = (stress + stress.T) / 2
    return symmetric[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def check_finite(result: Results, name: str) -> None:
    """A DataError where a potential lost its way."""
    for quantity, value in result.items():
        if not np.isfinite(value).all():
            raise DataError(
                f"{name}: the {quantity} is not finite. The configuration lies far outside of what the "
                "potential was trained on, or its weights are broken."
            )
