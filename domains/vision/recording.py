"""One forward and backward pass over an image, with all that the attention of a backbone did."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from domains.vision.models.lwganet import LargeKernelAttention, MediumAttention, PointAttention
from zoo.attention.capture import AttentionMap, capture
from zoo.attention.patterns import Both, Pattern
from zoo.attention.routed import Routed
from zoo.errors import ConfigError, did_you_mean
from zoo.explain import Places, find_places, received, seen_from, token_mixing
from zoo.weights.checkpoint import matches

Point = tuple[float, float]
"""Fractions of the height and the width of an image, from the upper left corner."""

STAGE = re.compile(r"stages\.\d+(\.\d+)?$")
HEADS = re.compile(r"\.heads\.\d+")


@dataclass(frozen=True)
class Layer:
    """The maps of one attention: several where its heads attend one after the other.

    Attributes:
        name: of the module.
        maps: with their weights in the graph.
        places: of queries and keys of each map; None where the tokens do not lie on the map.
    """

    name: str
    maps: list[AttentionMap]
    places: list[tuple[Places, Places]] | None

    @property
    def num_heads(self) -> int:
        return sum(found.sizes[1] for found in self.maps)

    @property
    def asks(self) -> bool:
        """Whether its queries lie on the map; those of a pool do not."""
        return self.places is not None and all(bool((queries.cells >= 0).any()) for queries, _ in self.places)

    @property
    def routed(self) -> Routed | None:
        """The pattern of a layer that routes."""
        return _routed(self.maps[0].pattern)

    def seen(self, point: Point) -> tuple[Tensor, Places]:
        """What the query at a point attends to as a map `(rows, columns)`, mean of the heads, and its cells.

        For queries without a place, such as those of a pool, the mean of all.
        """
        assert self.places is not None
        total, keys = 0, self.places[0][1]
        for found, (queries, keys) in zip(self.maps, self.places, strict=True):
            at = queries.token_at(point)
            if at is None:
                weights = received(found).sum(1) / found.sizes[2]
            else:
                weights = torch.zeros(keys.cells.shape).to(found.values)
                weights[at[0]] = seen_from(found, *at).sum(0)
            total = total + keys.raster(weights)
        return torch.as_tensor(total) / self.num_heads, keys

    def relevance(self) -> tuple[Tensor, Places]:
        """How much what is seen where speaks for the class, as a map `(rows, columns)`, and its cells.

        Weights times the gradient of the class score by them, where positive, summed over queries and heads
        (after Chefer et al. 2021, equation 5).
        """
        assert self.places is not None
        total, keys = 0, self.places[0][1]
        for found, (_, keys) in zip(self.maps, self.places, strict=True):
            gradients = [
                torch.zeros_like(t.weights) if t.weights.grad is None else t.weights.grad for t in found.tiles
            ]
            parts = [(t.weights * g).clamp(min=0) for t, g in zip(found.tiles, gradients, strict=True)]
            total = total + keys.raster(received(found, parts).sum(1))
        return torch.as_tensor(total), keys

    def mixing(self) -> Tensor | None:
        """The mean of the heads among the cells of a grid `(1, G, G)`; None where queries are not keys."""
        if self.places is None or not self.asks or any(q.grid != k.grid for q, k in self.places):
            return None
        return token_mixing(self.maps, [queries for queries, _ in self.places])


@dataclass
class Recording:
    """What happened to one image.

    Attributes:
        probabilities: of the classes.
        target: the class whose score was differentiated.
        layers: in the order in which they ran.
        gates: maps of (0, 1) that multiply features, by module name, mean of the channels.
    """

    probabilities: Tensor
    target: int
    layers: list[Layer]
    gates: dict[str, Tensor] = field(default_factory=dict)


def record(
    model: nn.Module, image: Tensor, *, target: int | None = None, layers: Sequence[str] = ()
) -> Recording:
    """Run a model on an image `(1, C, H, W)` and keep the attention.

    Args:
        target: the class whose score is differentiated; None = the predicted one.
        layers: modules, by name or glob, with all inside of them; none: all.

    Raises:
        ConfigError: a layer that the model does not have, or a class.
        AttentionError: no attention was captured; it says why.
    """
    check_layers(model, layers)
    globs = [glob for name in layers for glob in (name, f"{name}.*")] or None
    sizes: dict[str, list[tuple[int, int]]] = {}
    gates: dict[str, Tensor] = {}
    with (
        _map_sizes(model, sizes),
        _gates(model, gates),
        torch.enable_grad(),
        capture(model, modules=globs, grad=True) as maps,
    ):
        logits = model(image.detach().requires_grad_())
    if logits.ndim != 2 or not getattr(model, "num_classes", 0):
        raise ConfigError("The model has no classes, only features: explain a classifier.")
    chosen = int(logits.argmax()) if target is None else target
    if not 0 <= chosen < logits.shape[1]:
        raise ConfigError(f"target={chosen}: the model has classes 0 to {logits.shape[1] - 1}.")
    model.zero_grad()
    logits[0, chosen].backward()
    model.zero_grad()
    found = _layers(model, maps, sizes)
    return Recording(logits[0].detach().softmax(-1), chosen, found, gates)


def check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    """Raises `ConfigError` for a name or glob that no module has."""
    names = [name for name, _ in model.named_modules() if name]
    for layer in layers:
        if not any(matches(name, [layer]) for name in names):
            likely = [name for name in names if "att" in name.rpartition(".")[2]] or names
            raise ConfigError(
                f"layer={layer}: the model has no such module.{did_you_mean(layer, names)} "
                f"It has, for example, {', '.join(likely[:4])}."
            )


def _layers(
    model: nn.Module, maps: dict[str, AttentionMap], sizes: dict[str, list[tuple[int, int]]]
) -> list[Layer]:
    groups: dict[str, list[AttentionMap]] = {}
    for name, found in maps.items():
        groups.setdefault(HEADS.sub("", name), []).append(found)
    layers = []
    for name, found in groups.items():
        module = found[0].name
        order, behind = (
            _said(model, module, "token_order", "windows"),
            _said(model, module, "tokens_behind", 0),
        )
        places = None
        for grid in _grids(name, sizes):
            guesses = [find_places(one, 1, grid, order=order, behind=behind) for one in found]
            if None not in guesses:
                places = [guess for guess in guesses if guess is not None]
                break
        layers.append(Layer(name, found, places))
    return layers


def _said(model: nn.Module, name: str, attribute: str, default: Any) -> Any:
    """What a module says of its tokens, or the nearest one around it."""
    parts = name.split(".")
    modules = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), 0, -1))
    return next((getattr(m, attribute) for m in modules if hasattr(m, attribute)), default)


def _grids(name: str, sizes: dict[str, list[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """Sizes of the maps that come out of, and go into, the block of a layer, and come out of its stage."""
    parts = name.split(".")
    stages = [key for key in sizes if key.count(".") == 1]
    if parts[0] == "stages":
        yield from sizes.get(".".join(parts[:3]), [])
        yield from sizes.get(".".join(parts[:2]), [])[:1]
    elif stages:
        yield from sizes[max(stages, key=lambda key: int(key.partition(".")[2]))][:1]


@contextmanager
def _map_sizes(model: nn.Module, sizes: dict[str, list[tuple[int, int]]]) -> Iterator[None]:
    """Fills in the height and width of the maps after and before each stage and block."""

    def keep(_module: nn.Module, inputs: Any, output: Any, name: str) -> None:
        found = [size for size in (_size(output), _size(inputs)) if size is not None]
        sizes[name] = list(dict.fromkeys(found))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if STAGE.fullmatch(name):
                stack.callback(module.register_forward_hook(partial(keep, name=name)).remove)
        yield


def _size(value: Any) -> tuple[int, int] | None:
    first = value[0] if isinstance(value, tuple) and value else value
    first = first[0] if isinstance(first, tuple) and first else first
    if isinstance(first, Tensor) and first.ndim == 4:
        return first.shape[2], first.shape[3]
    return None


@contextmanager
def _gates(model: nn.Module, gates: dict[str, Tensor]) -> Iterator[None]:
    """Fills in the gates of LWGANet: by pixel, of the medium range, and of near and wide kernels."""

    def keep(_module: nn.Module, _inputs: Any, output: Tensor, name: str) -> None:
        gates[name] = output.detach().sigmoid()[0].mean(0)

    kinds = {PointAttention: "reduce", MediumAttention: "norm", LargeKernelAttention: "gates"}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            inner = kinds.get(type(module))  # pyright: ignore[reportArgumentType]
            if inner is not None:
                hook = partial(keep, name=name)
                stack.callback(module.get_submodule(inner).register_forward_hook(hook).remove)
        yield


def _routed(pattern: Pattern) -> Routed | None:
    if isinstance(pattern, Both):
        return _routed(pattern.leader) or _routed(pattern.other)
    return pattern if isinstance(pattern, Routed) else None
