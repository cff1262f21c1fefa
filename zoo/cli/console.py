"""The terminal that every verb writes to, and what verbs read from the command line."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from zoo.errors import ConfigError

console = Console()
errors = Console(stderr=True)


def show_config(config: DictConfig) -> None:
    """Print a config as YAML, as `--cfg` asks for."""
    console.print(OmegaConf.to_yaml(config), markup=False, highlight=False, soft_wrap=True)


def parsed_options(options: list[str] | None, example: str) -> dict[str, Any]:
    """`["key=speed", "header=true"]` to keyword arguments.

    Raises:
        ConfigError: one that is not of this form; the message has the example.
    """
    for option in options or []:
        if option.find("=") < 1:
            raise ConfigError(f"{option!r} is not of the form key=value, e.g. {example}.")
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist(options or []))
    assert isinstance(parsed, dict)
    return {str(name): value for name, value in parsed.items()}
