"""Weights of a model in the layout of its official program: read into our models, and written from them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError, ConfigError, did_you_mean
from zoo.registry import Entry, find_entry, get_domain, list_domains, load_object
from zoo.weights.cards import is_non_commercial
from zoo.weights.checkpoint import LoadReport, check_fit, load_state, matches, read_state_dict
from zoo.weights.formats import read_tensors
from zoo.weights.official import OfficialLayout


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
    entry = find_entry(name)
    if isinstance(checkpoint, Mapping):
        state, source = _as_tensors(checkpoint), "The given state dict"
    else:
        state, options = read_official(entry, checkpoint)
        official_config, source = options | official_config, str(checkpoint)
    model, report = build_official(entry, state, official_config, {}, source)
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
    return fill(_entry_of(model), model, state, source)


def fill(entry: Entry, model: nn.Module, state: dict[str, Tensor], source: str) -> LoadReport:
    """`load_weights`, of tensors that were read."""
    if entry.official is None or state.keys() == model.state_dict().keys():
        return load_state(model, state, source=source)
    return _fill_official(entry, model, _canonical(entry, state), source, fit=True)


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


def _entry_of(model: nn.Module) -> Entry:
    built = getattr(model, "zoo_config", None)
    if built is None:
        raise CheckpointError(
            f"This {type(model).__name__} was not built by zoo.create_model, so its layout is unknown."
        )
    return find_entry(f"{built['domain']}/{built['name']}")


def build_official(
    entry: Entry,
    state: dict[str, Tensor],
    official_config: dict[str, Any],
    overrides: dict[str, Any],
    source: str,
) -> tuple[nn.Module, LoadReport]:
    """`load_official`, of tensors that were read.

    Args:
        overrides: constructor arguments that win over what the file stands for; the weights are fitted.
    """
    layout, name = _layout(entry), entry.card.name
    _check_options(layout, name, official_config)
    state = _canonical(entry, state)
    try:
        config = _official_arguments(layout, state, official_config)
    except KeyError as error:
        reason = f"it has no tensor {error}"
        raise CheckpointError(f"{source} is no official checkpoint of {name!r}: {reason}.") from None
    model = entry.build(entry.checked(config) | overrides)
    return model, _fill_official(entry, model, state, source, fit=bool(overrides))


def _official_arguments(
    layout: type[OfficialLayout], state: dict[str, Tensor], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Constructor arguments of ours, from the tensors and the options of the official program."""
    same = {name: value for name, value in options.items() if name in layout.same}
    config = layout.config(state, **{name: value for name, value in options.items() if name not in same})
    return config | {name: value for name, value in same.items() if value is not None}


def _notice(entry: Entry) -> None:
    """Says so where official weights may not be used commercially."""
    name, licence = entry.card.name, entry.card.licence
    if is_non_commercial(licence):
        warnings.warn(
            f"The official weights of {name!r} are under {licence}: no commercial use.", stacklevel=5
        )


def _canonical(entry: Entry, state: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = _layout(entry)
    return {key: value for key, value in layout.canonical(state).items() if not matches(key, layout.ignored)}


def _fill_official(
    entry: Entry, model: nn.Module, state: dict[str, Tensor], source: str, *, fit: bool
) -> LoadReport:
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


def _layout(entry: Entry) -> type[OfficialLayout]:
    if entry.official is None:
        raise CheckpointError(
            f"Model {entry.card.name!r} has no official checkpoint layout ({entry.card.status})."
        )
    return entry.official


def _check_options(layout: type[OfficialLayout], name: str, options: Mapping[str, Any]) -> None:
    parameters = layout.options().values()
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


def read_official(entry: Entry, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a file or folder of the official program, and the options that it tells."""
    if Path(path).is_dir() and entry.official is not None:
        found = entry.official.read_folder(Path(path))
        if found is not None:
            return found
    state, metadata = read_tensors(path)
    return state, told_options(entry, metadata) or {}


def told_options(entry: Entry, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The options that a file of the official program tells, as far as the layout knows them; None: none."""
    return _layout(entry).told(json.loads(metadata["official"])) if "official" in metadata else None


def _as_tensors(state: Mapping[str, Tensor | np.ndarray]) -> dict[str, Tensor]:
    return {key: v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)) for key, v in state.items()}
