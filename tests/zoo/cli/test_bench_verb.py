"""`zoo bench` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zoo.bench.compare import Job
from zoo.bench.suite import SUITES, Case, Growth, Suite
from zoo.cli.bench import app
from zoo.errors import ConfigError
from zoo.registry import load_object

TINY = ["domain=traffic", "num_nodes=6", "batch_size=2", "repeats=2", "threads=1", "device=cpu", "curve=null"]


def test_bench_prints_a_table_and_stores_the_record(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(app, [*TINY, f"output={path}"])
    assert result.exit_code == 0, result.output
    assert "training step" in result.output
    stored = json.loads(path.read_text())
    assert stored["settings"]["num_nodes"] == 6
    assert [len(row["peer"]["seconds"]) for row in stored["rows"]] == [2, 2]


def test_a_suite_prints_ratios_targets_and_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(device: torch.device) -> Job:
        x = torch.ones(64, 64, device=device)
        return Job("product", lambda: x @ x, lambda: x.mm(x), lambda: x @ x, lambda: x.mm(x))

    suite = Suite(
        (
            Case("a product", product, target=1.5, items=64),
            Case("another", product),
            Case("for a GPU", product, device="cuda"),
        ),
        (Growth("copies", lambda n, device: lambda: torch.ones(n, 64), (64, 128, 256)),),
    )
    monkeypatch.setitem(SUITES, "toys", "unused")
    monkeypatch.setattr("zoo.bench.suite.load_object", lambda target: suite)
    path = tmp_path / "suite.json"
    settings = ["repeats=2", "threads=1", "device=cpu", f"output={path}"]
    result = CliRunner().invoke(app, ["domain=toys", *settings])
    assert result.exit_code == 0, result.output
    assert "asked 1.5x" in result.output
    assert result.output.count(" /s") == 2
    stored = json.loads(path.read_text())
    assert [row["name"] for row in stored["rows"]] == ["a product", "another"]
    assert stored["curves"][0]["slopes"][1] == pytest.approx(1, abs=0.01)
    result = CliRunner().invoke(app, ["suite=toys", "only=prod*", "repeats=1", f"output={path}"])
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["a product"]
    result = CliRunner().invoke(app, ["suite=toys", "only=sum"])
    assert "It has: a product; another; for a GPU; copies." in str(result.exception)


def test_primitives_are_a_suite() -> None:
    suite = load_object(SUITES["primitives"])
    assert len({case.name for case in suite.cases}) == len(suite.cases) > 5
    assert len({growth.name for growth in suite.growth}) == len(suite.growth) > 5


def test_cfg_prints_the_config_and_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*TINY, "--cfg"])
    assert result.exit_code == 0
    assert "num_nodes: 6" in result.output
    assert not list(tmp_path.iterdir())


def test_help_shows_examples() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert "Examples:" in result.output
    assert "zoo bench domain=traffic" in result.output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "Choose a domain: zoo bench domain="),
        (["domain=traffic", "repeat=3"], "Unknown key 'repeat'. Did you mean 'repeats'"),
        (["suite=primitive"], "no suite 'primitive'. Did you mean 'primitives'"),
        (["suite=primitives", "device=tpu"], "device=tpu"),
        (["domain=traffic", "model=gmann"], "no model=gmann. Did you mean 'gman'"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    result = CliRunner().invoke(app, overrides)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
