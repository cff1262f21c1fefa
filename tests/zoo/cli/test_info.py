"""`zoo list` and `zoo info`."""

from __future__ import annotations

from dataclasses import fields

import pytest
from typer.testing import CliRunner

from zoo.attention.layers import LAYERS, Supports
from zoo.cli import info, list
from zoo.cli.console import console
from zoo.errors import UnknownName

pytestmark = pytest.mark.usefixtures("toys")


def _run(app, *arguments: str) -> str:
    console.width = 200
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def _cells(output: str) -> list:
    return [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in output.splitlines()
        if line.startswith("│")
    ]


def test_list_shows_a_row_per_model() -> None:
    assert _cells(_run(list.app, "toys/*")) == [
        ["toy_deep", "toys", "100", "re-implementation", "Toy et al. 2026"],
        ["toy_net", "toys", "-", "re-implementation", "Toy et al. 2026"],
    ]


def test_list_without_a_match_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"No model matches 'toy_dep'\. Did you mean 'toy_deep'"):
        _run(list.app, "toy_dep")


def test_info_shows_card_arguments_and_licence() -> None:
    rows = {row[0]: row[1:] for row in _cells(_run(info.app, "toys/toy_deep"))}
    assert rows["summary"] == ["summary of toy_deep"]
    assert rows["licence of it"] == ["CC-BY-NC 4.0: no commercial use"]
    assert rows["parameters"] == ["100"]
    assert rows["depth"] == ["int", "5", "number of layers; unused."]
    assert rows["scale"] == ["float | list[float]", "1.0", "stored only."]


def test_list_attention_shows_what_each_layer_says_it_can() -> None:
    rows = [line.split() for line in _run(list.app, "attention").splitlines()]
    found = {name: marks for name, *marks in filter(None, rows) if "x" in marks}
    for name, layer in LAYERS.items():
        can = [getattr(layer.supports, prop) for prop in list.HEADINGS]
        assert found[name].count("x") == sum(can), name
        assert found[name][-1] in layer.paper


def test_every_property_of_a_layer_has_a_heading() -> None:
    assert [*list.HEADINGS] == [field.name for field in fields(Supports)]


def test_info_shows_a_layer_and_its_arguments() -> None:
    rows = {row[0]: row[1:] for row in _cells(_run(info.app, "attention/gated"))}
    assert rows["supports"][0].startswith("bidirectional, causal, cross")
    assert rows["num_heads"][:2] == ["int", "required"]
    assert rows["num_kv_heads"][1:] == ["None", "Hk, a divisor of H; by default H."]  # of its base class
    with pytest.raises(UnknownName, match="Did you mean 'gated'"):
        _run(info.app, "attention/gatde")


def test_info_marks_required_arguments() -> None:
    rows = {row[0]: row[1:] for row in _cells(_run(info.app, "toy_net"))}
    assert rows["width"] == ["int", "required", "channels, of every layer."]


@pytest.mark.parametrize("app", [list.app, info.app])
def test_help_shows_examples(app) -> None:
    assert "Examples:" in _run(app, "--help")
