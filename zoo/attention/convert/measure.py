"""What a conversion costs and saves."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from zoo.attention.cache import Cache, KVCache
from zoo.attention.convert.calls import Tokens, calls_of, real_tokens
from zoo.attention.layers.base import AttentionLayer


@torch.no_grad()
def relative_error(made: AttentionLayer, layer: AttentionLayer, tokens: Tokens) -> float:
    """`|made(x) - layer(x)| / |layer(x)|`, Frobenius norms over all real tokens, both layers in eval mode."""
    made, layer = (copy.deepcopy(part).eval() for part in (made, layer))
    lost = power = 0.0
    for call in calls_of(tokens):
        expected, found = (real_tokens(call, part(*call)).double() for part in (layer, made))
        lost += float((found - expected).square().sum())
        power += float(expected.square().sum())
    return (lost / power) ** 0.5 if power else 0.0 if not lost else float("inf")


@torch.no_grad()
def cache_bytes(layer: AttentionLayer) -> int | None:
    """Bytes that the cache of a decoder grows by with each token, once a window is full.

    Of a layer that looks both ways, those of the same layer as a causal one. None: the mechanism has no
    cache.
    """
    if not layer.supports.cache:
        return None
    twin = copy.deepcopy(layer).eval()
    twin.causal = True
    cache = twin.init_cache(1)
    token = next(twin.parameters()).new_zeros(1, 1, twin.dim)
    for _ in range((getattr(twin, "window", None) or 0) + 1):
        twin.step(token, cache)
    before = _held(cache)
    twin.step(token, cache)
    return _held(cache) - before


def _held(cache: Cache) -> int:
    """Bytes of numbers; which tokens are real is no property of the mechanism."""
    if not isinstance(cache, KVCache):
        return cache.nbytes()  # type: ignore[attr-defined]
    kept: list[Tensor] = [rows for rows in cache.tensors if rows.dtype != torch.bool]
    return sum(rows.numel() * rows.element_size() for rows in kept)
