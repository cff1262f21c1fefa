"""`zoo`: one module per verb."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from zoo.errors import ZooError, did_you_mean

VERBS = (
    "train",
    "evaluate",
    "predict",
    "relax",
    "md",
    "check",
    "explain",
    "finetune",
    "convert",
    "list",
    "info",
    "data",
    "weights",
    "bench",
)


class LazyVerbs(TyperGroup):
    """Imports a verb's module only when that verb is used, so that `zoo --help` answers at once."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            raise ZooError(f"There is no verb {cmd_name!r}.{did_you_mean(cmd_name, VERBS)} See zoo --help.")
        command = typer.main.get_command(importlib.import_module(f"zoo.cli.{cmd_name}").app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=LazyVerbs, add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def zoo() -> None:
    """Attention-based models of the applied fields: train, evaluate, predict, fine-tune.

    Examples:

      zoo train domain=traffic

      zoo train domain=traffic model=stid data=metr_la data.path=metr-la.h5

      zoo predict run=RUN input=recent.csv output=forecast.csv

      zoo train domain=vision data=imagefolder data.path=photos
    """


def main() -> None:
    """Run a verb; a user's mistake costs one message and exit status 2."""
    from rich.markup import escape

    from zoo.cli.console import errors

    try:
        app()
    except ZooError as error:
        errors.print(f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
