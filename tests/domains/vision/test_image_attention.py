"""The comparison of attention on images: a quick run from the command line, its table and its canvases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from domains.vision.compare import CONTESTANTS, canvases
from domains.vision.compare_report import Comparison, Entry
from domains.vision.sources import digits
from zoo.attention.layers import LAYERS
from zoo.bench.report import Curve, Point
from zoo.cli.bench import app
from zoo.errors import UnknownName


def test_a_quick_run_writes_record_table_and_picture(tmp_path: Path) -> None:
    path, picture = tmp_path / "found.json", tmp_path / "drawn.png"
    overrides = ["suite=image_attention", "quick=true", "threads=1", "repeats=1", "only=li*", "device=cpu"]
    result = CliRunner().invoke(app, [*overrides, f"output={path}", f"picture={picture}"])
    assert result.exit_code == 0, result.output
    stored = json.loads(path.read_text())
    (entry,) = stored["entries"]
    assert entry["name"] == "linear"
    assert [point["size"] for point in entry["curve"]["points"]] == [64, 256]
    assert 0 <= entry["accuracy"] <= 100
    assert path.with_suffix(".md").read_text().startswith("| attention | a token sees | accuracy, % |")
    assert Image.open(picture).width > 1000


def test_an_unknown_layer_names_those_there_are() -> None:
    result = CliRunner().invoke(app, ["suite=image_attention", "quick=true", "only=bilinear", "threads=1"])
    assert isinstance(result.exception, UnknownName)
    assert "bilevel" in str(result.exception)


def test_contestants_are_layers_of_the_zoo_and_none() -> None:
    assert CONTESTANTS.keys() - LAYERS.keys() == {"none"}


def test_canvases_hold_one_digit_somewhere_and_follow_the_seed() -> None:
    images, cpu = digits().parts["train"], torch.device("cpu")
    x, y = canvases(images, 20, 0, cpu)
    assert x.shape == (20, 1, 24, 24)
    assert y.tolist() == images.labels[:20].tolist()
    assert 0 <= x.min() < x.max() <= 1
    spans = [(canvas[0].sum(axis) > 0).nonzero() for canvas in x for axis in (0, 1)]
    assert all(int(span.max() - span.min()) < 12 for span in spans)
    assert len({int(span.min()) for span in spans}) > 3
    assert torch.equal(canvases(images, 20, 0, cpu)[0], x)
    assert not torch.equal(canvases(images, 20, 1, cpu)[0], x)


def entry(name: str, accuracies: tuple[float, ...], sizes: tuple[int, ...], power: int) -> Entry:
    points = tuple(Point(n, 1e-6 * n**power, 1000 * n) for n in sizes)
    return Entry(name, "all", {}, 1, accuracies, 1.0, Curve(name, points) if sizes else None)


def test_the_table_is_sorted_by_accuracy_with_growth_over_the_last_two_sizes() -> None:
    entries = (
        entry("none", (10.0,), (), 0),
        entry("slow", (40.0, 50.0), (256, 1024), 2),
        entry("fast", (60.0, 61.0), (256, 1024, 4096), 1),
    )
    _, _, *rows = Comparison({}, {}, entries).markdown().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["`fast`", "`slow`", "none"]
    assert [row[2] for row in cells] == ["60.5 ± 0.5", "45.0 ± 5.0", "10.0 ± 0.0"]
    assert [row[-1] for row in cells] == ["N^1.0, N^1.0", "N^2.0, N^1.0", ""]
    assert cells[1][-2] == ""


@pytest.mark.parametrize("sizes", [(256,), (256, 1024, 4096, 16_384)])
def test_the_picture_is_drawn_for_any_sizes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    entries = tuple(entry(name, (50.0, 60.0), sizes, 1) for name in ("a", "b", "c"))
    found = Comparison({}, {"cpu": "", "threads": 1, "torch": ""}, entries)
    found.write(tmp_path / "x.json")
    assert Image.open(tmp_path / "x.png").height > 500
