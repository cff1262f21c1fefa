"""Optimisers with their parameter groups, and learning-rate schedules as functions of the step."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from zoo.errors import ConfigError, did_you_mean
from zoo.training.muon import Muon

OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__.lower(): cls
    for cls in vars(torch.optim).values()
    if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls not in (Optimizer, torch.optim.LBFGS)
} | {"muon": Muon}
COMMON = ("betas", "eps")  # in the default config, not known to every optimiser


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    layer_decay: float = 1.0,
    lr_factors: Mapping[str, float] | None = None,
    **options: Any,
) -> Optimizer:
    """The optimiser `name` over the trainable parameters of `model`: a class of `torch.optim`, or `muon`.

    Of `zoo.training.muon.Muon`, the weights of linear layers in lists of blocks (`nn.ModuleList`) are the
    matrices; first and last layers, embeddings, biases and norms are not.

    Args:
        model: its tensors of at most one dimension, and those that its optional `no_weight_decay()` names
            (globs), get no weight decay.
        name: class name in lower case, such as `adamw`.
        layer_decay: factor on the learning rate from each layer to the one before it; layers are what
            timm's `group_matcher()` of the model says, else its children.
        lr_factors: factors on the learning rate of parameters by globs of their names, of which the first
            that matches counts.
        options: `lr`, `weight_decay`, `betas`, `eps` and whatever else the class takes.

    Raises:
        ConfigError: unknown optimiser or option, a glob that matches nothing, or a model without trainable
            parameters.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"There is no optimizer.name={name}.{did_you_mean(name, OPTIMIZERS)}")
    known = inspect.signature(OPTIMIZERS[name]).parameters
    options = {key: value for key, value in options.items() if key in known or key not in COMMON}
    for key in options:
        if key not in known:
            raise ConfigError(f"{name} has no option optimizer.{key}.{did_you_mean(key, known)}")
    if not options["lr"] > 0:
        raise ConfigError(f"optimizer.lr={options['lr']}: a positive number is needed.")
    weight_decay = options.pop("weight_decay", 0.0)
    factors = lr_factors or {}
    groups = parameter_groups(
        model, lr=options["lr"], weight_decay=weight_decay, layer_decay=layer_decay, factors=factors
    )
    if not groups:
        raise ConfigError("The model has no trainable parameter; see finetune.freeze.")
    if name == "muon":
        groups = _apart(groups, _matrices(model))
    return OPTIMIZERS[name](groups, **options)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay (on or off), by depth where `layer_decay` differs from 1, and by
    the factors on their learning rate.
    """
    factors = factors or {}
    names = [name for name, _ in model.named_parameters()]
    for glob in factors:
        if not fnmatch.filter(names, glob):
            raise ConfigError(f"optimizer.lr_factors: no parameter matches {glob!r}.")
    exempt = set(getattr(model, "no_weight_decay", set)())
    below = _layers_below(model) if layer_decay != 1.0 else defaultdict(int)
    groups: dict[tuple[int, bool, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not any(fnmatch.fnmatch(name, pattern) for pattern in exempt)
            factor = next((f for glob, f in factors.items() if fnmatch.fnmatch(name, glob)), 1.0)
            groups[below[name], decays, factor].append(parameter)
    return [
        {
            "params": parameters,
            "lr": lr * layer_decay**depth * factor,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays, factor), parameters in groups.items()
    ]


def _matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers in lists of blocks."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    linear = (m for blocks in lists for m in blocks.modules() if isinstance(m, nn.Linear))
    return {cast(nn.Parameter, layer.weight) for layer in linear}


def _apart(groups: Iterable[dict[str, Any]], matrices: set[nn.Parameter]) -> list[dict[str, Any]]:
    """Each group in two: `matrices`, and the others."""
    parts = [
        group | {"params": [p for p in group["params"] if (p in matrices) == which], "matrices": which}
        for group in groups
        for which in (True, False)
    ]
    return [part for part in parts if part["params"]]


def _layers_below(model: nn.Module) -> Mapping[str, int]:
    """How many layers each parameter is away from the output."""
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "group_matcher"):
        from timm.models import group_parameters

        place = cast(dict[str, int], group_parameters(model, cast(Any, model).group_matcher(), reverse=True))
        return {name: max(place.values()) - place[name] for name in names}
    layers = _layers(model)
    return {name: len(layers) - _depth(name, layers) for name in names}


def _layers(model: nn.Module) -> list[str]:
    """Names of the children in the order in which data meets them, lists of blocks taken apart."""
    names: list[str] = []
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList | nn.Sequential) else ()
        names += [f"{name}.{part}" for part, _ in parts] or [name]
    return names


def _depth(name: str, layers: Iterable[str]) -> int:
    """1-based place of the layer that holds the parameter; 0 for a parameter of the model itself."""
    return next((i for i, layer in enumerate(layers, 1) if name.startswith(f"{layer}.")), 0)


def build_schedule(
    *,
    lr: float,
    total_steps: int,
    steps_per_epoch: Fraction,
    name: str = "constant",
    warmup_steps: int = 0,
    warmup_epochs: float = 0,
    min_lr: float = 0.0,
    gamma: float = 0.7,
    every_steps: int | None = None,
    every_epochs: int = 1,
) -> Callable[[int], float]:
    """The factor on the learning rate as a function of the optimiser steps taken.

    Args:
        lr: the rate that the factor multiplies.
        total_steps: length of the run.
        steps_per_epoch: samples per epoch over samples per step.
        name: `constant`; `cosine` down to `min_lr` at the last step; `step`, times `gamma` once per period;
            `exponential`, the same without the stairs.
        warmup_steps, warmup_epochs: the first steps, or those of the first epochs, rise linearly.
        min_lr: the rate never falls below it after the warm-up; one that starts below it stays.
        every_steps, every_epochs: the period; see `period`.

    Raises:
        ConfigError: there is no schedule of this name.
    """
    floor, steps = min(min_lr / lr, 1.0), period(steps_per_epoch, every_steps, every_epochs)
    warmup_steps = warmup_steps or int(warmup_epochs * steps_per_epoch)
    curves: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: (
            floor + (1 - floor) * _half_cosine((step - warmup_steps) / max(1, total_steps - warmup_steps))
        ),
        "step": lambda step: gamma ** (step // steps),
        "exponential": lambda step: gamma ** (step / steps),
    }
    if name not in curves:
        raise ConfigError(
            f"There is no schedule.name={name}.{did_you_mean(name, curves)} Schedules: {', '.join(curves)}."
        )
    curve = curves[name]
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else max(floor, curve(step))


def period(steps_per_epoch: Fraction, every_steps: int | None, every_epochs: float) -> int:
    """Optimiser steps of a period: `every_steps`, else those of `every_epochs`, rounded down."""
    return max(1, every_steps or int(every_epochs * steps_per_epoch))


def _half_cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
