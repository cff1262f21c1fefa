"""Which layer can become which, and the one way to ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from zoo.attention.convert.calls import Tokens, calls_of
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import LAYERS, AttentionLayer, Inputs
from zoo.attention.layers.multihead import MultiHead
from zoo.errors import did_you_mean

Make = TypeVar("Make", bound=Callable[..., AttentionLayer])
"""`(layer, calls, *, options)` to the layer converted."""


class Conversion(NamedTuple):
    """One way to convert."""

    make: Callable[..., AttentionLayer]
    takes: Callable[[AttentionLayer], bool]
    source: str
    """What `takes` says yes to, in words."""
    calibrated: bool
    """Whether it needs tokens."""


CONVERSIONS: dict[str, Conversion] = {}


def conversion(
    to: str, source: str, takes: Callable[[AttentionLayer], bool], *, calibrated: bool
) -> Callable[[Make], Make]:
    """Lists a function `(layer, calls, *, options) -> layer` as the conversion `to`."""

    def listed(make: Make) -> Make:
        CONVERSIONS[to] = Conversion(make, takes, source, calibrated)
        return make

    return listed


def convert(layer: AttentionLayer, to: str, tokens: Tokens | None = None, **options: Any) -> AttentionLayer:
    """The layer of another kind that is closest to a trained one; the trained one stays as it is.

    | to | from | how | options |
    | --- | --- | --- | --- |
    | gqa, mqa | layers with shared heads | mean of consecutive key/value heads | num_kv_heads |
    | mla | MultiHead | TransMLA | kv_rank, q_rank, rope_dim, freqfold, balance, norm |
    | linear | MultiHead | learned feature maps, attention transfer | features, steps, lr |
    | lolcats | causal MultiHead | the same beside softmax in a window | window, features, affine, steps, lr |
    | moh | MultiHead | router fitted to what the heads give | shared_heads, routed_heads, balance_weight |

    Args:
        layer: with its weights.
        to: a key of `CONVERSIONS`.
        tokens: calibration: tokens as the layer meets them, or its calls; all but gqa and mqa need them.
        options: of the conversion.

    Returns:
        The layer, in the mode and with the dtype of the given one; `asked` is what `create_attention` makes
        such a layer of. `relative_error` says what was lost.

    Raises:
        AttentionError: no such conversion, or not of this layer; options that do not fit; no tokens.
    """
    if to not in CONVERSIONS:
        raise AttentionError(
            f"There is no conversion to {to!r}.{did_you_mean(to, CONVERSIONS)} There are: "
            f"{', '.join(sorted(CONVERSIONS))}."
        )
    chosen = CONVERSIONS[to]
    if not chosen.takes(layer):
        raise AttentionError(_refusal(layer, to))
    check_options(to, options)
    calls = calls_of(tokens) if tokens is not None else []
    if chosen.calibrated and not calls:
        raise AttentionError(
            f"The conversion to {to!r} is fitted to tokens: give some as the layer meets them."
        )
    _check_calls(layer, calls)
    return chosen.make(layer, calls, **options).train(layer.training)


def conversion_options(to: str) -> dict[str, inspect.Parameter]:
    """The options of a conversion, by name."""
    parameters = inspect.signature(CONVERSIONS[to].make).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}


def asked_of(layer: AttentionLayer) -> dict[str, Any] | None:
    """What `create_attention` makes such a layer of; None where that cannot be told."""
    if layer.asked is not None:
        return dict(layer.asked)
    if type(layer) is MultiHead and layer.yarn is None:
        return {"name": "multihead"} | layer.options()
    return None


def plain(layer: AttentionLayer, *, whole_rotary: bool = False) -> bool:
    """Whether it is softmax attention of its own tokens and nothing else, save rotary positions."""
    return (
        type(layer) is MultiHead
        and layer.window is None
        and layer.yarn is None
        and layer.context_dim in (None, layer.dim)
        and not hasattr(layer.q_norm, "eps")
        and (not whole_rotary or layer.rotary_dim == layer.head_dim)
    )


def _refusal(layer: AttentionLayer, to: str) -> str:
    kind = name_of(layer)
    able = sorted(name for name, other in CONVERSIONS.items() if other.takes(layer))
    rest = f"It can become: {', '.join(able)}." if able else "It can become nothing else."
    return (
        f"Attention {kind!r} as it is here cannot become {to!r}: that takes {CONVERSIONS[to].source}. {rest}"
    )


def name_of(layer: AttentionLayer) -> str:
    """The name by which a layer is listed, or else that of its class."""
    return next((name for name, kind in LAYERS.items() if kind is type(layer)), type(layer).__name__)


def check_options(to: str, options: Mapping[str, Any]) -> None:
    """An AttentionError for a name that is no option of the conversion, or an option that it lacks."""
    known = conversion_options(to)
    for name in options:
        if name not in known:
            raise AttentionError(
                f"The conversion to {to!r} has no option {name!r}.{did_you_mean(name, known)} "
                f"It has: {', '.join(known) or 'none'}."
            )
    missing = [name for name, p in known.items() if p.default is p.empty and name not in options]
    if missing:
        raise AttentionError(f"The conversion to {to!r} needs {', '.join(missing)}.")


def _check_calls(layer: AttentionLayer, calls: Sequence[Inputs]) -> None:
    for call in calls:
        if call.x.ndim != 3 or call.x.shape[-1] != layer.dim:
            raise AttentionError(f"calibration tokens are (B, N, {layer.dim}), not {tuple(call.x.shape)}")
        if call.cache is not None:
            raise AttentionError("calibration is on whole rows: no cache")
