"""What ASE reads: extended XYZ, its own databases and trajectories, and the outputs of many programs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domains.atoms.sources.frames import Frame, LabelReader, values_of
from zoo.errors import DataError, require

if TYPE_CHECKING:
    from ase import Atoms

DATABASES = (".db", ".json")


def read(path: Path, reader: LabelReader) -> list[Frame]:
    """All frames of a file.

    Raises:
        DataError: ASE cannot read it, it holds no frame, or labels are missing; names the frame.
    """
    require("ase", "atoms")
    rows = _rows(path) if path.suffix in DATABASES else _images(path)
    found = list(rows)
    if not found:
        raise DataError(f"{path} holds no frame.")
    reader.choose([values for _, values in found], str(path))
    return [reader.frame(atoms, values, f"{path}, frame {i}") for i, (atoms, values) in enumerate(found)]


def _images(path: Path) -> Iterator[tuple[Atoms, dict[str, Any]]]:
    from ase.io import iread
    from ase.io.formats import UnknownFileTypeError

    known = "extxyz" if path.suffix in (".xyz", ".extxyz") else None
    images = iread(path, ":", format=known)
    for i in count():
        try:
            atoms = next(images)
        except StopIteration:
            return
        except UnknownFileTypeError as error:
            raise DataError(f"{path} is of no format that ASE knows: {error}") from None
        except Exception as error:  # every format of ASE raises its own
            raise DataError(f"{path}, frame {i} cannot be read: {error or type(error).__name__}") from None
        yield atoms, values_of(atoms)


def _rows(path: Path) -> Iterator[tuple[Atoms, dict[str, Any]]]:
    """Of an ASE database: key-value pairs and `data` count as labels, too."""
    from ase.db import connect

    i = 0
    try:
        for row in connect(path).select():
            yield row_values(row)
            i += 1
    except Exception as error:  # of sqlite3, json or ASE, as the file is
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}, row {i} is not of an ASE database: {error}") from None


def row_values(row: Any) -> tuple[Atoms, dict[str, Any]]:
    """Atoms and named values of a row of an ASE database."""
    atoms = row.toatoms()
    return atoms, {**row.data, **row.key_value_pairs, **values_of(atoms)}
