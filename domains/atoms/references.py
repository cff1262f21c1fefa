"""Reference energies of the elements: what is subtracted from total energies before a network learns them.

Total energies are large (-17,660 eV for a molecule of 27 atoms); float32 alone loses a millielectronvolt of
them. References are therefore fitted and subtracted in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from domains.atoms.sources import Frame, LabelReader, read_frames
from domains.atoms.survey import Survey
from zoo.errors import ConfigError, DataError, did_you_mean

ISOLATED = ("isolatedatom", "isolated_atom", "isolatedatoms", "isolated")
"""Groups that mark a free atom, in small letters."""
WAYS = ("least_squares", "isolated")


def element_references(
    choice: str | Path | Mapping[str, float],
    survey: Survey,
    free_atoms: Sequence[Frame] = (),
    reader: LabelReader | None = None,
) -> dict[int, float]:
    """Reference energy in eV by atomic number.

    Args:
        choice: `least_squares` (also called `average`); `isolated`: from `free_atoms`; a mapping
            from symbols to energies; a file: YAML with such a mapping, or free atoms as `read_frames` reads.
        survey: of the training part.
        free_atoms: that the training data hold.
        reader: of the labels of such a file.

    Raises:
        ConfigError: none of these.
        DataError: no free atoms, several energies for one element, or an element of the data without energy.
    """
    if isinstance(choice, Mapping):
        references = _of_symbols(choice, "data.E0s")
    elif choice in ("least_squares", "average"):
        return least_squares(survey)
    elif choice == "isolated":
        references = isolated(free_atoms, "The training data")
    else:
        references = _of_file(Path(choice), reader)
    require_elements(references, survey, str(choice) if not isinstance(choice, Mapping) else "data.E0s")
    return references


def is_isolated(frame: Frame) -> bool:
    """Whether a frame is a free atom, by its group or by being one atom without periodic axes."""
    return len(frame) == 1 and (frame.group.lower() in ISOLATED or not frame.atoms.pbc.any())


def isolated(frames: Iterable[Frame], source: str) -> dict[int, float]:
    """The energies of free atoms.

    Raises:
        DataError: there are none, or one element has two energies.
    """
    found: dict[int, float] = {}
    for frame in frames:
        number = int(frame.atoms.numbers[0])
        if abs(found.setdefault(number, frame.energy) - frame.energy) > 1e-3:
            raise DataError(
                f"{frame.origin}: the free atom {symbol(number)} has {frame.energy:.4f} eV here and "
                f"{found[number]:.4f} eV before."
            )
    if not found:
        raise DataError(
            f"{source} has no free atoms (frames of one atom, config_type=IsolatedAtom). "
            "Set data.E0s=FILE with them, or data.E0s=least_squares."
        )
    return found


def least_squares(survey: Survey) -> dict[int, float]:
    """Energies per element that explain the total energies best, in float64.

    Elements that only occur in fixed proportions, as in one molecule, share what is theirs together: the
    solution of least norm. Absent elements have no reference.

    Raises:
        DataError: no frame has an energy.
    """
    known = np.isfinite(survey.energies)
    if not known.any():
        raise DataError("There is no frame with an energy to fit element references to.")
    numbers = survey.numbers
    counts = survey.counts[known][:, numbers].astype(np.float64)
    solution, *_ = np.linalg.lstsq(counts, survey.energies[known], rcond=None)
    return dict(zip(numbers, solution.tolist(), strict=True))


def reference_energies(references: Mapping[int, float], survey: Survey) -> np.ndarray:
    """`(F,)` float64: the sum of the references over the atoms of each frame.

    Raises:
        DataError: an element has no reference.
    """
    require_elements(references, survey, "the references")
    numbers = survey.numbers
    return survey.counts[:, numbers] @ np.array([references[number] for number in numbers], dtype=np.float64)


def require_elements(references: Mapping[int, float], survey: Survey, source: str) -> None:
    """Refuse frames with an element that has no reference.

    Raises:
        DataError: names the element and the first frame that has it.
    """
    missing = [number for number in survey.numbers if number not in references]
    if missing:
        first = int(np.flatnonzero(survey.counts[:, missing].any(1))[0])
        known = ", ".join(symbol(number) for number in sorted(references))
        raise DataError(
            f"{survey.frames[first].origin} has {', '.join(map(symbol, missing))}, for which there is no "
            f"reference energy in {source} (it has {known}). Add it, or set data.E0s=least_squares."
        )


def symbol(number: int) -> str:
    """`Cu` of 29."""
    from ase.data import chemical_symbols

    return chemical_symbols[number] if 0 <= number < len(chemical_symbols) else str(number)


def by_symbol(references: Mapping[int, float]) -> dict[str, float]:
    """With symbols for keys, as they are stored and shown."""
    return {symbol(number): float(energy) for number, energy in sorted(references.items())}


def _of_symbols(given: Mapping[Any, Any], source: str) -> dict[int, float]:
    from ase.data import atomic_numbers

    references = {}
    for name, energy in given.items():
        if str(name).isdigit():
            number = int(name)
        elif name in atomic_numbers:
            number = atomic_numbers[name]
        else:
            raise ConfigError(f"{source}: {name!r} is no element.{did_you_mean(str(name), atomic_numbers)}")
        if isinstance(energy, bool) or not isinstance(energy, int | float) or not np.isfinite(energy):
            raise ConfigError(f"{source}: the energy of {name} is a number in eV, not {energy!r}.")
        references[number] = float(energy)
    return references


def _of_file(path: Path, reader: LabelReader | None) -> dict[int, float]:
    if not path.is_file():
        raise ConfigError(
            f"data.E0s={path} is neither a file nor one of {', '.join(WAYS)}.{did_you_mean(str(path), WAYS)}"
        )
    if path.suffix in (".yaml", ".yml"):
        from omegaconf import OmegaConf

        content = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(content, dict):
            raise DataError(f"{path} holds no mapping from symbols to energies.")
        return _of_symbols(content, str(path))
    return isolated([frame for frame in read_frames(path, reader) if len(frame) == 1], str(path))
