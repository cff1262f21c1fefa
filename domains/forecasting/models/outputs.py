"""What the parts of Chronos-2 hand on. Shapes: as in `chronos2.py`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Chronos2Output(NamedTuple):
    """What a forward pass gives."""

    quantiles: Tensor
    """`(B, Q, n P)` in the units of the series; neighbouring quantiles may cross."""
    loss: Tensor | None
    """Scalar, where targets were given."""
    normalised: Tensor
    """`(B, Q, n P)` in the scale of the context: `asinh((y - loc) / scale)`."""
    loc: Tensor
    """`(B, 1)`"""
    scale: Tensor
    """`(B, 1)`"""


class Encoding(NamedTuple):
    """The tokens of history, register and future after the last block."""

    tokens: Tensor
    """`(B, S, D)`"""
    loc: Tensor
    """`(B, 1)`"""
    scale: Tensor
    """`(B, 1)`"""


class Embedded(NamedTuple):
    """What enters the encoder."""

    tokens: Tensor
    """`(S, B, D)`"""
    seen: Tensor
    """Bool `(S, B)`: tokens that hold an observation, and all of the register and the future."""
    loc: Tensor
    scale: Tensor
    known: Tensor | None
    """`(B, n P)`, 1 where a future covariate is known."""
    alike: int = 0
    """How many of the last tokens are the same in all rows."""
