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
    "optimizer": ("momentum", "nesterov", "amsgrad", "alpha", "layer_decay"),
    "schedule": ("gamma", "every_steps", "every_epochs", "min_lr", "warmup_steps", "warmup_epochs"),
    "loss": ("null_value", "delta", "label_smoothing", "class_weights", "eps"),
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
    groups = _groups(verb)
    bare = _models_without_config(parsed, groups) if verb == "train" else []
    _check_groups(parsed, groups, bare)
    if verb in NEEDS_DOMAIN and not any(o.key_or_group == "domain" and o.value() for o in parsed):
        domains = groups["domain"]
        raise ConfigError(
            f"Choose a domain: zoo {verb} domain={domains[0]} ... Domains: {', '.join(domains)}."
        )
    problem = _problem(parsed, groups)
    chosen = [line for o in parsed if _is_group(o, groups) for line in _choice(o, bare, problem)]
    base = _hydra(verb, chosen)
    named = [o for o in parsed if _looks_like_a_group(o, groups) and _has(base, o.key_or_group)]
    rest = [o for o in parsed if not _is_group(o, groups) and o not in named]
    config = _hydra(verb, chosen + [_setting(o, base, groups) for o in rest])
    for override in named:
        config[override.key_or_group] = override.value()
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


def _groups(verb: str) -> dict[str, list[str]]:
    """Config group -> its options, of the groups that the config of the verb chooses from."""
    names: list[str] = []
    config: Any = OmegaConf.load(config_dir() / f"{verb}.yaml")
    entries = config.get("defaults") or ()
    for entry in entries:
        if isinstance(entry, str):
            names += [] if entry == "_self_" else _groups(entry)
        else:
            names += [str(name).removeprefix("override ") for name in entry]
    return {name: _options(config_dir() / name) for name in names}


def _options(folder: Path) -> list[str]:
    """`traffic`, and from a folder in it `forecasting/ranking`."""
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def _models_without_config(overrides: list[Override], groups: dict[str, list[str]]) -> list[str]:
    """Registered models of the chosen domain, where one is asked for that has no file in `configs/model`."""
    chosen = _chosen(overrides, groups)
    if not chosen.get("domain") or chosen.get("model") in (None, *groups["model"]):
        return []
    if chosen["domain"] not in groups["domain"]:
        return []
    from zoo.registry import list_models

    return list_models(f"{chosen['domain'].partition('/')[0]}/*")


def _chosen(overrides: list[Override], groups: dict[str, list[str]]) -> dict[str, Any]:
    return {o.key_or_group: o.value() for o in overrides if _is_group(o, groups)}


def _problem(overrides: list[Override], groups: dict[str, list[str]]) -> str:
    """The domain config of the chosen model: `forecasting/ranking` for domain=forecasting model=miga."""
    chosen = _chosen(overrides, groups)
    domain, model = chosen.get("domain"), chosen.get("model")
    if not (domain and model):
        return domain or ""
    from zoo.registry import get_domain

    return get_domain(domain, _registered_name(model) if model in groups["model"] else model).name


def _choice(override: Override, bare: list[str], problem: str) -> list[str]:
    """The override as Hydra wants it; a model without config is chosen by its name alone."""
    if override.key_or_group == "model" and override.value() in bare:
        return ["~model", f"++model.name={override.value()}"]
    if override.key_or_group == "domain" and problem:
        return [f"domain={problem}"]
    return [override.input_line or ""]


def _is_group(override: Override, groups: dict[str, list[str]]) -> bool:
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def _looks_like_a_group(override: Override, groups: dict[str, list[str]]) -> bool:
    """Whether Hydra takes a plain key of the verb, as `model` of predict, for a folder of `configs/`."""
    key = override.key_or_group
    return key not in groups and (config_dir() / key).is_dir()


def _check_groups(overrides: list[Override], groups: dict[str, list[str]], bare: list[str]) -> None:
    domain = _chosen(overrides, groups).get("domain")
    for override in overrides:
        if not _is_group(override, groups) or override.value() is None:
            continue
        group, option = override.key_or_group, str(override.value())
        known = [*groups[group], *(bare if group == "model" else ())]
        if option in known:
            continue
        if group == "model" and domain in groups["domain"]:
            known = _models_of(domain, option, groups["model"])
        raise ConfigError(
            f"There is no {group}={option}.{did_you_mean(option, known)} Options: {', '.join(known)}."
        )


def _models_of(domain: str, asked: str, configs: list[str]) -> list[str]:
    """What `model=` takes in a domain: its registered models and its configs.

    Raises:
        ConfigError: the model that was asked for is of another domain.
    """
    from zoo.registry import list_models, model_card

    if asked in list_models():
        raise ConfigError(f"The model {asked} is for domain={model_card(asked).domain}, not {domain}.")
    names = list_models(f"{domain.partition('/')[0]}/*")
    return sorted({*names, *(config for config in configs if _registered_name(config) in names)})


def _registered_name(config: str) -> str:
    """The model that `configs/model/CONFIG.yaml` builds."""
    content: Any = OmegaConf.load(config_dir() / "model" / f"{config}.yaml")
    return content.model.name


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

        model = OmegaConf.select(base, "model.name")
        return _arguments(get_domain(base.domain.name, model).load("data"))
    return []


def _arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def write(config: DictConfig, path: Path) -> None:
    """Store a config as YAML."""
    from zoo.files import atomic_write

    with atomic_write(path, "w") as file:
        file.write(OmegaConf.to_yaml(config))
