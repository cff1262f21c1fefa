"""MIGA and NCPP in `zoo bench suite=forecasting`: what is timed is the same function."""

from __future__ import annotations

import pytest
import torch

from domains.forecasting.bench import SUITE
from domains.forecasting.plain_bench import CASES, ranking, scoring
from zoo.bench.compare import relative_difference
from zoo.bench.suite import Case

CPU = torch.device("cpu")


def test_they_are_part_of_the_suite() -> None:
    assert set(CASES) <= set(SUITE.cases)


@pytest.mark.parametrize(
    ("case", "shape"), [(ranking(16, 2, 30), (2, 30)), (scoring(4, 5), (5, 1))], ids=["miga", "ncpp"]
)
def test_scores_of_model_and_plain_layout_agree(case: Case, shape: tuple[int, int]) -> None:
    job = case.build(CPU)
    assert job.ours_result().shape == shape
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


@pytest.mark.parametrize(
    "case", [ranking(16, 2, 30, train=True), scoring(4, 5, train=True)], ids=["miga", "ncpp"]
)
def test_gradients_of_model_and_plain_layout_agree(case: Case) -> None:
    job = case.build(CPU)
    assert job.ours_result() > 0
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance
