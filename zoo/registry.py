"""Model names -> builders and cards, domain names -> parts. A domain is imported when first asked for."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import json
import pkgutil
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import Container, OmegaConf
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import CheckpointError, ConfigError, UnknownName, did_you_mean
from zoo.weights.cards import WeightCard, is_non_commercial, weight_card
from zoo.weights.checkpoint import (
    LoadReport,
    check_fit,
    load_state,
    matches,
    read_state_dict,
    told_by,
)
from zoo.weights.formats import read_tensors
from zoo.weights.official import OfficialLayout

STATUSES = ("official parity", "re-implementation")
"""Held to numbers of the official program, or written from the paper's description alone."""


@dataclass(frozen=True)
class ModelCard:
    """What a user should know of a model before using it."""

    name: str
    domain: str
    summary: str
    paper: str
    licence: str
    """Licence of the official code that defines the model (not of this zoo)."""
    source: str
    """The official repository, or `"none"`."""
    status: str
    """One of `STATUSES`."""
    weights: tuple[str, ...] = ()
    """Names of checkpoint cards (`checkpoints/NAME.yaml`)."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    notes: str = ""
    problem: str = ""
    """Of a model for another problem than its domain's own: which of those registered, see `Domain`."""
    parameters: int | None = None
    """With default arguments, and `sizes` for those without default; None where that leaves one open."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """The arguments the parameters were counted with, e.g. `{"num_nodes": 207}`."""


@dataclass(frozen=True)
class Domain:
    """What a domain offers, each part as `"package.module:attribute"`, imported on `load`; empty: none.

    A further problem of a domain, with data and task of its own, is registered as `"DOMAIN/PROBLEM"`.
    """

    name: str
    summary: str
    task: str = ""
    data: str = ""
    predict: str = ""
    bench: str = ""
    explain: str = ""
    judge: str = ""
    """Function from a file of results of any program, and data, to what a tested task offers."""
    verbs: dict[str, str] = field(default_factory=dict)
    """What only this domain does with trained weights, as `relax`: verb of the command line -> part."""
    detect: str = ""
    """Function from the tensors of an official file to the name of their model, or None."""
    example_inputs: str = ""
    """Function from a model's arguments (as keywords) to the inputs of one sample."""
    example_sizes: dict[str, Any] = field(default_factory=dict)
    """Arguments without default, for a typical data set: what cards are counted with."""

    def load(self, part: str) -> Any:
        """The object behind `task`, `data`, `predict`, `explain`, `judge`, `bench` or one of `verbs`.

        Raises:
            ConfigError: the domain has no such part.
        """
        target = self.verbs.get(part) or getattr(self, part, "")
        if not target:
            raise ConfigError(f"Domain {self.name!r} has no {part}.")
        return load_object(target)


@dataclass(frozen=True)
class _Entry:
    card: ModelCard
    builder: Callable[..., nn.Module]
    model: Callable[..., nn.Module]
    official: type[OfficialLayout] | None


_MODELS: dict[str, _Entry] = {}
_DOMAINS: dict[str, Domain] = {}


