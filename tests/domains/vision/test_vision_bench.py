"""`zoo bench suite=vision`: what is timed is the same function."""

from __future__ import annotations

import pytest
import torch

from domains.vision.bench import PEERS, SUITE
from zoo.bench.compare import relative_difference
from zoo.bench.suite import SUITES
from zoo.registry import load_object


def test_the_suite_is_known_by_name() -> None:
    assert load_object(SUITES["vision"]) is SUITE
    assert len({case.name for case in SUITE.cases}) == len(SUITE.cases)


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("kind", ["batch 1, plain", "training"])
def test_model_and_plain_layout_agree(name: str, kind: str) -> None:
    cases = [case for case in SUITE.cases if case.name.startswith(name) and kind in case.name]
    job = cases[0].build(torch.device("cpu"))
    assert relative_difference(job.ours_result(), job.peer_result()) < cases[0].tolerance


def test_half_precision_is_for_gpus_and_agrees_with_the_plain_layout() -> None:
    case = SUITE.only("lwganet_l0 fused bfloat16, batch 1,").cases[0]
    assert case.device == "cuda"
    job = case.build(torch.device("cpu"))
    assert 1e-4 < relative_difference(job.ours_result(), job.peer_result()) < case.tolerance


def test_a_peer_of_timm_is_timed_but_not_compared() -> None:
    case = SUITE.only("timm's swin_tiny").cases[0]
    assert case.target == pytest.approx(1.54, abs=0.01)
    job = case.build(torch.device("cpu"))
    theirs = job.peer()
    assert isinstance(theirs, torch.Tensor)
    assert relative_difference(job.ours_result(), job.peer_result()) < case.tolerance
    assert relative_difference(job.ours_result(), theirs) > 0.1
