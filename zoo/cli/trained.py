"""What the verbs share that hand trained weights to a part of their domain."""

from __future__ import annotations

from omegaconf import DictConfig

from zoo.cli.console import console, show_config
from zoo.config import compose
from zoo.errors import ConfigError
from zoo.paths import config_dir

WEIGHTS = ("run", "checkpoint", "model")


def run_part(verb: str, overrides: list[str] | None, *, show: bool) -> None:
    """Load the weights that the overrides name, do `verb` as their domain does it, print the files written.

    Args:
        overrides: for `configs/VERB.yaml`, and `configs/VERB/DOMAIN.yaml` where there is one; `domain=NAME`
            may be among them, though the weights tell it.
        show: print the config instead.

    Raises:
        ConfigError: the weights are of another domain, or their domain has no such verb.
    """
    config = config_for_weights(verb, overrides or [])
    if show:
        show_config(config)
        return
    from zoo.training.run import domain_for, load_trained

    model, facts = load_trained(config, verb)
    domain = domain_for(model)
    check_domain(without_domain(overrides or [])[1], domain.name)
    for path in domain.load(verb)(model, facts, config):
        console.print(str(path), highlight=False, soft_wrap=True)


def config_for_weights(verb: str, overrides: list[str]) -> DictConfig:
    """The config of `verb`, with the options of the domain that the weights named belong to.

    Raises:
        ConfigError: options of a domain without weights that tell it, or weights of another domain.
    """
    overrides, wanted = without_domain(overrides)
    if not (config_dir() / verb).is_dir():
        return compose(verb, overrides)
    named = [text for text in overrides if text.startswith(tuple(f"{name}=" for name in WEIGHTS))]
    if not named:
        try:
            return compose(verb, overrides)
        except ConfigError as error:
            raise ConfigError(
                f"{error} Options of a domain are known once run=RUN or checkpoint=FILE names weights."
            ) from None
    from zoo.training.run import domain_of

    domain = domain_of(compose(verb, named), verb)
    check_domain(wanted, domain)
    chosen = domain or wanted
    known = (config_dir() / verb / f"{chosen}.yaml").is_file()
    return compose(verb, [f"{verb}={chosen}", *overrides] if known else overrides)


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
