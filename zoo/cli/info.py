"""`zoo info`: all that is known of one model."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zoo.cli.console import console
from zoo.cli.list import parameter_text, size_text
from zoo.registry import ModelCard, argument_docs, count_flops, model_card, model_signature
from zoo.weights.cards import is_non_commercial, weight_card

app = typer.Typer(add_completion=False)


@app.command()
def info(name: Annotated[str, typer.Argument(help="a model, e.g. gman or traffic/gman")]) -> None:
    """Show a model: its card, its arguments with defaults, its weights and licences.

    Examples:

      zoo info gman

      zoo info traffic/st_llm
    """
    card = model_card(name)
    console.print(_facts(card))
    console.print(_arguments(name))
    if card.weights:
        console.print(_weights(card))


def _facts(card: ModelCard) -> Table:
    table = Table(title=f"{card.domain}/{card.name}", show_header=False)
    flops = count_flops(card.name)
    rows = {
        "summary": card.summary,
        "paper": card.paper,
        "official code": card.source,
        "licence of it": licence_text(card.licence),
        "status": card.status,
        "parameters": parameter_text(card),
        "operations": f"{flops / 1e9:,.3g} GFLOP forward, one sample" if flops else "",
        "counted with": size_text(card.sizes),
        "preprocessing": "; ".join(f"{key}: {value}" for key, value in card.preprocessing.items()),
        "notes": card.notes,
    }
    for label, value in rows.items():
        if value:
            table.add_row(label, value)
    return table


def _arguments(name: str) -> Table:
    docs = argument_docs(name)
    table = Table("argument", "type", "default", "meaning", title="Arguments")
    for key, parameter in model_signature(name).items():
        required = parameter.default is inspect.Parameter.empty
        default = "[bold]required[/]" if required else escape(repr(parameter.default))
        table.add_row(key, escape(_type_text(parameter)), default, escape(docs.get(key, "")))
    return table


def _type_text(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _weights(card: ModelCard) -> Table:
    table = Table("weights", "licence", "format", "metric", "here", title="Weights")
    for name in card.weights:
        weights = weight_card(name)
        here = "yes" if weights.path.is_file() else f"zoo weights fetch {name}"
        table.add_row(name, licence_text(weights.licence), weights.format, weights.metric, here)
    return table


def licence_text(licence: str) -> str:
    """The licence, marked where it forbids commercial use."""
    return (
        f"[bold red]{escape(licence)}: no commercial use[/]"
        if is_non_commercial(licence)
        else escape(licence)
    )
