"""`zoo bench suite=superres`: what is timed is the same function."""

from __future__ import annotations

import pytest
import torch

from domains.superres.bench import PEERS, SUITE, inference, training
from zoo.bench.compare import relative_difference
from zoo.bench.suite import SUITES
from zoo.registry import load_object

CPU = torch.device("cpu")


def test_the_suite_is_known_by_name() -> None:
    assert load_object(SUITES["superres"]) is SUITE
    assert len({case.name for case in SUITE.cases}) == len(SUITE.cases) == 4 * len(PEERS)


@pytest.mark.parametrize("name", PEERS)
def test_pictures_of_model_and_plain_layout_agree(name: str) -> None:
    case = inference(name, 31, 29)
    job = case.build(CPU)
    assert job.ours_result().shape == (1, 3, 4 * 29, 4 * 31)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


@pytest.mark.parametrize("name", PEERS)
def test_training_steps_of_model_and_plain_layout_agree(name: str) -> None:
    case = training(name, 1)
    job = case.build(CPU)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance
