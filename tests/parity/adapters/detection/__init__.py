"""Detection and pose against their reference programs; one module per family."""

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
    """What the zoo computes for a fixture, by `ADAPTERS` of the first word of its model."""
    adapters: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        adapters |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "ADAPTERS", {})
    family = fixture.model.split()[0]
    if family not in adapters:
        raise NoAdapter(f"{fixture.model} is not built yet")
    return adapters[family](fixture)
