"""Models by name: newly built, from a checkpoint, with published weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from zoo.errors import CheckpointError, ConfigError, UnknownName, did_you_mean
from zoo.registry import Entry, find_entry, load_object
from zoo.weights.cards import WeightCard, weight_card
from zoo.weights.checkpoint import load_state, read_state_dict, told_by
from zoo.weights.exchange import build_official, fill, read_official, told_options
from zoo.weights.formats import read_tensors


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
    entry = find_entry(name)
    if tag:
        pretrained = _choose_card(entry, tag).name if pretrained is True else pretrained
    config = entry.checked(overrides)
    if pretrained and checkpoint_path is not None:
        raise ConfigError("Give pretrained or checkpoint_path, not both.")
    if pretrained:
        return _from_card(entry, _choose_card(entry, pretrained), config)
    if checkpoint_path is not None:
        return _from_checkpoint(entry, checkpoint_path, config)
    return entry.build(config)


def _from_checkpoint(entry: Entry, path: str | Path, config: dict[str, Any]) -> nn.Module:
    if Path(path).is_dir():
        return build_official(entry, *read_official(entry, path), config, str(path))[0]
    state, metadata = read_tensors(path)
    if (options := told_options(entry, metadata)) is not None:
        return build_official(entry, state, options, config, str(path))[0]
    meta = told_by(metadata, path)
    stored = meta.get("model", {"name": entry.card.name, "config": {}})
    if stored["name"] != entry.card.name:
        raise CheckpointError(f"{path} holds a {stored['name']!r}, not a {entry.card.name!r}.")
    model = entry.build(stored["config"] | config)
    if meta:
        load_state(model, state, source=str(path))
    else:
        fill(entry, model, state, str(path))
    return model


def _choose_card(entry: Entry, pretrained: bool | str) -> WeightCard:
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


def _from_card(entry: Entry, card: WeightCard, config: dict[str, Any]) -> nn.Module:
    """Official weights of the whole model, or, with a converter of its own, a start for part of it."""
    from zoo.weights.download import fetch

    path = fetch(card)
    if not card.converter:
        state, options = read_official(entry, path)
        return build_official(entry, state, options | card.config, config, str(path))[0]
    model = entry.build(card.config | config)
    tensors = load_object(card.converter)(read_state_dict(path), model)
    kept = [name for name in model.state_dict() if name not in tensors]
    load_state(model, tensors, skip=kept, source=str(path))
    return model