def load_object(target: str) -> Any:
    """Import `"package.module:attribute"`."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


# ---- registering -------------------------------------------------------------------------------------------


def register_domain(domain: Domain) -> None:
    """Make a domain known; called once, in `domains/NAME/__init__.py`."""
    _DOMAINS[domain.name] = domain


def register_model(
    *,
    model: Callable[..., nn.Module],
    summary: str,
    paper: str,
    licence: str,
    source: str,
    status: str,
    weights: tuple[str, ...] = (),
    official: type[OfficialLayout] | None = None,
    preprocessing: dict[str, Any] | None = None,
    notes: str = "",
    problem: str = "",
) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Register a builder function under its own name; the domain is the package `domains.DOMAIN` it lies in.

    `model` is the class the builder constructs: its signature says which overrides `create_model` accepts. A
    variant names its own numbers as keyword parameters, and passes the rest on::

        @register_model(model=GMAN, summary=..., paper=..., licence=..., source=..., status="official parity")
        def gman_metr_la(*, num_layers: int = 5, **kwargs) -> nn.Module:
            return GMAN(num_layers=num_layers, **kwargs)

    Raises:
        ValueError: another domain has a model of this name, or `status` is not one of `STATUSES`.
    """
    if status not in STATUSES:
        raise ValueError(f"status is {status!r}, not one of {STATUSES}")

    def register(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        name = builder.__name__
        domain = _domain_of(builder.__module__)
        known = _MODELS.get(name)
        if known is not None and known.card.domain != domain:
            raise ValueError(f"{name!r} is already a model of domain {known.card.domain!r}")
        card = ModelCard(
            name=name,
            domain=domain,
            summary=summary,
            paper=paper,
            licence=licence,
            source=source,
            status=status,
            weights=weights,
            preprocessing=dict(preprocessing or {}),
            notes=notes,
            problem=problem,
        )
        _MODELS[name] = _Entry(card, builder, model, official)
        return builder

    return register


def _domain_of(module: str) -> str:
    """`domains.traffic.models.gman` -> `traffic`; a user's own package is a domain of its own."""
    first, *rest = module.split(".")
    return rest[0] if first == "domains" and rest else first


# ---- finding -----------------------------------------------------------------------------------------------


def list_domains() -> list[str]:
    """Names of the domains that are installed, sorted; imports none of them."""
    packages = importlib.import_module("domains").__path__
    found = {module.name for module in pkgutil.iter_modules(packages) if module.ispkg}
    return sorted(found | {name for name in _DOMAINS if "/" not in name})


def get_domain(name: str, model: str | None = None) -> Domain:
    """The domain called `name`; or what it offers for the problem of `model`, if not its own.

    `get_domain("forecasting", "miga")` and `get_domain("forecasting/ranking")` are the same.

    Raises:
        UnknownName: there is none; the message names the nearest.
    """
    package = name.partition("/")[0]
    _import_domain(package)
    entry = _MODELS.get(model or "")
    if entry is not None and entry.card.domain == package:
        name = _problem_of(entry.card)
    if name not in _DOMAINS:
        raise UnknownName(f"Package domains.{package} registers no domain {name!r}.")
    return _DOMAINS[name]


def _problem_of(card: ModelCard) -> str:
    """What the parts that serve a model are registered as: `forecasting/ranking`, or `traffic`."""
    return f"{card.domain}/{card.problem}" if card.problem else card.domain


def list_models(pattern: str = "*") -> list[str]:
    """Sorted names of the models that match a glob; `"traffic/*"` imports and lists one domain only."""
    domain, _, bare = pattern.rpartition("/")
    for name in fnmatch.filter(list_domains(), domain or "*"):
        _import_domain(name)
    cards = [entry.card for entry in _MODELS.values()]
    return sorted(
        card.name
        for card in cards
        if fnmatch.fnmatchcase(card.domain, domain or "*") and fnmatch.fnmatchcase(card.name, bare)
    )


def model_class(name: str) -> Callable[..., nn.Module]:
    """The class that the builder of a model constructs."""
    return _find(name).model


def model_card(name: str, *, count: bool = True) -> ModelCard:
    """The card of a model, its parameters counted (unless told not to) without allocating them.

    Raises:
        UnknownName: no such model.
    """
    entry = _find(name)
    sizes = _example_sizes(entry)
    if not count or _needed(entry, sizes):
        return entry.card
    with torch.device("meta"):
        parameters = sum(p.numel() for p in entry.builder(**sizes).parameters())
    return dataclasses.replace(entry.card, parameters=parameters, sizes=sizes)


def count_flops(name: str) -> int | None:
    """Floating-point operations of one sample forward, a multiply-add counted as two, with the card's sizes.

    None where the domain gives no example inputs, or no size for an argument without default.
    """
    from zoo.attention import backend

    entry = _find(name)
    domain, sizes = _DOMAINS.get(_problem_of(entry.card)), _example_sizes(entry)
    if domain is None or not domain.example_inputs or _needed(entry, sizes):
        return None
    arguments = {key: parameter.default for key, parameter in _signature(entry).items()} | sizes
    with FlopCounterMode(display=False) as counter, backend("blocked"), torch.no_grad():
        # The counter cannot follow a view of a parameter that requires gradients.
        entry.builder(**sizes).eval().requires_grad_(False)(*domain.load("example_inputs")(**arguments))
    return counter.get_total_flops()


def model_signature(name: str) -> dict[str, inspect.Parameter]:
    """The constructor arguments of a model by name, with the defaults of this variant."""
    return _signature(_find(name))


def argument_docs(name: str) -> dict[str, str]:
    """What each constructor argument of a model means, from the `Args:` section of its class's docstring."""
    docs: dict[str, str] = {}
    for cls in reversed(_constructors(_find(name).model)):
        docs |= documented(cls)
    return docs


def documented(thing: Any) -> dict[str, str]:
    """The entries of the `Args:` section of a docstring."""
    docstring = inspect.getdoc(thing) or ""
    section = re.search(r"(?ms)^Args:\n(.*?)(?=^\S|\Z)", docstring)
    docs = {}
    for keys, text in re.findall(r"(?m)^    (\w[\w, ]*): (.*(?:\n {5,}.*)*)", section[1] if section else ""):
        docs |= dict.fromkeys(re.split(r",\s*", keys), " ".join(text.split()))
    return docs


def _import_domain(name: str) -> None:
    if any(entry.card.domain == name for entry in _MODELS.values()):
        return
    names = list_domains()
    if name not in names:
        raise UnknownName(
            f"There is no domain {name!r}.{did_you_mean(name, names)} Domains: {', '.join(names)}."
        )
    if name not in _DOMAINS:
        importlib.import_module(f"domains.{name}")


def _find(name: str) -> _Entry:
    domain, _, bare = name.rpartition("/")
    if domain:
        _import_domain(domain)
    elif bare not in _MODELS:
        list_models()
    entry = _MODELS.get(bare)
    if entry is None or (domain and entry.card.domain != domain):
        options = [n for n, e in _MODELS.items() if not domain or e.card.domain == domain]
        hint = did_you_mean(bare.lower().replace("-", "_"), options)
        where = f" in domain {domain!r}" if domain else ""
        raise UnknownName(f"There is no model {bare!r}{where}.{hint} `zoo list` shows all models.")
    return entry


def _signature(entry: _Entry) -> dict[str, inspect.Parameter]:
    """The class's parameters, the builder's own in place of those of the same name."""
    named = {}
    for function in (*reversed(_constructors(entry.model)), entry.builder):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                named[parameter.name] = parameter
    named.pop("pretrained", None)
    return named


def _constructors(model: Callable[..., nn.Module]) -> list[Callable[..., Any]]:
    """The class, and its bases as far as constructors hand on further keywords."""
    found: list[Callable[..., Any]] = []
    for cls in inspect.getmro(model) if inspect.isclass(model) else [model]:
        if cls is not model and "__init__" not in vars(cls):
            continue
        found.append(cls)
        parameters = inspect.signature(cls).parameters.values()
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return [cls for cls in found if cls is not nn.Module]


def _example_sizes(entry: _Entry) -> dict[str, Any]:
    domain = _DOMAINS.get(_problem_of(entry.card))
    sizes = domain.example_sizes if domain else {}
    return {key: sizes[key] for key in _needed(entry, {}) if key in sizes}


def _needed(entry: _Entry, config: Mapping[str, Any]) -> list[str]:
    """Arguments without default that `config` does not give."""
    return [key for key, p in _signature(entry).items() if p.default is p.empty and key not in config]


# ---- creating ----------------------------------------------------------------------------------------------


def create_model(
    name: str,
    *,
    pretrained: bool | str = False,
    checkpoint_path: str | Path | None = None,
    **overrides: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: `"gman"`, or with its domain `"traffic/gman"` (which imports only that domain); `"gman.TAG"`
            chooses the checkpoint card `gman_TAG` where pretrained=True.
        pretrained: load the weights of the model's first checkpoint card, or of the card of this name or tag.
        checkpoint_path: load these weights, own or in the official layout; a checkpoint of ours also brings
            the arguments it was built with.
        overrides: constructor arguments; they win over those of a checkpoint.

    Returns:
        The model, in training mode. `model.zoo_config` holds `name`, `domain` and `config`, the JSON-able
        arguments that rebuild it.

    Raises:
        UnknownName: no such model or card.
        ConfigError: an argument the model does not have, or one that is missing or cannot be stored.
        CheckpointError: the weights do not belong to this model.
    """
    name, _, tag = name.partition(".")
    entry = _find(name)
    if tag:
        pretrained = _choose_card(entry, tag).name if pretrained is True else pretrained
    config = _checked(entry, overrides)
    if pretrained and checkpoint_path is not None:
        raise ConfigError("Give pretrained or checkpoint_path, not both.")
    if pretrained:
        return _from_card(entry, _choose_card(entry, pretrained), config)
    if checkpoint_path is not None:
        return _from_checkpoint(entry, checkpoint_path, config)
    return _build(entry, config)


def _checked(entry: _Entry, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides as plain JSON-able values, every name an argument of the model."""
    name, signature = entry.card.name, _signature(entry)
    config = {}
    for key, value in overrides.items():
        if key not in signature:
            hint = did_you_mean(key, signature)
            raise ConfigError(
                f"Model {name!r} has no argument {key!r}.{hint} It has: {', '.join(signature)}."
            )
        config[key] = OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
        try:
            config[key] = json.loads(json.dumps(config[key]))
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise ConfigError(
                f"Argument {key!r} of model {name!r} is a {kind}; a checkpoint can store only numbers, "
                "strings, lists and dicts."
            ) from None
    return config


def _build(entry: _Entry, config: dict[str, Any]) -> nn.Module:
    name, needed = entry.card.name, _needed(entry, config)
    if needed:
        raise ConfigError(f"Model {name!r} needs {', '.join(needed)}, for example {needed[0]}=...")
    try:
        model = entry.builder(**config)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value}" for key, value in config.items())
        raise ConfigError(f"Model {name!r} cannot be built with {given}: {error}") from error
    model.__dict__["zoo_config"] = {"name": name, "domain": entry.card.domain, "config": config}
    return model


def _from_checkpoint(entry: _Entry, path: str | Path, config: dict[str, Any]) -> nn.Module:
    if Path(path).is_dir():
        return _from_official(entry, *_read_official(entry, path), config, str(path))[0]
    state, metadata = read_tensors(path)
    if (options := _told_options(entry, metadata)) is not None:
        return _from_official(entry, state, options, config, str(path))[0]
    meta = told_by(metadata, path)
    stored = meta.get("model", {"name": entry.card.name, "config": {}})
    if stored["name"] != entry.card.name:
        raise CheckpointError(f"{path} holds a {stored['name']!r}, not a {entry.card.name!r}.")
    model = _build(entry, stored["config"] | config)
    if meta:
        load_state(model, state, source=str(path))
    else:
        _load(entry, model, state, str(path))
    return model


def _choose_card(entry: _Entry, pretrained: bool | str) -> WeightCard:
    names = entry.card.weights
    if not names:
        raise UnknownName(
            f"No weights of {entry.card.name!r} are published. Train it, pass checkpoint_path=FILE (own) "
            "or use zoo.from_official (official file)."
        )
    if pretrained is True:
        return weight_card(names[0])
    if f"{entry.card.name}_{pretrained}" in names:
        return weight_card(f"{entry.card.name}_{pretrained}")
    if pretrained not in names:
        raise UnknownName(
            f"Model {entry.card.name!r} has no weights {pretrained!r}.{did_you_mean(str(pretrained), names)} "
            f"It has: {', '.join(names)}."
        )
    return weight_card(str(pretrained))


def _from_card(entry: _Entry, card: WeightCard, config: dict[str, Any]) -> nn.Module:
    """Official weights of the whole model, or, with a converter of its own, a start for part of it."""
    from zoo.weights.download import fetch

    path = fetch(card)
    if not card.converter:
        state, options = _read_official(entry, path)
        return _from_official(entry, state, options | card.config, config, str(path))[0]
    model = _build(entry, card.config | config)
    tensors = load_object(card.converter)(read_state_dict(path), model)
    kept = [name for name in model.state_dict() if name not in tensors]
    load_state(model, tensors, skip=kept, source=str(path))
    return model


# ---- official checkpoints ----------------------------------------------------------------------------------


def from_official(
    name: str, checkpoint: str | Path | Mapping[str, Tensor | np.ndarray], **official_config: Any
) -> nn.Module:
    """Build a model from a checkpoint of its official program.

    Args:
        name: name of the model, bare or with its domain.
        checkpoint: a file (`.pth`, `.safetensors`, `.npz`, TensorFlow prefix), a folder where the official
            program writes one, or a dict from official tensor names to tensors or arrays.
        official_config: the official program's options that its checkpoint does not tell.

    Returns:
        The model with every weight loaded, in eval mode.

    Raises:
        ConfigError: an official option that the adapter does not know.
        CheckpointError: tensors missing, left over or of another shape, each by its official name.
    """
    return load_official(name, checkpoint, **official_config)[0]


def load_official(
    name: str, checkpoint: str | Path | Mapping[str, Tensor | np.ndarray], **official_config: Any
) -> tuple[nn.Module, LoadReport]:
    """`from_official`, with the account of every tensor: what no official file holds is left at init."""
    entry = _find(name)
    if isinstance(checkpoint, Mapping):
        state, source = _as_tensors(checkpoint), "The given state dict"
    else:
        state, options = _read_official(entry, checkpoint)
        official_config, source = options | official_config, str(checkpoint)
    model, report = _from_official(entry, state, official_config, {}, source)
    return model.eval(), report


def to_official(model: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model of this zoo under the names and in the layout of its official program.

    Args:
        tensors: map these instead, given by our names; the gradients, for example.
    """
    layout = _layout(_entry_of(model))
    return layout.exported(dict(model.state_dict() if tensors is None else tensors), model)


def detect_model(state: dict[str, Tensor]) -> str | None:
    """The model that the tensors of an official file belong to, as far as a domain knows them by their names.

    Raises:
        CheckpointError: they are of a family that is known, but of none of its models.
    """
    domains = (get_domain(name) for name in list_domains())
    found = (domain.load("detect")(state) for domain in domains if domain.detect)
    return next((name for name in found if name), None)


def official_wrapper(model: nn.Module) -> str | None:
    """The key under which PyTorch files of a model's official program hold the weights."""
    return _layout(_entry_of(model)).wrapper


def to_other(model: nn.Module, program: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a PyTorch file of another program holds of this model, the tensors under `state_dict`.

    Args:
        extra: what the model's checkpoint holds beside the weights.

    Raises:
        ConfigError: the program does not have the model.
        CheckpointError: it has no place for some part of the model.
    """
    entry = _entry_of(model)
    known = entry.official.others if entry.official else {}
    if program not in known:
        raise ConfigError(f"{program} has no {entry.card.name!r}, so that it cannot be written for it.")
    return load_object(known[program])(model, extra)


def facts_of_file(model: nn.Module, checkpoint: str | Path) -> dict[str, Any]:
    """The `extra` that an official file tells of a model that was read from it; empty: it tells none."""
    if Path(checkpoint).is_dir():
        return {}
    return _layout(_entry_of(model)).facts(model, read_tensors(checkpoint)[1])


def load_weights(model: nn.Module, checkpoint: str | Path | Mapping[str, Tensor | np.ndarray]) -> LoadReport:
    """Fill a model of this zoo from a checkpoint of ours, or of its official program.

    An official file is fitted to the model where its layout knows how: to other input channels, other classes
    or a backbone without head.

    Raises:
        CheckpointError: tensors missing, left over or of another shape.
    """
    if isinstance(checkpoint, Mapping):
        state, source = _as_tensors(checkpoint), "The given state dict"
    else:
        state, source = read_state_dict(checkpoint), str(checkpoint)
    return _load(_entry_of(model), model, state, source)


def _load(entry: _Entry, model: nn.Module, state: dict[str, Tensor], source: str) -> LoadReport:
    if entry.official is None or state.keys() == model.state_dict().keys():
        return load_state(model, state, source=source)
    return _fill(entry, model, _canonical(entry, state), source, fit=True)


def in_own_names(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict in the official layout of a model, under our names; any other as it is."""
    if "zoo_config" not in model.__dict__ or state_dict.keys() == model.state_dict().keys():
        return state_dict
    entry = _entry_of(model)
    if entry.official is None:
        return state_dict
    layout, state = entry.official, _canonical(entry, dict(state_dict))
    official = layout.exported(model.state_dict(), model)
    if {key for key in official if not matches(key, layout.ignored)} != state.keys():
        return state_dict
    _notice(entry)
    return layout.imported(state, model)


def _entry_of(model: nn.Module) -> _Entry:
    built = getattr(model, "zoo_config", None)
    if built is None:
        raise CheckpointError(
            f"This {type(model).__name__} was not built by zoo.create_model, so its layout is unknown."
        )
    return _find(f"{built['domain']}/{built['name']}")


def _from_official(
    entry: _Entry,
    state: dict[str, Tensor],
    official_config: dict[str, Any],
    overrides: dict[str, Any],
    source: str,
) -> tuple[nn.Module, LoadReport]:
    layout, name = _layout(entry), entry.card.name
    _check_options(layout, name, official_config)
    state = _canonical(entry, state)
    try:
        config = layout.config(state, **official_config)
    except KeyError as error:
        reason = f"it has no tensor {error}"
        raise CheckpointError(f"{source} is no official checkpoint of {name!r}: {reason}.") from None
    model = _build(entry, _checked(entry, config) | overrides)
    return model, _fill(entry, model, state, source, fit=bool(overrides))


def _notice(entry: _Entry) -> None:
    """Says so where official weights may not be used commercially."""
    name, licence = entry.card.name, entry.card.licence
    if is_non_commercial(licence):
        warnings.warn(
            f"The official weights of {name!r} are under {licence}: no commercial use.", stacklevel=5
        )


def _canonical(entry: _Entry, state: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = _layout(entry)
    return {key: value for key, value in layout.canonical(state).items() if not matches(key, layout.ignored)}


def _fill(entry: _Entry, model: nn.Module, state: dict[str, Tensor], source: str, *, fit: bool) -> LoadReport:
    layout, name = _layout(entry), entry.card.name
    _notice(entry)
    own = [f"{name}.*" for name in layout.own_modules]
    dispensable = (*layout.ignored, *layout.optional, *own)
    official = layout.exported(model.state_dict(), model)
    if fit:
        state = layout.fitted(state, official, model)
    expected = {
        key: value for key, value in official.items() if key in state or not matches(key, dispensable)
    }
    weights = {key: value for key, value in state.items() if not matches(key, layout.beside)}
    check_fit(weights, expected, source=source, target=f"official {name}")
    fresh = [name for name in model.state_dict() if matches(name, own) and name not in state]
    skip = (*layout.unofficial, *fresh)
    return load_state(model, layout.imported(state, model), skip=skip, source=source)


def _layout(entry: _Entry) -> type[OfficialLayout]:
    if entry.official is None:
        raise CheckpointError(
            f"Model {entry.card.name!r} has no official checkpoint layout ({entry.card.status})."
        )
    return entry.official


def _check_options(layout: type[OfficialLayout], name: str, options: Mapping[str, Any]) -> None:
    _, *parameters = inspect.signature(layout.config).parameters.values()
    known = {p.name: p.default is p.empty for p in parameters if p.kind is not p.VAR_KEYWORD}
    for option in options:
        if option not in known and len(known) == len(parameters):
            raise ConfigError(
                f"The official program of {name!r} has no option {option!r}.{did_you_mean(option, known)} "
                f"Known: {', '.join(known)}."
            )
    needed = [option for option, required in known.items() if required and option not in options]
    if needed:
        raise ConfigError(
            f"An official checkpoint of {name!r} does not tell {', '.join(needed)}: give {needed[0]}=... "
            f"Options: {', '.join(known)}."
        )


def _read_official(entry: _Entry, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file or folder of the official program, and the options that it tells."""
    if Path(path).is_dir() and entry.official is not None:
        found = entry.official.read_folder(Path(path))
        if found is not None:
            return found
    state, metadata = read_tensors(path)
    return state, _told_options(entry, metadata) or {}


def _told_options(entry: _Entry, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The options that a file of the official program tells, as far as the layout knows them; None: none."""
    return _layout(entry).told(json.loads(metadata["official"])) if "official" in metadata else None


def _as_tensors(state: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    return {key: v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for key, v in state.items()}
