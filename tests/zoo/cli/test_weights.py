"""`zoo weights`: list, fetch, verify, convert."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from zoo.cli.console import console
from zoo.cli.weights import app
from zoo.create import create_model
from zoo.errors import CheckpointError, ConfigError
from zoo.weights import cards
from zoo.weights.checkpoint import load_model, read_state_dict, save_model, save_state_dict
from zoo.weights.exchange import from_official, to_official

pytestmark = pytest.mark.usefixtures("toys")


def _run(*arguments: str) -> str:
    console.width = 200
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A card `toy` with its file in a local mirror; returns that file."""
    file = tmp_path / "mirror" / "toy" / "toy.npz"
    file.parent.mkdir(parents=True)
    save_state_dict(to_official(create_model("toy_net", width=3)), file)
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "toy.yaml").write_text(
        "models: [toys/toy_net]\nurl: http://origin.invalid/toy.npz\nfile: toy.npz\nlicence: CC-BY-NC 4.0\n"
        f"format: toy npz\nsize: {file.stat().st_size}\n"
        f"sha256: {hashlib.sha256(file.read_bytes()).hexdigest()}\n"
        "config: {scale: 2.0}\n"
    )
    monkeypatch.setattr(cards, "cards_dir", lambda: tmp_path / "cards")
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    return file


def test_fetch_then_list_shows_the_file_as_here(published: Path) -> None:
    assert _run("list").splitlines()[-2].rstrip(" │").endswith("no")
    place = Path(_run("fetch", "toy").strip())
    assert place.read_bytes() == published.read_bytes()
    output = _run("list")
    assert output.splitlines()[-2].rstrip(" │").endswith("yes")
    assert "CC-BY-NC 4.0: no commercial use" in output


def test_verify_accepts_a_good_file_and_names_a_damaged_one(published: Path) -> None:
    place = Path(_run("fetch", "toy").strip())
    assert "as its card says" in _run("verify")
    place.write_bytes(place.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=f"Delete and fetch again: {place}"):
        _run("verify", "toy")


def test_verify_of_a_file_that_is_not_here_says_how_to_get_it(published: Path) -> None:
    with pytest.raises(CheckpointError, match="zoo weights fetch toy"):
        _run("verify", "toy")


def test_convert_there_and_back_keeps_every_tensor(published: Path, tmp_path: Path) -> None:
    _run("convert", str(published), "model=toy_net", "scale=0.25", "output=ours.safetensors")
    assert load_model("ours.safetensors")[0].scale == 0.25
    _run("convert", "ours.safetensors", "to=official", "output=back.pth")
    before, after = read_state_dict(published), read_state_dict("back.pth")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_convert_by_card_knows_model_and_config(published: Path) -> None:
    output = _run("convert", "toy")
    assert "toy.safetensors: 5 tensors of toys/toy_net" in output
    rows = [line.split("│")[1:-1] for line in output.splitlines() if line.startswith("│")]
    assert ["left at init", "1", "graph"] in [[cell.strip() for cell in row] for row in rows]
    model, _ = load_model("toy.safetensors")
    assert model.scale == 2.0
    assert torch.equal(model.layers[0].bias, from_official("toy_net", published).layers[0].bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["to=offical", "model=toy_net"], r"to=offical is none of.*Did you mean 'official'"),
        (["model"], "'model' is not of the form key=value"),
        ([], r"Which model is file\.npz\? Say model=NAME, one of: .*toy_net"),
        (["to=official"], "Name the official file"),
        (["to=official", "output=a.npz", "scale=1"], "not scale"),
    ],
)
def test_convert_explains_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _run("convert", "file.npz", *options)


def test_convert_of_a_foreign_checkpoint_says_so(tmp_path: Path) -> None:
    save_model(create_model("toy_net", width=2), tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match="no official checkpoint of 'toy_net'"):
        _run("convert", str(tmp_path / "ours.safetensors"), "model=toy_net")


@pytest.mark.parametrize("command", [[], ["list"], ["fetch"], ["verify"], ["convert"]])
def test_help_shows_examples(command: list[str]) -> None:
    assert "Examples:" in _run(*command, "--help")
