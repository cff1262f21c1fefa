"""`zoo weights`: published checkpoints, and conversion between their layout and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from zoo.cli.console import console, parsed_options
from zoo.cli.info import licence_text
from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.registry import list_models
from zoo.weights.cards import WeightCard, list_cards, weight_card
from zoo.weights.checkpoint import load_model, read_checkpoint, save_model, save_state_dict
from zoo.weights.download import check_file, fetch
from zoo.weights.exchange import facts_of_file, load_official, official_wrapper, to_official, to_other

weights_app = typer.Typer(no_args_is_help=True, add_completion=False)
app = weights_app

TARGETS = ("zoo", "official", "mmdet")


@weights_app.callback()
def weights() -> None:
    """Published weights: list, fetch and verify them, convert between the official layout and ours.

    Examples:

      zoo weights list

      zoo weights fetch gpt2

      zoo weights convert GMAN.index model=gman N=325
    """


@weights_app.command("list")
def show() -> None:
    """List the checkpoint cards: what they are for, size, licence, and whether the file is here.

    Examples:

      zoo weights list
    """
    table = Table("weights", "models", "format", "size", "licence", "hash", "here")
    for name in list_cards():
        card = weight_card(name)
        table.add_row(
            name,
            ", ".join(card.models),
            card.format,
            f"{card.size / 1e6:,.1f} MB" if card.size else "?",
            licence_text(card.licence),
            "known" if card.sha256 else "unverified",
            "yes" if card.path.is_file() else "no",
        )
    console.print(table)


@weights_app.command("fetch")
def fetch_command(name: Annotated[str, typer.Argument(help="a card of `zoo weights list`")]) -> None:
    """Download a published checkpoint into the cache ($ZOO_CACHE), checked against its card.

    A broken download is resumed by the same command. $ZOO_MIRROR names a folder or base URL that holds
    NAME/FILE and stands in for every origin.

    Examples:

      zoo weights fetch gpt2

      ZOO_MIRROR=/media/usb zoo weights fetch gpt2
    """
    card = weight_card(name)
    path = fetch(card)
    note = "" if card.sha256 else " (its card has no hash: unverified)"
    console.print(f"{path}{note}", soft_wrap=True)


@weights_app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="a card; all fetched files without it")] = None,
) -> None:
    """Compare fetched files with their cards, byte for byte by hash.

    Examples:

      zoo weights verify

      zoo weights verify gpt2
    """
    cards = [weight_card(n) for n in ([name] if name else list_cards())]
    here = [card for card in cards if card.path.is_file()]
    if name and not here:
        raise CheckpointError(f"{name} is not here yet: zoo weights fetch {name}")
    problems = {card.name: _problem(card) for card in here}
    table = Table("weights", "file", "result")
    for card in here:
        good = "as its card says" if card.sha256 else "whole, but its card has no hash"
        table.add_row(card.name, str(card.path), problems[card.name] or good)
    console.print(table)
    broken = [card for card in here if problems[card.name]]
    if broken:
        raise CheckpointError(f"Delete and fetch again: {', '.join(str(card.path) for card in broken)}")


def _problem(card: WeightCard) -> str:
    try:
        check_file(card.path, sha256=card.sha256, size=card.size)
    except CheckpointError as error:
        return str(error)
    return ""


@weights_app.command()
def convert(
    source: Annotated[str, typer.Argument(help="a weight file, or a card of `zoo weights list`")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="model=NAME, to=zoo|official|mmdet, output=FILE, and options of the official program"
        ),
    ] = None,
) -> None:
    """Turn an official checkpoint into one of ours, or (to=official) one of ours into the official layout.

    Options of the official program that its file does not tell are given as key=value. The suffix of the
    output decides the official file type: .safetensors, .npz, .pth. Files of another program that has the
    model, as mmdet has Conditional DETR, are read as official ones are, and written as to=mmdet.

    Examples:

      zoo weights convert GMAN.index model=gman N=325

      zoo weights convert model.safetensors to=official output=weights.npz

      zoo weights convert conditional_detr.safetensors to=mmdet output=weights.pth
    """
    given = parsed_options(options, "model=gman")
    target = str(given.pop("to", "zoo"))
    if target not in TARGETS:
        raise ConfigError(f"to={target} is none of {', '.join(TARGETS)}.{did_you_mean(target, TARGETS)}")
    output = given.pop("output", None)
    if target == "zoo":
        _convert_to_zoo(source, output, given)
    else:
        _convert_from_zoo(source, target, output, given)


def _convert_to_zoo(source: str, output: str | None, given: dict[str, Any]) -> None:
    file, card = _resolve(source)
    path = Path(output or f"{file.stem}.safetensors")
    name = given.pop("model", None) or (card.models[0] if card else None)
    if file.is_file() and file.suffix != ".safetensors" and read_checkpoint(file)[1]:
        _rewrite(file, path, name, given)
        return
    if name is None:
        raise ConfigError(f"Which model is {source}? Say model=NAME, one of: {', '.join(list_models())}.")
    if card and card.converter:
        raise ConfigError(
            f"{card.name} starts a part of a model and is no checkpoint of one; use it by zoo.create_model("
            f"{name!r}, pretrained=True, ...)."
        )
    model, report = load_official(name, file, **((card.config if card else {}) | given))
    save_model(model, path, extra=facts_of_file(model, file))
    console.print(report)
    console.print(f"{path}: {len(model.state_dict())} tensors of {name}", soft_wrap=True)


def _rewrite(file: Path, path: Path, wanted: str | None, given: dict[str, Any]) -> None:
    """As safetensors, a checkpoint that tells its model, as one that mmdet wrote of a model of ours."""
    model, extra = load_model(file)
    name = model.zoo_config["name"]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    if given or wanted not in (None, name):
        wrong = ", ".join([*given, *([f"model={wanted}"] if wanted not in (None, name) else [])])
        raise ConfigError(f"{file} tells its model, {name}, and all of its options: leave out {wrong}.")
    save_model(model, path, extra=extra)
    console.print(f"{path}: {len(model.state_dict())} tensors of {name}", soft_wrap=True)


def _convert_from_zoo(source: str, target: str, output: str | None, given: dict[str, Any]) -> None:
    if given:
        raise ConfigError(f"to={target} takes output=FILE only, not {', '.join(given)}.")
    if output is None:
        raise ConfigError(f"Name the {target} file: output=FILE.pth, .safetensors or .npz.")
    model, extra = load_model(source)
    if target == "official":
        content: dict[str, Any] = {}
        tensors, wrapper = to_official(model), official_wrapper(model)
    else:
        content = to_other(model, target, extra)
        tensors, wrapper = content.pop("state_dict"), "state_dict"
    save_state_dict(tensors, output, wrapper, beside=content)
    console.print(f"{output}: {len(tensors)} tensors in the layout of {target}", soft_wrap=True)


def _resolve(source: str) -> tuple[Path, WeightCard | None]:
    """A file as it is; a card by its fetched file."""
    if source not in list_cards():
        return Path(source), None
    card = weight_card(source)
    return fetch(card), card
