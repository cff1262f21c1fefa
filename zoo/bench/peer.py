"""Finds the plain peers that models are measured against."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from zoo.paths import benchmarks_dir


def load_peer(name: str) -> ModuleType:
    """The module `benchmarks/plain/NAME.py`, which is no part of the package's import tree."""
    path = benchmarks_dir() / "plain" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks.plain.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
