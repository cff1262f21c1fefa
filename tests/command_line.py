"""The command line, called in this process."""

from __future__ import annotations

from typer.testing import CliRunner

from zoo.cli import app

QUIET = ("trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "logger.tensorboard=false")
"""Settings of a run that prints no more than it has to."""


def zoo(verb: str, *arguments: object, columns: int = 140) -> str:
    """What the command prints; a ZooError is raised as it is."""
    result = CliRunner().invoke(app, [verb, *map(str, arguments)], env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
