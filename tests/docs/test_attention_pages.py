"""The pages on the attention layers: their examples run, their links lead somewhere, no layer is left out."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from zoo.attention.layers import LAYERS

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "attention"
PAGES = sorted(FOLDER.glob("*.md"))
COLUMNS = {
    "two-way": "bidirectional",
    "causal": "causal",
    "cross": "cross",
    "padding": "padding",
    "packed": "packed",
    "cache": "cache",
    "any N": "any_length",
    "row alone": "batch_invariant",
    "maps": "maps",
}
HEAD = f"| layer | {' | '.join(COLUMNS)} | paper |"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def row(name: str) -> str:
    """The line of a layer in the table of its page."""
    layer = LAYERS[name]
    marks = ("x" if getattr(layer.supports, field) else " " for field in COLUMNS.values())
    return f"| `{name}` | {' | '.join(marks)} | [{layer.paper.rpartition('/')[2]}]({layer.paper}) |"


def tabled(text: str) -> list[str]:
    """The lines below the heads of tables of what layers support."""
    return [line for part in text.split(HEAD)[1:] for line in part.partition("\n\n")[0].splitlines()[2:]]


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that draws the pictures."""
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("draw")


@every_page
def test_examples_run(page: Path) -> None:
    blocks = re.findall(r"^```python\n(>>>.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    example = doctest.DocTestParser().get_doctest("".join(blocks), {}, page.name, str(page), 0)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert not result.failed, "".join(report)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_layer_stands_in_one_table_as_it_is() -> None:
    found = sorted(line for page in PAGES for line in tabled(page.read_text()))
    wanted = sorted(row(name) for name in LAYERS)
    assert found == wanted, "the tables should hold\n" + "\n".join(sorted({*wanted} - {*found}))


def test_every_layer_stands_in_the_index() -> None:
    index = (FOLDER / "README.md").read_text()
    assert [name for name in LAYERS if f"`{name}`" not in index] == []


@every_page
def test_every_page_with_layers_has_an_example_and_a_picture(page: Path) -> None:
    text = page.read_text()
    if tabled(text):
        assert ">>> " in text
        assert "](../pictures/attention/" in text


def test_every_picture_is_drawn_from_layers_as_they_are(draw: ModuleType) -> None:
    assert sorted(draw.PICTURES) == sorted(path.stem for path in draw.FOLDER.glob("*.png"))
    for name, panels in draw.PICTURES.items():
        for panel in panels():
            assert np.isfinite(panel.weights).any(), f"{name}, {panel.title}: nothing is seen"


def test_a_picture_is_small(draw: ModuleType, tmp_path: Path) -> None:
    assert 1_000 < draw.draw("window", draw.PICTURES["window"](), tmp_path).stat().st_size < 40_000
    assert [path.name for path in draw.FOLDER.glob("*.png") if path.stat().st_size > 40_000] == []
