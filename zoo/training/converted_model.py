"""A trained model with its attention converted, layer by layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from rich.table import Column, Table
from torch import nn

from zoo.attention.convert import cache_bytes, convert, relative_error
from zoo.attention.layers import AttentionLayer
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.multihead import MultiHead
from zoo.create import create_model
from zoo.errors import ConfigError
from zoo.registry import model_signature
from zoo.weights.checkpoint import check_fit

Calls = dict[str, list[Inputs]]
"""What each attention layer of a model was called with, by the name of the layer."""


@dataclass(frozen=True)
class LayerLoss:
    """What the conversion of one layer costs and saves."""

    layer: str
    error: float
    """Relative, of the outputs on calibration tokens."""
    held_out: float
    """The same on tokens that the conversion has not seen."""
    parameters: tuple[int, int]
    """Before and after."""
    cache: tuple[int | None, int | None]
    """Bytes per token, see `cache_bytes`."""


def as_core_layers(model: nn.Module, argument: str = "attention") -> nn.Module:
    """The model with its own attention written as layers of the core: the same function, other names.

    A model whose attention they are already is returned as it is. Others say with
    `core_layers() -> {name: MultiHead}` which layer equals their attention, by the name of the module that
    holds another attention.

    Raises:
        ConfigError: the model has no such argument, or attention that is no layer of the core.
    """
    built = _built(model)
    name = f"{built['domain']}/{built['name']}"
    if argument not in model_signature(name):
        able = [key for key in model_signature(name) if key.endswith("attention")]
        raise ConfigError(
            f"Model {built['name']!r} has no argument {argument!r} that chooses its attention."
            + (f" It has: {', '.join(able)}." if able else "")
        )
    if built["config"].get(argument):
        return model
    if not hasattr(model, "core_layers"):
        raise ConfigError(
            f"The own attention of model {built['name']!r} is no layer of the core: it cannot be converted. "
            f"One trained with model.{argument}=multihead can."
        )
    layers = cast(dict[str, MultiHead], cast(Any, model).core_layers())
    asked = {"name": "multihead"} | next(iter(layers.values())).options()
    return rebuilt(model, argument, asked, layers)


def rebuilt(
    model: nn.Module, argument: str, asked: Mapping[str, Any], layers: Mapping[str, AttentionLayer]
) -> nn.Module:
    """The model with another attention, whose weights are those of `layers`; all other weights stay.

    Args:
        asked: the value of the argument of the constructor.
        layers: by the name of the module in the new model; those that another argument chooses are left out.
    """
    built = _built(model)
    made = create_model(f"{built['domain']}/{built['name']}", **(built["config"] | {argument: dict(asked)}))
    expected = made.state_dict()
    layers = {name: one for name, one in layers.items() if _asked(made.get_submodule(name)) == asked}
    inside = tuple(f"{name}." for name in layers)
    kept = {key: value for key, value in model.state_dict().items() if key in expected}
    state = {key: value for key, value in kept.items() if not key.startswith(inside)}
    for name, layer in layers.items():
        state |= {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    target = f"{built['name']!r} with {argument}={dict(asked)}"
    check_fit(state, expected, source="The converted model", target=target)
    made.load_state_dict(state)
    return made.to(next(model.parameters()).device).train(model.training)


@torch.no_grad()
def observe(model: nn.Module, passes: Iterable[Any], tokens: int) -> Calls:
    """What the attention layers are called with, until each has seen so many tokens.

    Args:
        passes: each step of it runs the model once.
        tokens: of each layer; the last call is cut to whole rows.
    """
    calls: Calls = {name: [] for name, m in model.named_modules() if isinstance(m, AttentionLayer)}
    left = dict.fromkeys(calls, tokens)

    def watch(name: str, layer: AttentionLayer) -> Any:
        signature = inspect.signature(layer.forward)

        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            call = Inputs(**bound.arguments)
            rows = min(-(-max(left[name], 0) // call.x.shape[1]), len(call.x))
            if rows:
                calls[name].append(_first_rows(call, rows))
                left[name] -= rows * call.x.shape[1]

        return layer.register_forward_pre_hook(record, with_kwargs=True)

    hooks = [watch(name, cast(AttentionLayer, model.get_submodule(name))) for name in calls]
    try:
        for _ in passes:
            if all(count <= 0 for count in left.values()):
                break
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def convert_model(
    model: nn.Module,
    to: str,
    calibration: Calls,
    held_out: Calls,
    *,
    argument: str = "attention",
    **options: Any,
) -> tuple[nn.Module, list[LayerLoss]]:
    """The model with its attention converted, and what that costs, layer by layer.

    Args:
        model: as `as_core_layers` leaves it.
        to: see `zoo.attention.convert.convert`.
        calibration, held_out: what its layers are called with, see `observe`.
        argument: of the constructor, that chooses the attention.
        options: of the conversion.

    Raises:
        AttentionError: a layer that cannot be converted so, or options that do not fit.
        ConfigError: the model has no such layers, or gives them no call.
    """
    asked = _normal(_built(model)["config"].get(argument))
    old = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, AttentionLayer) and layer.asked == asked
    }
    unused = [name for name in old if not (calibration.get(name) and held_out.get(name))]
    if not old or unused:
        raise ConfigError(
            f"The attention layers {', '.join(unused)} are not called for these data: nothing to fit them to."
            if unused
            else f"No attention layer of the model {_built(model)['name']!r} goes by {argument}={asked}."
        )
    made = {name: convert(layer, to, calibration[name], **options) for name, layer in old.items()}
    new = _one_choice(made)
    swapped = rebuilt(model, argument, new, made)
    losses = [
        LayerLoss(
            name,
            relative_error(made[name], layer, calibration[name]),
            relative_error(made[name], layer, held_out[name]),
            (_count(layer), _count(made[name])),
            (cache_bytes(layer), cache_bytes(made[name])),
        )
        for name, layer in old.items()
        if _asked(swapped.get_submodule(name)) == new
    ]
    return swapped, losses


def loss_table(losses: Sequence[LayerLoss]) -> Table:
    """A row per layer, named by what tells it from the others."""
    table = Table(
        Column("layer", overflow="fold"),
        "fitted",
        "held out",
        "parameters",
        "cache, bytes per token",
        title="Relative error of the outputs, on the tokens of the fit and on others",
        title_justify="left",
    )
    for name, loss in zip(_distinct([loss.layer for loss in losses]), losses, strict=True):
        before, after = ("-" if size is None else f"{size:,}" for size in loss.cache)
        table.add_row(
            name,
            f"{loss.error:.4f}",
            f"{loss.held_out:.4f}",
            f"{loss.parameters[0]:,} -> {loss.parameters[1]:,}",
            f"{before} -> {after}",
        )
    return table


def _distinct(names: Sequence[str]) -> list[str]:
    """Dotted names without the end that they share."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return [".".join(part) for part in parts]


def as_json(losses: Iterable[LayerLoss]) -> list[dict[str, Any]]:
    """For a file."""
    return [asdict(loss) for loss in losses]


def _one_choice(made: Mapping[str, AttentionLayer]) -> dict[str, Any]:
    choices = [layer.asked for layer in made.values()]
    first = choices[0]
    if first is None or any(choice != first for choice in choices):
        raise ConfigError(
            "One argument of the model chooses all of these layers, but they convert to different ones: "
            f"{'; '.join(f'{name}: {layer.asked}' for name, layer in made.items())}."
        )
    return dict(first)


def _built(model: nn.Module) -> dict[str, Any]:
    return cast(Any, model).zoo_config


def _asked(layer: nn.Module) -> Any:
    return cast(AttentionLayer, layer).asked


def _normal(asked: Any) -> dict[str, Any] | None:
    return {"name": asked} if isinstance(asked, str) else asked


def _first_rows(call: Inputs, rows: int) -> Inputs:
    x, context, mask, positions, _ = call
    return Inputs(
        x[:rows].clone(),
        None if context is None else context[:rows].clone(),
        None if mask is None else mask[:rows].clone(),
        positions[:rows] if positions is not None and positions.ndim == 2 else positions,
        None,
    )


def _count(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
