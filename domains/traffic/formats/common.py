"""What several readers share: recognising a file that was never really downloaded, and naming in a message
what a file does hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zoo.errors import DataError


def refuse_impostors(path: Path) -> None:
    """Name the usual stand-ins for a file that was not really downloaded."""
    with open(path, "rb") as file:
        head = file.read(256).lstrip().lower()
    if not head:
        raise DataError(f"{path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the data: fetch the file itself (git lfs pull).")
    if head.startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{path} is a web page, not the data: download the file itself.")


def quoted(names: Iterable[Any], most: int = 12) -> str:
    """`'a', 'b', 'c'`, cut after `most` names; `nothing` if there are none."""
    names = [str(name) for name in names]
    return (", ".join(map(repr, names[:most])) or "nothing") + (", ..." if len(names) > most else "")
