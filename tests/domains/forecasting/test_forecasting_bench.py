"""`zoo bench suite=forecasting`: what is timed is the same function."""

from __future__ import annotations

import pytest
import torch

from domains.forecasting.bench import SUITE, contestants, over_series, predicting
from zoo.bench.compare import relative_difference
from zoo.bench.suite import SUITES
from zoo.errors import MissingExtra
from zoo.registry import load_object

CPU = torch.device("cpu")


def test_the_suite_is_known_by_name() -> None:
    assert load_object(SUITES["forecasting"]) is SUITE
    assert len({case.name for case in SUITE.cases}) == len(SUITE.cases)


@pytest.mark.parametrize("form", ["", "bfloat16"])
def test_both_contestants_forecast_the_same(form: str) -> None:
    pytest.importorskip("chronos")
    case = predicting("chronos2_mini", [1, 4, 2], 64, 24, words="3 items", form=form)
    job = case.build(CPU)
    assert job.ours_result().shape == (7, 21, 24)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "chronos", None)
    contestants.cache_clear()
    with pytest.raises(MissingExtra, match="chronos"):
        contestants("chronos2_mini", CPU)


def test_growth_counts_series() -> None:
    growth = over_series("chronos2_mini", 4, 32)
    result = growth.build(8, CPU)()
    assert isinstance(result, list)
    assert [len(series) for series in result] == [4, 4]
