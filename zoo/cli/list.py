"""`zoo list`: the models of the zoo."""

from __future__ import annotations

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
    """List the models: name, domain, parameters, status and paper.

    Examples:

      zoo list

      zoo list 'traffic/*'

      zoo list 'gman*'
    """
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


def size_text(sizes: dict[str, Any]) -> str:
    """`num_nodes=207`"""
    return ", ".join(f"{key}={value}" for key, value in sizes.items())


def parameter_text(card: ModelCard) -> str:
    """`229,569`, or a dash where an argument without a typical value decides."""
    return "-" if card.parameters is None else f"{card.parameters:,}"
