"""The contract of every attention layer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from zoo.attention.cache import Cache
from zoo.attention.errors import AttentionError
from zoo.attention.packed import Groups
from zoo.attention.patterns import Padding, Pattern
from zoo.errors import UnknownName, did_you_mean

LAYERS: dict[str, type[AttentionLayer]] = {}


@dataclass(frozen=True)
class Supports:
    """What a mechanism can do; `zoo list attention` prints it, and the tests hold the layers to it."""

    bidirectional: bool = False
    """Every token may see later ones (`causal=False`)."""
    causal: bool = False
    """Tokens see themselves and earlier ones (`causal=True`)."""
    cross: bool = False
    """Takes keys and values from `context`."""
    padding: bool = False
    """Takes a bool mask."""
    packed: bool = False
    """Takes integer document ids as mask."""
    cache: bool = False
    """Decodes step by step."""
    any_length: bool = True
    """Takes any number of tokens; otherwise a multiple of something, or at least so many."""
    batch_invariant: bool = True
    """A row alone gives what it gives in a batch."""
    maps: bool = True
    """`capture` records what its queries attend to; a recurrence has no weights to record."""


class Inputs(NamedTuple):
    """What a layer is called with; see `AttentionLayer.forward`."""

    x: Tensor
    context: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    cache: Cache | None


class AttentionLayer(nn.Module):
    """Maps tokens `(B, N, dim)` to tokens `(B, N, dim)`.

    A subclass sets `supports` and `causal`, defines `mix`, and `init_cache` where it decodes; declaring it
    with `class X(AttentionLayer, name="x")` lists it for `create_attention` and `zoo list attention`.
    """

    supports: ClassVar[Supports]
    family: ClassVar[str]
    """The module that it stands in."""
    paper: ClassVar[str] = ""
    dim: int
    causal: bool = False
    context_dim: int | None = None
    """Width of the context; None = that of the tokens."""
    aux_loss: Tensor | None = None
    """What the mechanism wants minimised beside the loss of its model, of the last forward pass in training
    mode; `auxiliary_loss` collects it."""
    asked: Mapping[str, Any] | None = None
    """What `create_attention` was asked for: the name, and the arguments given with it."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.family = cls.__module__.rpartition(".")[2]
        if name is not None:
            LAYERS[name] = cls

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Attention of `x` to itself, or to `context`.

        Args:
            x: `(B, N, dim)`.
            context: `(B, M, dim)`, where keys and values come from; None = `x`.
            mask: bool `(B, M)`, True = a real token, as in SDPA; or integers `(B, N)`, the document of each
                token in a packed row: tokens see their own document only.
            positions: integers `(N,)` or `(B, N)`; by default they count on from those of the cache.
            cache: of `init_cache`; the tokens of `x` follow those that it has seen.

        Raises:
            AttentionError: something that this mechanism does not support, or shapes that do not fit.
        """
        given = Inputs(x, context, mask, positions, cache)
        self._check(given)
        return self.mix(given)

    def mix(self, given: Inputs) -> Tensor:
        """What `forward` does, with what has been checked."""
        raise NotImplementedError

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache for `batch_size` rows."""
        raise AttentionError(f"{type(self).__name__} has no cache: it cannot decode step by step")

    @torch.no_grad()
    def step(self, x: Tensor, cache: Cache) -> Tensor:
        """The next token(s) `(B, n, dim)` after those of the cache; equal to the full forward pass."""
        return self(x, cache=cache)

    def _check(self, given: Inputs) -> None:
        x, context, mask, positions, cache = given
        name, can = type(self).__name__, self.supports
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise AttentionError(f"{name} takes (B, N, {self.dim}), not {tuple(x.shape)}")
        if context is not None:
            if not can.cross:
                raise AttentionError(f"{name} attends to its own tokens only: it takes no context")
            width = self.dim if self.context_dim is None else self.context_dim
            if context.ndim != 3 or len(context) != len(x) or context.shape[-1] != width:
                raise AttentionError(f"context is ({len(x)}, M, {width}), not {tuple(context.shape)}")
        if mask is not None:
            self._check_mask(mask, (len(x), x.shape[1] if context is None else context.shape[1]))
        if positions is not None and tuple(positions.shape) not in ((x.shape[1],), tuple(x.shape[:2])):
            raise AttentionError(
                f"positions are (N,) or (B, N) for N = {x.shape[1]}, not {tuple(positions.shape)}"
            )
        if cache is not None:
            if cache.layer is not self:
                raise AttentionError(f"this cache belongs to another layer, a {type(cache.layer).__name__}")
            if context is not None:
                raise AttentionError("a cache holds the layer's own tokens: context cannot come with it")

    def _check_mask(self, mask: Tensor, sizes: tuple[int, int]) -> None:
        name, can = type(self).__name__, self.supports
        if mask.is_floating_point():
            raise AttentionError(
                f"a mask is bool (True = attend) or integer (document ids), not {mask.dtype}"
            )
        if tuple(mask.shape) != sizes:
            raise AttentionError(f"a mask has one entry per key, {sizes}, not {tuple(mask.shape)}")
        if mask.dtype == torch.bool and not can.padding:
            raise AttentionError(f"{name} does not take padded rows")
        if mask.dtype != torch.bool and not can.packed:
            raise AttentionError(f"{name} does not take packed documents")


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The sum of what the attention layers of a model want minimised, taken out of them; 0 without any."""
    total: Tensor | float = 0.0
    for module in model.modules():
        if isinstance(module, AttentionLayer) and module.aux_loss is not None:
            total = total + module.aux_loss
            module.aux_loss = None
    return total


def head_width(width: int, num_heads: int) -> int:
    """Channels of each of `num_heads` heads that share a width evenly."""
    if num_heads < 1 or width < 1 or width % num_heads:
        raise AttentionError(f"width {width} is not divisible by {num_heads} heads")
    return width // num_heads


def masked(pattern: Pattern, mask: Tensor | None) -> Pattern:
    """What a layer's mask leaves of a pattern: real tokens, or those of the same document."""
    if mask is None:
        return pattern
    return pattern & (Padding(mask) if mask.dtype == torch.bool else Groups(mask))


