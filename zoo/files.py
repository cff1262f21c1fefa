"""Files are found by folder or pattern, and appear whole or not at all: written beside, then moved."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from zoo.errors import DataError, ZooError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; move it onto `path` on success, remove it on error.

    Raises:
        ZooError: the folder cannot be written or the disk is full; a file at `path` is left as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _flush(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ZooError(
            f"Cannot write {path}: {error.strerror or error}. Nothing was changed there."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing (`"wb"` or `"w"`) that replaces `path` only once it is complete."""
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def find_files(source: str, wanted: Callable[[Path], bool]) -> list[Path]:
    """A file itself, those `wanted` in a folder with its subfolders, or those that match a glob, in order.

    Raises:
        DataError: nothing is there.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and wanted(file))
    else:
        found = sorted(Path(file) for file in glob.glob(source, recursive=True) if Path(file).is_file())
    if not found:
        nowhere = "is no file or folder, and as a pattern matches nothing"
        raise DataError(f"input={source} {'has no images' if path.is_dir() else nowhere}.")
    return found
