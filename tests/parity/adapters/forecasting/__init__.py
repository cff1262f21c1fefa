"""Forecasting against its reference programs; one module per family."""

from __future__ import annotations

from parity.families import Result, run_listed
from parity.fixture import Fixture


def run(fixture: Fixture) -> Result:
    """What the zoo computes for a fixture, by the family's `ADAPTERS[model]`."""
    return run_listed(__name__, fixture.model, fixture)
