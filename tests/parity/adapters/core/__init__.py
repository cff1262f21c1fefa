"""The attention core against its reference programs; one module per family of mechanisms."""

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
    """What the zoo computes for a fixture, by the family's `ADAPTERS[model]`.

    A model that is not listed goes to the entry that its name (without `h_`) starts with, in whole words: the
    configurations of one mechanism need one entry.
    """
    adapters: dict[str, Adapter] = {}
    for module in pkgutil.iter_modules(__path__):
        adapters |= importlib.import_module(f"{__name__}.{module.name}").ADAPTERS
    words = fixture.model.removeprefix("h_").split("_")
    for count in range(len(words), 0, -1):
        if (name := "_".join(words[:count])) in adapters:
            return adapters[name](fixture)
    raise NoAdapter(f"{fixture.model} is not built yet")
