"""Every fixture that is found, one case each.

Fixtures lie in `$ZOO_FIXTURES/DOMAIN/NAME.json` (default: `../shared/fixtures` beside the checkout) and in
`tests/parity/fixtures`. A new file is picked up by itself; a new domain needs `adapters/DOMAIN.py`.
"""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from parity.fixture import EXTERNAL, Fixture, NoAdapter, equal, fixtures
from zoo.attention import backend


@pytest.mark.parametrize("fixture", fixtures(), ids=lambda fixture: fixture.id)
def test_parity(fixture: Fixture) -> None:
    """Every stored output, loss and gradient, at the fixture's tolerance; none may be passed over."""
    compare(fixture)


@pytest.mark.parametrize("name", ["reference", "blocked"])
@pytest.mark.parametrize("fixture", fixtures("core"), ids=lambda fixture: fixture.id)
def test_parity_of_the_core_on_other_backends(fixture: Fixture, name: str) -> None:
    with backend(name):
        compare(fixture)


def compare(fixture: Fixture) -> None:
    if importlib.util.find_spec(f"parity.adapters.{fixture.domain}") is None:
        pytest.skip(f"no adapter for domain {fixture.domain!r}")
    adapter = importlib.import_module(f"parity.adapters.{fixture.domain}")
    try:
        computed, facts = adapter.run(fixture)
    except NoAdapter as reason:
        pytest.skip(str(reason))
    expected = fixture.expected()
    stated = {name: fixture.spec[name] for name in facts if name in fixture.spec}
    assert expected or stated, "the fixture holds nothing to compare"
    absent = [f"{name}: not computed" for name in expected if name not in computed]
    wrong = [fixture.check(name, computed[name]) for name in expected if name in computed]
    wrong += [
        f"{name}: {facts[name]}, expected {value}"
        for name, value in stated.items()
        if not equal(facts[name], value)
    ]
    problems = absent + [line for line in wrong if line]
    assert not problems, "\n".join(problems)


def test_external_fixtures_are_found() -> None:
    if not EXTERNAL.is_dir():
        pytest.skip(f"no folder of further fixtures at {EXTERNAL} (set ZOO_FIXTURES)")
    assert any(EXTERNAL in fixture.path.parents for fixture in fixtures())
