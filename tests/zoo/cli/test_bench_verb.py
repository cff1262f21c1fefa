"""`zoo bench` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from zoo.cli.bench import app
from zoo.errors import ConfigError

TINY = ["domain=traffic", "num_nodes=6", "batch_size=2", "repeats=2", "threads=1", "device=cpu", "curve=null"]


def test_bench_prints_a_table_and_stores_the_record(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = CliRunner().invoke(app, [*TINY, f"output={path}"])
    assert result.exit_code == 0, result.output
    assert "training step" in result.output
    stored = json.loads(path.read_text())
    assert stored["settings"]["num_nodes"] == 6
    assert [len(row["peer"]["seconds"]) for row in stored["rows"]] == [2, 2]


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
        ([], "Choose a domain: zoo bench domain=traffic"),
        (["domain=traffic", "repeat=3"], "Unknown key 'repeat'. Did you mean 'repeats'"),
        (["domain=traffic", "model=gmann"], "no model=gmann. Did you mean 'gman'"),
    ],
)
def test_mistakes_are_named(overrides: list[str], message: str) -> None:
    result = CliRunner().invoke(app, overrides)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
