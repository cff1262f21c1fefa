"""Tokens as maps `(B, H, W, C)`, cut into windows and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from torch import Tensor

from zoo.attention.errors import AttentionError


def axes_of(shape: Sequence[int] | None) -> int:
    """Number of axes of a grid, 1 without a shape.

    Raises:
        AttentionError: more than two, or an empty one.
    """
    if shape is None:
        return 1
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise AttentionError(f"a map has one or two axes of at least one token, not {tuple(shape)}")
    return len(shape)


def rows_and_columns(shape: Sequence[int] | None, tokens: int) -> tuple[int, int]:
    """Of a map of so many tokens; one axis, or no shape, is one row.

    Raises:
        AttentionError: the tokens do not fill the shape.
    """
    sides = (tokens,) if shape is None else tuple(shape)
    if prod(sides) != tokens:
        raise AttentionError(f"{tokens} tokens do not fill a grid of {sides}")
    return (1, tokens) if len(sides) == 1 else (sides[0], sides[1])


def padded(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, H, W, C)` with zeros at the bottom and on the right, up to multiples of `size`."""
    rows, columns = (-side % step for side, step in zip(x.shape[1:3], size, strict=True))
    return F.pad(x, (0, 0, 0, columns, 0, rows)) if rows or columns else x


def windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, H, W, C)`, sides multiples of `size`, to its windows as tokens `(B nW, size, C)`."""
    x = x.unflatten(2, (-1, size[1])).unflatten(1, (-1, size[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Tokens `(B nW, size, C)` of windows to the map `(B, H, W, C)` of `shape` that they were cut from."""
    rows, columns = shape[0] // size[0], shape[1] // size[1]
    x = x.unflatten(1, size).unflatten(0, (-1, rows, columns))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)