def create_attention(
    attention: str | Mapping[str, Any], dim: int, *, causal: bool | None = None, **defaults: Any
) -> AttentionLayer:
    """The attention layer that a name, or a mapping with a name and arguments, asks for.

    Args:
        attention: `"gated"`, or `{"name": "mla", "kv_rank": 64}`; its arguments win over those below.
        dim: width of the tokens.
        causal: the direction; None = as the layer has it by default.
        defaults: arguments such as `num_heads`.

    Raises:
        UnknownName: no layer of that name.
        AttentionError: an argument that the layer does not have, or a direction that it cannot do.
    """
    asked: dict[str, Any] = {"name": attention} if isinstance(attention, str) else dict(attention)
    name, options = str(asked.get("name")), defaults | {k: v for k, v in asked.items() if k != "name"}
    layer = find_layer(name)
    direction = _direction(name, options.pop("causal", causal))
    check_options(name, options)
    made = layer(dim, **options, **direction)
    made.asked = asked
    return made


def create_map_attention(
    attention: str | Mapping[str, Any], dim: int, shape: Sequence[int], **defaults: Any
) -> AttentionLayer:
    """`create_attention` for the tokens of a map, looking both ways.

    Args:
        shape: height and width of the map; layers that know of grids get it, as the size of their position
            tables. Maps of other sizes go through `on_tokens` as well.
    """
    name = attention if isinstance(attention, str) else str(attention.get("name"))
    grid = {"shape": tuple(shape)} if "shape" in layer_options(find_layer(name)) else {}
    return create_attention(attention, dim, causal=False, **grid, **defaults)


def on_tokens(layer: AttentionLayer, x: Tensor, shape: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """A layer on tokens `(B, N, C)` that fill a map of this height and width row by row.

    Class tokens stand before those of the map, for layers that take them.
    """
    if hasattr(layer, "shape"):
        layer.shape = tuple(shape)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    return layer(x, mask=mask)


def check_supports(layer: AttentionLayer, *abilities: str, reason: str) -> None:
    """Raises `AttentionError` where a layer that looks both ways lacks what a model needs of it.

    Args:
        abilities: fields of `Supports`.
        reason: what the model needs them for, "batches hold images of several sizes".
    """
    lacking = [ability for ability in abilities if not getattr(layer.supports, ability)]
    if lacking:
        able = able_layers("bidirectional", *abilities)
        raise AttentionError(
            f"{type(layer).__name__} has no {', no '.join(lacking)} among what it supports, but {reason}. "
            f"These do: {', '.join(able)}."
        )


def able_layers(*abilities: str) -> list[str]:
    """Names of the layers that support all of these."""
    return sorted(
        name for name, layer in LAYERS.items() if all(getattr(layer.supports, a) for a in abilities)
    )


def find_layer(name: str) -> type[AttentionLayer]:
    """The class of a layer.

    Raises:
        UnknownName: no layer of that name.
    """
    import zoo.attention.layers  # noqa: F401  (its modules list their layers)

    if name not in LAYERS:
        raise UnknownName(
            f"There is no attention layer {name!r}.{did_you_mean(name, LAYERS)} "
            "`zoo list attention` shows them."
        )
    return LAYERS[name]


def layer_options(layer: type[AttentionLayer]) -> dict[str, inspect.Parameter]:
    """The arguments of a layer's constructor after `dim`, those handed on to its base class included."""
    found: dict[str, inspect.Parameter] = {}
    for cls in layer.__mro__:
        own = inspect.signature(cls.__init__).parameters
        found |= {k: p for k, p in own.items() if p.kind is not p.VAR_KEYWORD and k not in found}
        if all(p.kind is not p.VAR_KEYWORD for p in own.values()):
            break
    return {k: p for k, p in found.items() if k not in ("self", "dim")}


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises `AttentionError` where a layer has no such arguments, or lacks one without a default."""
    known = layer_options(LAYERS[name])
    for option in options:
        if option not in known:
            raise AttentionError(
                f"Attention {name!r} has no argument {option!r}.{did_you_mean(option, known)} "
                f"It has: {', '.join(known)}."
            )
    for option in ("num_heads", "num_kv_heads"):
        if option in options and not isinstance(options[option], int | None):
            raise AttentionError(
                f"{option} of attention {name!r} is a whole number, not {options[option]!r}."
            )
    missing = [k for k, p in known.items() if p.default is p.empty and k not in options]
    if missing:
        raise AttentionError(f"Attention {name!r} needs {', '.join(missing)}.")


def _direction(name: str, causal: bool | None) -> dict[str, bool]:
    """The argument that gives a layer the direction; a layer of one direction has none."""
    can = LAYERS[name].supports
    if causal is None:
        return {}
    if can.causal and can.bidirectional:
        return {"causal": causal}
    wanted = "causal" if causal else "bidirectional"
    if not getattr(can, wanted):
        able = ", ".join(able_layers(wanted))
        raise AttentionError(f"Attention {name!r} is not {wanted}. These are: {able}.")
    return {}
