"""The adapters of a domain: a package with one module per family of models, each with its `ADAPTERS`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity.fixture import Fixture, NoAdapter

Result = tuple[dict[str, Tensor], dict[str, Any]]
"""Outputs, losses and gradients by name, and facts."""
Adapter = Callable[[Fixture], Result]


def adapters_of(package: str) -> dict[str, Adapter]:
    """Those of all modules of the package."""
    adapters: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        adapters |= getattr(importlib.import_module(f"{package}.{module.name}"), "ADAPTERS", {})
    return adapters


def run_listed(package: str, name: str, fixture: Fixture) -> Result:
    """What the zoo computes for a fixture, by the adapter of this name."""
    adapters = adapters_of(package)
    if name not in adapters:
        raise NoAdapter(f"{fixture.model} is not built yet")
    return adapters[name](fixture)
