"""`zoo info`: all that is known of one model, or of one attention layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from zoo.cli.console import console
from zoo.cli.list import parameter_text, size_text
from zoo.registry import ModelCard, argument_docs, count_flops, documented, model_card, model_signature
from zoo.weights.cards import is_non_commercial, weight_card

app = typer.Typer(add_completion=False)


@app.command()
def info(
    name: Annotated[str, typer.Argument(help="a model, e.g. gman or traffic/gman, or attention/LAYER")],
) -> None:
    """Show a model: its card, its arguments with defaults, its weights and licences. Or an attention layer.

    Examples:

      zoo info gman

      zoo info traffic/st_llm

      zoo info attention/mla
    """
    if name.startswith("attention/"):
        _show_layer(name.removeprefix("attention/"))
        return
    card = model_card(name)
    console.print(_facts(card))
    console.print(_arguments(model_signature(name), argument_docs(name)))
    if card.weights:
        console.print(_weights(card))


def _facts(card: ModelCard) -> Table:
    table = Table(title=f"{card.domain}/{card.name}", show_header=False)
    flops = count_flops(card.name)
    rows = {
        "summary": card.summary,
        "problem": card.problem,
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


def _show_layer(name: str) -> None:
    from zoo.attention.layers import Supports, find_layer, layer_options

    layer = find_layer(name)
    table = Table(title=f"attention/{name}", show_header=False)
    summary, *_ = (inspect.getdoc(layer) or "").partition("\n\nArgs:")
    summary = "\n\n".join(" ".join(part.split()) for part in summary.split("\n\n"))
    able = [field.name.replace("_", " ") for field in fields(Supports) if getattr(layer.supports, field.name)]
    for label, value in {"what": summary, "paper": layer.paper, "supports": ", ".join(able)}.items():
        table.add_row(label, escape(value))
    console.print(table)
    docs = {key: text for cls in reversed(layer.__mro__) for key, text in documented(cls).items()}
    console.print(_arguments(layer_options(layer), docs))


def _arguments(signature: Mapping[str, inspect.Parameter], docs: Mapping[str, str]) -> Table:
    table = Table("argument", "type", "default", "meaning", title="Arguments")
    for key, parameter in signature.items():
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
