"""Composes `configs/` with the overrides of a command line, and finds every typo before anything runs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zoo.errors import ConfigError, did_you_mean
from zoo.paths import config_dir

NEEDS_DOMAIN = ("train", "bench")
"""Verbs that start from nothing; the others find the domain in a run or a checkpoint."""

OPTIONAL = {
    "optimizer": ("momentum", "nesterov", "amsgrad", "alpha"),
    "schedule": ("gamma", "every_steps", "every_epochs", "min_lr", "warmup_steps"),
    "loss": ("null_value", "delta"),
    "ema": ("decay",),
    "early_stopping": ("patience", "min_delta"),
}
"""Keys that only some choices of a section have; the object built from the section checks them."""

UNCHECKED = ("trainer.devices",)
"""Keys of several kinds (a number, a list, "auto"), checked by what takes them."""


def compose(verb: str, overrides: list[str]) -> DictConfig:
    """The resolved config of `zoo VERB OVERRIDES...`: `configs/VERB.yaml`, its groups, then the overrides.

    Overrides follow Hydra's grammar. Keys that the configs leave out but the model's constructor, the
    domain's data module or Lightning's Trainer accepts may be given without a leading `+`.

    Raises:
        ConfigError: an override that cannot be read, an unknown group option or key (with the nearest names),
            or a value of another kind than the key holds.
    """
    parsed = [_parse(text) for text in overrides]
    groups = _groups()
    _check_groups(parsed, groups)
    if verb in NEEDS_DOMAIN and not any(o.key_or_group == "domain" and o.value() for o in parsed):
        domains = groups["domain"]
        raise ConfigError(
            f"Choose a domain: zoo {verb} domain={domains[0]} ... Domains: {', '.join(domains)}."
        )
    chosen = [o.input_line or "" for o in parsed if _is_group(o, groups)]
    base = _hydra(verb, chosen)
    settings = [_setting(o, base, groups) for o in parsed if not _is_group(o, groups)]
    config = _hydra(verb, chosen + settings)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"The config refers to something that is not there: {error}") from None
    return config


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        raise ConfigError(
            f"Cannot read the override {text!r}. Write key=value, for example trainer.max_epochs=20."
        ) from None
    if override.is_sweep_override():
        raise ConfigError(f"{text!r} names several values. Run the command once for each.")
    return override


def _groups() -> dict[str, list[str]]:
    """Config group -> its options, from the folders of `configs/`."""
    return {d.name: sorted(f.stem for f in d.glob("*.yaml")) for d in config_dir().iterdir() if d.is_dir()}


def _is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def _check_groups(overrides: list[Override], groups: dict[str, list[str]]) -> None:
    for override in overrides:
        if not _is_group(override, groups) or override.value() is None:
            continue
        group, option = override.key_or_group, str(override.value())
        if option not in groups[group]:
            raise ConfigError(
                f"There is no {group}={option}.{did_you_mean(option, groups[group])} "
                f"Options: {', '.join(groups[group])}."
            )


def _hydra(verb: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return hydra_compose(config_name=verb, overrides=overrides)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Cannot compose the config of `zoo {verb}`: {reason}") from None


def _setting(override: Override, base: DictConfig, groups: dict[str, list[str]]) -> str:
    """The override as Hydra wants it, once its key is known and its value is of the right kind."""
    line, key = override.input_line or "", override.key_or_group
    if override.is_add() or override.is_force_add() or override.is_delete():
        return line
    if _has(base, key):
        _check_kind(key, OmegaConf.select(base, key), override.value())
        return line
    parent, _, name = key.rpartition(".")
    accepted = _accepted(parent, base)
    if name in accepted:
        return f"++{line}"
    known = [*groups, *_leaves(base), *(f"{parent}.{a}" for a in accepted)]
    raise ConfigError(f"Unknown key {key!r}.{did_you_mean(key, known)}")


def _has(config: DictConfig, key: str) -> bool:
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            return False
        node = node._get_node(part)
        node = node._value() if node is not None and not isinstance(node, DictConfig) else node
    return True


def _leaves(config: DictConfig, prefix: str = "") -> list[str]:
    """All dotted keys of the config, inner nodes too."""
    keys = []
    for name in config:
        key = f"{prefix}{name}"
        keys.append(key)
        node = config._get_node(str(name))
        if isinstance(node, DictConfig) and node._value() is not None and not isinstance(node._value(), str):
            keys += _leaves(node, f"{key}.")
    return keys


def _check_kind(key: str, old: Any, new: Any) -> None:
    """Numbers stay numbers, counts counts, switches switches; null and a first value for null are allowed."""
    if old is None or new is None or key in UNCHECKED or (isinstance(new, str) and "${" in new):
        return
    kinds: list[tuple[str, Any]] = [
        ("true or false", bool),
        ("a whole number", int),
        ("a number", (int, float)),
        ("a list", (list, ListConfig)),
    ]
    for label, kind in kinds:
        if isinstance(old, kind):
            if not isinstance(new, kind) or ("number" in label and isinstance(new, bool)):
                raise ConfigError(f"{key} takes {label}, got {new!r}.")
            return


def _accepted(parent: str, base: DictConfig) -> list[str]:
    """Arguments beyond those in the configs that the object built from `parent` takes."""
    if parent in OPTIONAL:
        return list(OPTIONAL[parent])
    if parent == "trainer":
        from pytorch_lightning import Trainer

        return _arguments(Trainer)
    if parent == "model" and OmegaConf.select(base, "model.name"):
        from zoo.registry import model_signature

        return ["pretrained", *model_signature(base.model.name)]
    if parent.startswith("model.") and parent.endswith("attention"):
        from zoo.attention.layers import LAYERS, layer_options

        return ["name", *sorted({option for layer in LAYERS.values() for option in layer_options(layer)})]
    if parent == "data" and OmegaConf.select(base, "domain.name"):
        from zoo.registry import get_domain

        return _arguments(get_domain(base.domain.name).load("data"))
    return []


def _arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def write(config: DictConfig, path: Path) -> None:
    """Store a config as YAML."""
    from zoo.files import atomic_write

    with atomic_write(path, "w") as file:
        file.write(OmegaConf.to_yaml(config))
