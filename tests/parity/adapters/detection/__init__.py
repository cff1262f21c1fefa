"""Detection and pose against their reference programs; one module per family."""

from __future__ import annotations

from parity.families import Result, run_listed
from parity.fixture import Fixture


def run(fixture: Fixture) -> Result:
    """What the zoo computes for a fixture, by `ADAPTERS` of the first word of its model."""
    return run_listed(__name__, fixture.model.split()[0], fixture)
