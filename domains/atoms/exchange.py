"""Configurations in from files of the field, and out as extended XYZ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from domains.atoms.evaluation import Results
from domains.atoms.sources import Frame, LabelReader, read_frames
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, ZooError, require
from zoo.files import atomic_path

if TYPE_CHECKING:
    from ase import Atoms

TRAJECTORY = "trajectory.extxyz"


def configurations(source: str | None, index: str | int, verb: str, **reading: Any) -> list[Frame]:
    """The frames of a file chosen by `index`, labelled or not, with all that the file says of them.

    Args:
        source: extended XYZ, an ASE database or trajectory, LMDB, CIF, POSCAR or what else ASE reads.
        index: one frame, as 0 or -1, or several as in Python: `:`, `:10`, `::5`.
        verb: for the message.
        reading: of `LabelReader`, as `keys` and `units`.

    Raises:
        ConfigError: no file was named, or an index that cannot be read.
        DataError: the file cannot be read, or has no such frame.
    """
    if not source:
        raise ConfigError(f"zoo {verb} needs structures: input=FILE (extxyz, cif, POSCAR, traj, db, ...).")
    frames = read_frames(source, LabelReader(needs_energy=False, keep_rest=True, **reading))
    chosen = range(len(frames))[_index(index)]
    if isinstance(chosen, int):
        return [frames[chosen]]
    if not chosen:
        raise DataError(f"{source} has {len(frames)} frames, none of them in index={index}.")
    return [frames[i] for i in chosen]


def _index(text: str | int) -> slice:
    try:
        parts = [int(part) if part.strip() else None for part in str(text).split(":")]
    except ValueError:
        parts = []
    if len(parts) == 1 and parts[0] is not None:
        return slice(parts[0], parts[0] + 1 or None)
    if len(parts) not in (2, 3):
        raise ConfigError(f"index={text} is no frame, as 0 or -1, nor a slice, as ':10' or '::5'.")
    return slice(*parts)


def with_results(atoms: Atoms, results: Results) -> Atoms:
    """A copy that carries these results, as if ASE had calculated them."""
    from ase.calculators.singlepoint import SinglePointCalculator

    found = atoms.copy()
    found.calc = SinglePointCalculator(found, **results)
    return found


def write_frames(path: str | Path, frames: Sequence[Atoms]) -> Path:
    """Write configurations with their results as extended XYZ, whole or not at all."""
    ase_io = require("ase.io", "atoms")
    with atomic_path(path) as part:
        ase_io.write(part, list(frames), format="extxyz")
    return Path(path)


def new_folder(path: str | Path) -> Path:
    """A folder for a trajectory and what belongs to it.

    Raises:
        ConfigError: there is a trajectory in it already.
        ZooError: it cannot be made.
    """
    folder = Path(path)
    if (folder / TRAJECTORY).exists():
        raise ConfigError(f"There is a {TRAJECTORY} in {folder} already: choose another output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZooError(f"Cannot write to {folder}: {error.strerror or error}.") from None
    return folder


def progress() -> Progress:
    """A bar that vanishes when all is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


class TrajectoryFile:
    """Extended XYZ that grows by a frame at a time: what is there stays if the program ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> TrajectoryFile:
        self._file = open(self.path, "w", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    def write(self, atoms: Atoms) -> None:
        """Append a configuration with the results of its calculator."""
        assert self._file is not None
        require("ase.io", "atoms").write(self._file, with_results(atoms, _results(atoms)), format="extxyz")
        self._file.flush()


def _results(atoms: Atoms) -> Results:
    assert atoms.calc is not None
    return dict(atoms.calc.results)
