"""The attention core against its reference programs; one module per family of mechanisms."""

from __future__ import annotations

from parity.families import Result, adapters_of
from parity.fixture import Fixture, NoAdapter


def run(fixture: Fixture) -> Result:
    """What the zoo computes for a fixture, by the family's `ADAPTERS[model]`.

    A model that is not listed goes to the entry that its name (without `h_`) starts with, in whole words: the
    configurations of one mechanism need one entry.
    """
    adapters = adapters_of(__name__)
    words = fixture.model.removeprefix("h_").split("_")
    for count in range(len(words), 0, -1):
        if (name := "_".join(words[:count])) in adapters:
            return adapters[name](fixture)
    raise NoAdapter(f"{fixture.model} is not built yet")
