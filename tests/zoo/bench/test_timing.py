"""Interleaved timing, ratios and fitted slopes on calls whose cost is known."""

from __future__ import annotations

import time

import pytest
import torch

from zoo.bench.report import slope
from zoo.bench.timing import Timing, interleave, pinned, ratio


def test_rounds_are_interleaved_with_rotating_order_and_warmup_left_out() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = interleave(calls, repeats=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(t.seconds) for t in timings.values()] == [2, 2]


def test_a_wait_is_measured_by_the_wall_clock_on_several_threads_only() -> None:
    calls = {"wait": lambda: time.sleep(0.02)}
    with pinned(2):
        assert interleave(calls, repeats=3)["wait"].median >= 0.02
    with pinned(1):
        assert interleave(calls, repeats=3)["wait"].median < 0.01


def test_median_and_quartiles() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)


def test_ratio_and_its_interval_hold_the_true_factor() -> None:
    ours = Timing(tuple(1 + 0.01 * i for i in range(-10, 11)))
    peer = Timing(tuple(3 * s for s in ours.seconds))
    found = ratio(peer, ours)
    assert found.value == pytest.approx(3)
    assert found.low == pytest.approx(3)
    assert found.high == pytest.approx(3)


def test_a_noisy_ratio_has_an_interval_around_it() -> None:
    draw = torch.Generator().manual_seed(1)
    ours, peer = (Timing(tuple((1 + 0.2 * torch.rand(15, generator=draw)).tolist())) for _ in range(2))
    found = ratio(peer, ours)
    assert found.low < found.value < found.high


def test_slope_is_the_exponent_of_a_power_law() -> None:
    sizes = [100, 200, 400, 800]
    assert slope(sizes, [7 * n**1.5 for n in sizes]) == pytest.approx(1.5)


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), pinned(before + 1):
        _ = 1 // (torch.get_num_threads() - before - 1)
    assert torch.get_num_threads() == before
