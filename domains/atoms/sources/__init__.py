"""Labelled structures out of files: extended XYZ, ASE databases and trajectories, LMDB, MPTrj."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from domains.atoms.sources import ase_files, lmdbs, mptrj
from domains.atoms.sources.frames import Frame, LabelReader
from zoo.cli.console import console
from zoo.errors import DataError, did_you_mean

__all__ = ["Frame", "LabelReader", "read_frames"]


def read_frames(path: str | Path, reader: LabelReader | None = None) -> Sequence[Frame]:
    """The frames of a file, or of a folder of LMDB files; what was left out of them is said.

    Raises:
        DataError: there is no such file, it cannot be read, is empty, or lacks labels.
    """
    path, reader = Path(path), reader or LabelReader()
    before = dict(reader.left_out)
    frames = _read(path, reader)
    for what, count in reader.left_out.items():
        if count > before.get(what, 0):
            console.print(
                f"{path}: left out {count - before.get(what, 0)} x {what}", highlight=False, soft_wrap=True
            )
    return frames


def _read(path: Path, reader: LabelReader) -> Sequence[Frame]:
    if path.is_dir():
        files = lmdbs.find(path)
        if not files:
            raise DataError(f"The folder {path} holds no .lmdb or .aselmdb file.")
        return lmdbs.LmdbFrames(files, reader)
    if not path.is_file():
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{did_you_mean(path.name, siblings)}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    if path.suffix in lmdbs.SUFFIXES:
        return lmdbs.LmdbFrames([path], reader)
    if path.suffix == ".json" and mptrj.is_mptrj(path):
        return mptrj.read(path, reader)
    return ase_files.read(path, reader)
