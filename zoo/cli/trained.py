"""What the verbs share that hand trained weights to a part of their domain."""

from __future__ import annotations

from zoo.cli.console import console, show_config
from zoo.config import compose
from zoo.errors import ConfigError


def run_part(verb: str, overrides: list[str] | None, *, show: bool) -> None:
    """Load the weights that the overrides name, do `verb` as their domain does it, print the files written.

    Args:
        overrides: for `configs/VERB.yaml`; `domain=NAME` may be among them, though the weights tell it.
        show: print the config instead.

    Raises:
        ConfigError: the weights are of another domain, or their domain has no such verb.
    """
    rest, wanted = without_domain(overrides or [])
    config = compose(verb, rest)
    if show:
        show_config(config)
        return
    from zoo.training.run import domain_for, load_trained

    model, facts = load_trained(config, verb)
    domain = domain_for(model)
    check_domain(wanted, domain.name)
    for path in domain.load(verb)(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)


def without_domain(overrides: list[str]) -> tuple[list[str], str]:
    """The overrides but `domain=NAME`, and that name."""
    given = [text.removeprefix("domain=") for text in overrides if text.startswith("domain=")]
    return [text for text in overrides if not text.startswith("domain=")], given[-1] if given else ""


def check_domain(wanted: str, found: str | None) -> None:
    """A ConfigError where the weights are of another domain than the one named.

    Args:
        found: `"forecasting"`, or with the problem `"forecasting/ranking"`; None: the weights do not tell.
    """
    if wanted and found and wanted not in (found, found.partition("/")[0]):
        raise ConfigError(f"These weights are for domain={found}, not for domain={wanted}.")
