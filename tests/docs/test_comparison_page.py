"""The page of the comparison shows what is recorded, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zoo.bench.mechanisms.contestants import contestants
from zoo.bench.mechanisms.record import Record, opened
from zoo.bench.mechanisms.report import Found

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "benchmarks" / "results" / "attention.json"
PAGE = ROOT / "docs" / "attention" / "comparison.md"
LARGEST = 450_000
"""Bytes of a picture."""


@pytest.fixture(scope="module")
def record() -> Record:
    return opened(RECORD, quick=False)


def test_the_stored_tables_are_those_of_the_record(record: Record) -> None:
    assert RECORD.with_suffix(".md").read_text() == Found(record).markdown()


def test_tables_of_the_page_hold_lines_of_the_record(record: Record) -> None:
    stored = {*Found(record).markdown().splitlines()}
    tables = re.findall(r"^\| attention \|(?:.*\n)+?\n", PAGE.read_text(), re.MULTILINE)
    lines = [line for table in tables for line in table.strip().splitlines()]
    assert len(lines) > 50
    assert [line for line in lines if line not in stored] == []


def test_all_that_is_recorded_is_of_layers_of_the_zoo(record: Record) -> None:
    names = {contestant.name for contestant in contestants()}
    entries = (record.trained, record.costs, record.swapped, record.left_out)
    assert {name for found in entries for name, _ in found} <= names


def test_trainings_of_a_task_differ_in_the_attention_only(record: Record) -> None:
    settings: dict[str, list[object]] = {}
    for entry in record.trained.values():
        settings.setdefault(entry.task, []).append((entry.sizes, entry.budget))
    assert [task for task, found in settings.items() if found.count(found[0]) < len(found)] == []


@pytest.mark.parametrize("name", ["attention_accuracy", "attention_cost"])
def test_pictures_are_small(name: str) -> None:
    assert 10_000 < (ROOT / "docs" / "pictures" / f"{name}.png").stat().st_size < LARGEST
