"""Where the files that ship with the zoo lie, in a checkout and in an installed wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def _shipped(name: str) -> Path:
    """The folder `name`: inside the package when installed from a wheel, else at the root of the checkout."""
    inside = _PACKAGE / "_shipped" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def config_dir() -> Path:
    """The folder of the Hydra config groups."""
    return _shipped("configs")


def cards_dir() -> Path:
    """The folder of checkpoint cards."""
    return _shipped("checkpoints")


def benchmarks_dir() -> Path:
    """The folder of plain peers that `zoo bench` measures against."""
    return _shipped("benchmarks")


def data_dir() -> Path:
    """The folder of the small data sets that ship with the zoo."""
    return _shipped("data")


def cache_dir() -> Path:
    """Where downloads and simulated data are kept: `$ZOO_CACHE`, else `~/.cache/attention-zoo`."""
    return Path(os.environ.get("ZOO_CACHE") or Path.home() / ".cache" / "attention-zoo")
