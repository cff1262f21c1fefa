"""Interatomic potentials against their reference programs; one module per family."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

from torch import Tensor

from parity.fixture import Fixture, NoAdapter

Result = tuple[dict[str, Tensor], dict[str, Any]]
Adapter = Callable[[Fixture], Result]


def run(fixture: Fixture) -> Result:
    """What the zoo computes for a fixture, by the family's `ADAPTERS[model]`."""
    adapters: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        adapters |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "ADAPTERS", {})
    if fixture.model not in adapters:
        raise NoAdapter(f"{fixture.model} is not built yet")
    return adapters[fixture.model](fixture)
