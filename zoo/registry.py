"""Model names -> builders and cards, domain names -> parts. A domain is imported when first asked for."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import Container, OmegaConf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.errors import ConfigError, UnknownName, did_you_mean

if TYPE_CHECKING:
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
class Entry:
    """A registered model."""

    card: ModelCard
    builder: Callable[..., nn.Module]
    model: Callable[..., nn.Module]
    """What the builder constructs."""
    official: type[OfficialLayout] | None

    def signature(self) -> dict[str, inspect.Parameter]:
        """The class's parameters, the builder's own in place of those of the same name."""
        named = _named_parameters(*reversed(_constructors(self.model)), self.builder)
        named.pop("pretrained", None)
        return named

    def needed(self, config: Mapping[str, Any]) -> list[str]:
        """Arguments without default that `config` does not give."""
        return [key for key, p in self.signature().items() if p.default is p.empty and key not in config]

    def checked(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The overrides as plain JSON-able values, every name an argument of the model."""
        name, signature = self.card.name, self.signature()
        config = {}
        for key, value in overrides.items():
            if key not in signature:
                hint = did_you_mean(key, signature)
                raise ConfigError(
                    f"Model {name!r} has no argument {key!r}.{hint} It has: {', '.join(signature)}."
                )
            plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value
            try:
                config[key] = json.loads(json.dumps(plain))
            except (TypeError, ValueError):
                kind = type(value).__name__
                raise ConfigError(
                    f"Argument {key!r} of model {name!r} is a {kind}; a checkpoint can store only numbers, "
                    "strings, lists and dicts."
                ) from None
        return config

    def build(self, config: dict[str, Any]) -> nn.Module:
        """The model, with what rebuilds it as `zoo_config`; `config` is `checked`."""
        name, needed = self.card.name, self.needed(config)
        if needed:
            raise ConfigError(f"Model {name!r} needs {', '.join(needed)}, for example {needed[0]}=...")
        try:
            model = self.builder(**config)
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            given = ", ".join(f"{key}={value}" for key, value in config.items())
            raise ConfigError(f"Model {name!r} cannot be built with {given}: {error}") from error
        model.__dict__["zoo_config"] = {"name": name, "domain": self.card.domain, "config": config}
        return model


_MODELS: dict[str, Entry] = {}
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

    Where variants differ in a table of numbers, `variant` makes such builders.

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
        _MODELS[name] = Entry(card, builder, model, official)
        return builder

    return register


def variant(name: str, model: type[nn.Module], **defaults: Any) -> Callable[..., nn.Module]:
    """A builder of this name for `register_model`: the class with other defaults."""

    def build(**options: Any) -> nn.Module:
        return model(**(defaults | options))

    known = _named_parameters(*reversed(_constructors(model)))
    own = [known[key].replace(default=value, kind=known[key].KEYWORD_ONLY) for key, value in defaults.items()]
    build.__name__, build.__module__ = name, model.__module__
    vars(build)["__signature__"] = inspect.Signature(own)
    return build


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
    return find_entry(name).model


def model_card(name: str, *, count: bool = True) -> ModelCard:
    """The card of a model, its parameters counted (unless told not to) without allocating them.

    Raises:
        UnknownName: no such model.
    """
    entry = find_entry(name)
    sizes = _example_sizes(entry)
    if not count or entry.needed(sizes):
        return entry.card
    with torch.device("meta"):
        parameters = sum(p.numel() for p in entry.builder(**sizes).parameters())
    return dataclasses.replace(entry.card, parameters=parameters, sizes=sizes)


def count_flops(name: str) -> int | None:
    """Floating-point operations of one sample forward, a multiply-add counted as two, with the card's sizes.

    None where the domain gives no example inputs, or no size for an argument without default.
    """
    from zoo.attention import backend

    entry = find_entry(name)
    domain, sizes = _DOMAINS.get(_problem_of(entry.card)), _example_sizes(entry)
    if domain is None or not domain.example_inputs or entry.needed(sizes):
        return None
    arguments = {key: parameter.default for key, parameter in entry.signature().items()} | sizes
    with FlopCounterMode(display=False) as counter, backend("blocked"), torch.no_grad():
        # The counter cannot follow a view of a parameter that requires gradients.
        entry.builder(**sizes).eval().requires_grad_(False)(*domain.load("example_inputs")(**arguments))
    return counter.get_total_flops()


def model_signature(name: str) -> dict[str, inspect.Parameter]:
    """The constructor arguments of a model by name, with the defaults of this variant."""
    return find_entry(name).signature()


def argument_docs(name: str) -> dict[str, str]:
    """What each constructor argument of a model means, from the `Args:` section of its class's docstring."""
    docs: dict[str, str] = {}
    for cls in reversed(_constructors(find_entry(name).model)):
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


def find_entry(name: str) -> Entry:
    """The model called `name`, bare or with its domain.

    Raises:
        UnknownName: there is none; the message names the nearest.
    """
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


def _named_parameters(*functions: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """By name, the later ones in place of those of the same name."""
    return {
        parameter.name: parameter
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _example_sizes(entry: Entry) -> dict[str, Any]:
    domain = _DOMAINS.get(_problem_of(entry.card))
    sizes = domain.example_sizes if domain else {}
    return {key: sizes[key] for key in entry.needed({}) if key in sizes}
