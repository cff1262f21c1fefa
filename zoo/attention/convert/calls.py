"""What a layer is called with, as conversions are calibrated on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.attention.layers.base import Inputs

Tokens = Tensor | Sequence[Tensor | Inputs]
"""Tokens `(B, N, dim)` as a layer meets them, or several such, or whole calls with mask and positions."""


def calls_of(tokens: Tokens) -> list[Inputs]:
    """Tokens as calls."""
    given = [tokens] if isinstance(tokens, Tensor | Inputs) else list(tokens)
    return [Inputs(x, None, None, None, None) if isinstance(x, Tensor) else x for x in given]


def real_tokens(call: Inputs, rows: Tensor) -> Tensor:
    """Those of the rows `(B, N, ...)`, one per query, that belong to real tokens: `(T, ...)`."""
    padded = call.context is None and call.mask is not None and call.mask.dtype == torch.bool
    return rows[call.mask] if padded else rows.flatten(0, 1)


def all_tokens(calls: Sequence[Inputs]) -> Tensor:
    """The real tokens of all calls, `(T, C)`."""
    return torch.cat([real_tokens(call, call.x) for call in calls])
