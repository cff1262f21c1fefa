"""A trained attention layer as one of another kind: shared heads, a latent, linear, a mixture of heads."""

from __future__ import annotations

from zoo.attention.convert import heads, linear, sharing  # noqa: F401  (each lists its conversions)
from zoo.attention.convert.calls import Tokens, calls_of
from zoo.attention.convert.measure import cache_bytes, relative_error
from zoo.attention.convert.registry import CONVERSIONS, conversion_options, convert

__all__ = [
    "CONVERSIONS",
    "Tokens",
    "cache_bytes",
    "calls_of",
    "conversion_options",
    "convert",
    "relative_error",
]
