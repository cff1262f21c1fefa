"""`zoo list`: the models of the zoo, and its attention layers."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import typer
from rich.table import Table

from zoo.cli.console import console
from zoo.errors import UnknownName, did_you_mean
from zoo.registry import ModelCard, list_domains, list_models, model_card

app = typer.Typer(add_completion=False)


@app.command("list")
def show(
    pattern: Annotated[str, typer.Argument(help="names to show, e.g. 'gman*' or 'traffic/*'")] = "*",
) -> None:
    """List the models: name, domain, parameters, status and paper. `attention`: the layers and what they can.

    Examples:

      zoo list

      zoo list attention

      zoo list 'traffic/*'

      zoo list 'gman*'
    """
    if pattern == "attention":
        console.print(attention_table())
        return
    names = list_models(pattern)
    if not names:
        hint = did_you_mean(pattern, [*list_models(), *(f"{domain}/*" for domain in list_domains())])
        raise UnknownName(f"No model matches {pattern!r}.{hint}")
    table = Table("model", "domain", "parameters", "status", "paper")
    table.columns[2].justify = "right"
    sizes: dict[str, Any] = {}
    for name in names:
        card = model_card(name)
        table.add_row(card.name, card.domain, parameter_text(card), card.status, card.paper)
        sizes |= card.sizes
    if sizes:
        table.caption = f"parameters counted with {size_text(sizes)}"
    console.print(table)


HEADINGS = {
    "bidirectional": "two-\nway",
    "causal": "cau-\nsal",
    "cross": "cross",
    "padding": "pad-\nding",
    "packed": "pack-\ned",
    "cache": "cache",
    "any_length": "any\nN",
    "batch_invariant": "row\nalone",
    "maps": "maps",
}
"""Of the fields of `Supports`."""


def attention_table() -> Table:
    """A row for each attention layer, family by family: what it supports, as the layer itself says."""
    from zoo.attention.layers import LAYERS

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", no_wrap=True)
    for heading in HEADINGS.values():
        table.add_column(heading, justify="center", no_wrap=True)
    table.add_column("arXiv", no_wrap=True)
    by_family = sorted(LAYERS, key=lambda name: (LAYERS[name].family, name))
    for family, names in itertools.groupby(by_family, key=lambda name: LAYERS[name].family):
        table.add_row(f"[bold]{family}[/]")
        for name in names:
            can = LAYERS[name].supports
            marks = ("x" if getattr(can, prop) else "" for prop in HEADINGS)
            table.add_row(f" {name}", *marks, LAYERS[name].paper.rpartition("/")[2])
    return table


def size_text(sizes: dict[str, Any]) -> str:
    """`num_nodes=207`"""
    return ", ".join(f"{key}={value}" for key, value in sizes.items())


def parameter_text(card: ModelCard) -> str:
    """`229,569`, or a dash where an argument without a typical value decides."""
    return "-" if card.parameters is None else f"{card.parameters:,}"
