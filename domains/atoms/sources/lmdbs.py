"""LMDB files: S2EF of the Open Catalyst data (pickled graphs) and aselmdb (rows of ASE databases).

Frames are read when they are asked for, in loader processes, too: the files can be larger than memory.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from domains.atoms.sources.ase_files import row_values
from domains.atoms.sources.frames import Frame, LabelReader
from domains.atoms.sources.pickles import read_graph
from zoo.errors import DataError, require

if TYPE_CHECKING:
    from ase import Atoms

SUFFIXES = (".lmdb", ".aselmdb")
BOOKKEEPING = (b"length", b"nextid", b"metadata", b"deleted_ids")
GRAPH_GEOMETRY = ("pos", "atomic_numbers", "cell", "pbc", "natoms", "fixed", "tags", "edge_index")


class LmdbFrames(Sequence[Frame]):
    """The frames of one or several files, in the order of their numbers.

    Args:
        paths: `.lmdb` and `.aselmdb` files.
        reader: how labels are called; decides by the first frame.

    Raises:
        DataError: a file is empty, cut off, or no LMDB; labels are missing.
        MissingExtra: lmdb is not installed.
    """

    def __init__(self, paths: Sequence[Path], reader: LabelReader) -> None:
        require("lmdb", "atoms")
        self.paths, self.reader = list(paths), reader
        self._open: dict[Path, Any] = {}
        self.keys = {path: self._keys_of(path) for path in self.paths}
        self.ends = list(accumulate(len(self.keys[path]) for path in self.paths))
        reader.choose([self._raw(0)[1]], str(self.paths[0]))

    def __len__(self) -> int:
        return self.ends[-1]

    @overload
    def __getitem__(self, index: int) -> Frame: ...
    @overload
    def __getitem__(self, index: slice) -> list[Frame]: ...
    def __getitem__(self, index: int | slice) -> Frame | list[Frame]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        atoms, values, origin = self._raw(index % len(self))
        return self.reader.frame(atoms, values, origin)

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay with their process."""
        return self.__dict__ | {"_open": {}}

    def _raw(self, index: int) -> tuple[Atoms, dict[str, Any], str]:
        place = bisect_right(self.ends, index)
        path = self.paths[place]
        row = index - (self.ends[place - 1] if place else 0)
        origin = f"{path}, frame {row}"
        with self._transaction(path) as transaction:
            content = transaction.get(self.keys[path][row])
        if content is None:
            raise DataError(f"{origin} is not there: the file is not whole.")
        atoms, values = _row(content, origin) if _is_row(content) else _graph(content, origin)
        return atoms, values, origin

    def _transaction(self, path: Path) -> Any:
        import lmdb

        if path not in self._open:
            try:
                opened = lmdb.open(
                    str(path), subdir=False, readonly=True, lock=False, readahead=False, max_readers=1
                )
            except lmdb.Error as error:
                raise DataError(f"{path} is no whole LMDB file: {error}") from None
            # Pages beyond the end of a file that was cut off would end the process, not raise.
            needed = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
            if path.stat().st_size < needed:
                raise DataError(f"{path} is cut off: it has {path.stat().st_size} bytes of {needed}.")
            self._open[path] = opened
        return self._open[path].begin()

    def _keys_of(self, path: Path) -> list[bytes]:
        """Numbered entries, in the order of the numbers; those an ASE database deleted are left out."""
        import lmdb

        try:
            with self._transaction(path) as transaction:
                found = [key for key in transaction.cursor().iternext(values=False) if key.isdigit()]
                length = transaction.get(b"length")
                last = transaction.get(max(found, key=int)) if found else None
        except lmdb.Error as error:
            raise DataError(f"{path} is no whole LMDB file: {error}") from None
        if not found or last is None:
            raise DataError(f"{path} holds no frame.")
        if length is not None:
            expected = _number(length, f"{path}, its length")
            if expected > len(found):
                raise DataError(f"{path} is cut off: it has {len(found)} frames of {expected}.")
        return sorted(found, key=int)


def find(path: Path) -> list[Path]:
    """The LMDB files of a folder."""
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)


def _number(content: bytes, origin: str) -> int:
    """A pickled count."""
    import io

    from domains.atoms.sources.pickles import GraphUnpickler

    try:
        return int(GraphUnpickler(io.BytesIO(content)).load())
    except Exception as error:  # a pickle that is cut off fails in many ways
        raise DataError(f"{origin} cannot be read: {error}") from None


def _is_row(content: bytes) -> bool:
    """Whether an entry is compressed JSON; a pickle starts with another byte."""
    return content[:1] == b"\x78"


def _row(content: bytes, origin: str) -> tuple[Atoms, dict[str, Any]]:
    from ase.db.row import AtomsRow
    from ase.io.jsonio import decode

    try:
        row = AtomsRow(decode(zlib.decompress(content).decode()))
        return row_values(row)
    except Exception as error:  # of zlib, json or ASE
        raise DataError(f"{origin} is no row of an ASE database: {error}") from None


def _graph(content: bytes, origin: str) -> tuple[Atoms, dict[str, Any]]:
    """Atoms of `pos`, `atomic_numbers`, `cell` and `fixed`; the rest are labels.

    Without `pbc`, graphs with a cell are periodic along all axes, as in the Open Catalyst data.
    """
    from ase import Atoms
    from ase.constraints import FixAtoms

    values = {key: _array(value) for key, value in read_graph(content, origin).items() if value is not None}
    for key in ("pos", "atomic_numbers"):
        if key not in values:
            raise DataError(f"{origin} has no {key}. It has: {', '.join(sorted(values))}.")
    cell = values.get("cell")
    cell = np.zeros((3, 3)) if cell is None else np.asarray(cell, dtype=np.float64).reshape(3, 3)
    fixed = np.asarray(values.get("fixed", np.zeros(len(values["pos"])))).astype(bool)
    pbc = values.get("pbc", np.full(3, bool(cell.any())))
    atoms = Atoms(
        numbers=np.asarray(values["atomic_numbers"]).astype(int),
        positions=np.asarray(values["pos"], dtype=np.float64),
        cell=cell,
        pbc=np.asarray(pbc).reshape(-1)[:3].astype(bool),
        constraint=FixAtoms(mask=fixed) if fixed.any() else None,
    )
    return atoms, {key: value for key, value in values.items() if key not in GRAPH_GEOMETRY}


def _array(value: Any) -> Any:
    import torch

    return value.numpy() if isinstance(value, torch.Tensor) else value
