"""Equality before timing, the report's tables and its JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from zoo.bench.compare import Job, compare, relative_difference, scaling
from zoo.bench.machine import machine
from zoo.bench.report import Report
from zoo.bench.suite import Case, compared
from zoo.errors import ZooError

CPU = torch.device("cpu")
X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


def _product() -> torch.Tensor:
    return X @ X


def _sum_of_products() -> torch.Tensor:
    return (X[:, :, None] * X).sum(1)


JOB = Job("product", _product, _sum_of_products, _product, _sum_of_products)


def test_compare_measures_both_and_says_how_far_their_results_are() -> None:
    row = compare(JOB, repeats=3, device=CPU)
    assert len(row.ours.seconds) == len(row.peer.seconds) == 3
    assert row.peer_bytes > 60 * row.ours_bytes
    assert row.memory < 1 / 60
    assert row.difference < 1e-5


def test_a_case_that_takes_long_is_timed_few_times_without_a_round_before() -> None:
    calls = []
    job = dataclasses.replace(JOB, peer=lambda: calls.append(1))
    case = Case("slow", lambda _device: job, rounds=2)
    row = compared(case, repeats=5, device=CPU)
    assert len(row.ours.seconds) == 2
    assert len(calls) == 3  # one of them for the memory
    assert len(compared(case, repeats=1, device=CPU).ours.seconds) == 1


def test_different_results_are_not_timed() -> None:
    timed = []
    job = dataclasses.replace(JOB, ours=lambda: timed.append(1), ours_result=lambda: X @ X * 1.01)
    with pytest.raises(ZooError, match=r"product: .* differ by 1\.0e-02 \(allowed 1e-04\)"):
        compare(job, repeats=1, device=CPU)
    assert not timed


def test_nan_is_a_difference() -> None:
    job = dataclasses.replace(JOB, ours_result=lambda: X * torch.nan)
    with pytest.raises(ZooError, match="differ by nan"):
        compare(job, repeats=1, device=CPU)


def test_relative_difference_is_relative_to_the_largest_of_the_peer() -> None:
    assert relative_difference(torch.tensor([1.0, 100.0]), torch.tensor([2.0, 100.0])) == pytest.approx(0.01)


def test_scaling_finds_the_exponent_of_memory() -> None:
    curve = scaling("square", lambda n: lambda: torch.ones(n, n), [64, 128, 256], repeats=1, device=CPU)
    slopes = curve.slopes()
    assert slopes is not None
    assert slopes[1] == pytest.approx(2, abs=0.01)


def test_report_shows_ratios_and_stores_every_round(tmp_path: Path) -> None:
    row = compare(JOB, repeats=3, device=CPU)
    curve = scaling("square", lambda n: lambda: torch.ones(n, n), [64, 128], repeats=1, device=CPU)
    report = Report("products", {"repeats": 3}, machine(CPU), (row,), (curve,), growth_name="over rows")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert f"{row.speed.value:.2f}x" in text
    assert "N^2.0" in text
    report.write(tmp_path / "new" / "bench.json")
    stored = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert stored["rows"][0]["ours"]["seconds"] == list(row.ours.seconds)
    assert stored["rows"][0]["speed"]["value"] == pytest.approx(row.speed.value)
    assert stored["curves"][0]["points"][1]["size"] == 128
    assert {"cpu", "cores", "threads", "torch", "date"} <= stored["machine"].keys()
