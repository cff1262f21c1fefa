"""Patterns on grids of 1 to 3 axes: neighbourhoods, and windows with a shift.

The tokens of a grid stand in row-major order. A pattern is a product of axes: a query sees a key if it does
on every axis. So are its tiles: boxes of queries, each with the box of keys that they see together. Memory
is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import and_
from typing import Any

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError
from zoo.attention.packed import Bucket, Packed
from zoo.attention.patterns import Rule, Tile

_TILE = {1: 64, 2: 8, 3: 4}  # queries along one axis of a tile, by number of axes: fastest on a CPU


@dataclass(frozen=True)
class Axis:
    """One axis of n tokens."""

    n: int

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        """Whether the query at i sees the key at j."""
        raise NotImplementedError

    def tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        """Tokens of the tiles, -1 = none: queries `(T, nq)`, keys `(T, nk)`."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Band(Axis):
    """The axis of a neighbourhood; places count the tokens that share a residue modulo the dilation."""

    kernel: int
    dilation: int
    stride: int
    causal: bool
    tile: int

    def __post_init__(self) -> None:
        n, w, d, s = self.n, self.kernel, self.dilation, self.stride
        if min(w, d, s) < 1:
            raise AttentionError(f"kernel, dilation and stride are positive, not {w}, {d}, {s}")
        if w * d > n:
            raise AttentionError(f"kernel {w} x dilation {d} is larger than the axis of {n} tokens")
        if s > w:
            raise AttentionError(f"stride {s} is larger than the kernel {w}: keys would be left out")

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        first, last = self._reach(i)
        place = j // self.dilation
        return (place >= first) & (place <= last) & (i % self.dilation == j % self.dilation)

    def _reach(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Places of the first and the last key of each query; all of a stride group follow its leader."""
        place, end = i // self.dilation, self._end(i)
        group = place // self.stride * self.stride
        if self.causal:
            leader = torch.minimum(group + self.stride - 1, end)
            return (leader - self.kernel + 1).clamp(min=0), place
        leader = torch.minimum(group + self.stride // 2, end)
        # At the borders the window slides inwards, and stays whole.
        first = torch.minimum(leader - self.kernel // 2, end - self.kernel + 1).clamp(min=0)
        return first, first + self.kernel - 1

    def _end(self, i: Tensor) -> Tensor:
        """The last place of the tokens that share the residue of i."""
        return (self.n - 1 - i % self.dilation) // self.dilation

    def tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        places = -(-self.n // self.dilation)
        tiles = -(-places // max(self.tile, self.kernel // 2))
        rows = min(-(-places // (tiles * self.stride)) * self.stride, places)
        span = min(rows - self.stride + self.kernel, places)
        residue = torch.arange(self.dilation, device=device)[:, None, None]
        starts = torch.arange(0, places, rows, device=device)[:, None]
        i = (starts + torch.arange(rows, device=device)) * self.dilation + residue  # (residues, tiles, rows)
        first = torch.minimum(self._reach(i[..., :1])[0], self._end(i[..., :1]) - span + 1).clamp(min=0)
        j = (first + torch.arange(span, device=device)) * self.dilation + residue
        i, j = (x.masked_fill(x >= self.n, -1).flatten(0, 1) for x in (i, j))
        return i, j


@dataclass(frozen=True)
class _Cells(Axis):
    """The axis of shifted windows: the pieces of a window at both ends share a tile, unseen by each other."""

    size: int
    shift: int

    def __post_init__(self) -> None:
        if not 0 <= self.shift < self.size:
            raise AttentionError(
                f"a window of {self.size} tokens cannot be shifted by {self.shift}: 0 <= shift < size"
            )

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - self.shift) // self.size == (j - self.shift) // self.size

    def tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        length = -(-self.n // self.size) * self.size
        tokens = (torch.arange(length, device=device) + self.shift) % length
        tokens = tokens.masked_fill(tokens >= self.n, -1).view(-1, self.size)
        return tokens, tokens


class Grid(Packed):
    """The product of patterns along the axes of a grid.

    Args:
        axes: outermost first.
        device: of the tables, as that of the queries.
    """

    name = "a grid"
    by_index = False

    def __init__(self, axes: Sequence[Axis], device: torch.device | str | None) -> None:
        self.axes = tuple(axes)
        self.batch = None
        sizes = [axis.n for axis in axes]
        self.tokens = prod(sizes)
        tables = [axis.tables(device) for axis in axes]
        queries, keys = (_boxes(part, sizes) for part in zip(*tables, strict=True))
        self.plan = [Bucket(queries, keys, ragged=True)]
        self.visible = _visible(self.axes, tables)

    def rule(self, nq: int, nk: int) -> Rule:
        steps = [prod(axis.n for axis in self.axes[a + 1 :]) for a in range(len(self.axes))]

        def on_axes(i: Tensor, j: Tensor) -> Iterator[Tensor]:
            for axis, step in zip(self.axes, steps, strict=True):
                yield axis.sees(i // step % axis.n, j // step % axis.n)

        return lambda b, h, i, j: reduce(and_, on_axes(i, j))

    def tile_mask(self, tile: Tile, batch: int, nq: int, nk: int) -> Tensor:
        return self.visible[:, None].repeat(len(tile.q) // len(self.visible), 1, 1, 1)


def _boxes(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Row-major token numbers `(T1 T2 .., n1 n2 ..)` of boxes, from the tables `(Ta, na)` of their axes."""

    def joined(outer: Tensor, inner: tuple[Tensor, int]) -> Tensor:
        table, n = inner
        x, y = outer[:, None, :, None], table[None, :, None, :]
        return torch.where((x < 0) | (y < 0), -1, x * n + y).flatten(2).flatten(0, 1)

    return reduce(joined, zip(tables[1:], sizes[1:], strict=True), tables[0])


def _visible(axes: Sequence[Axis], tables: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Bool `(T, nq, nk)` of the boxes, True = attend."""

    def joined(outer: Tensor, inner: Tensor) -> Tensor:
        both = outer[:, None, :, None, :, None] & inner[None, :, None, :, None, :]
        return both.flatten(4).flatten(2, 3).flatten(0, 1)

    on_axes = (
        axis.sees(i[:, :, None], j[:, None]) & (j >= 0)[:, None]
        for axis, (i, j) in zip(axes, tables, strict=True)
    )
    return reduce(joined, on_axes)


def per_axis(value: Any, axes: int, name: str) -> tuple:
    """One value for each axis, from one for all or a sequence."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise AttentionError(f"{name} {values} does not give one value for each of the {axes} axes")
    return values


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1:
        raise AttentionError(f"a grid has 1 to 3 axes of at least one token, not {sizes}")
    return sizes


class Neighbourhood(Grid):
    """Neighbourhood attention (Hassani et al. 2023, section 3.1; dilated: Hassani and Shi 2022).

    On each axis a query sees the `kernel` keys around it. At a border the window slides inwards, so that
    every query sees as many. With dilation d it sees each d-th token only, as if those were an axis of their
    own. The queries of a group of `stride` share one window, that of their leader (Hassani et al. 2025,
    generalized neighborhood attention). A causal axis shows the last `kernel` keys, fewer at the start.
    With an even kernel one more key lies before the query than after it.

    Args:
        shape: tokens along each of the 1 to 3 axes.
        kernel, dilation, stride, causal: one value, or one for each axis.
        device: as that of the queries.
    """

    name = "neighbourhoods"

    def __init__(
        self,
        shape: int | Sequence[int],
        kernel: int | Sequence[int],
        *,
        dilation: int | Sequence[int] = 1,
        stride: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.shape = _shape(shape)
        named = {"kernel": kernel, "dilation": dilation, "stride": stride, "causal": causal}
        self.options = {name: per_axis(value, len(self.shape), name) for name, value in named.items()}
        tile = _TILE[len(self.shape)]
        axes = zip(self.shape, *self.options.values(), strict=True)
        super().__init__([_Band(n, w, d, s, c, tile) for n, w, d, s, c in axes], device)

    def to(self, device: torch.device | str) -> Neighbourhood:
        return Neighbourhood(self.shape, **self.options, device=device)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"Neighbourhood({self.shape}, {options})"


class ShiftedWindows(Grid):
    """Windows of `size` tokens along each axis, the first one starting at `shift` (Liu et al. 2021, Swin,
    section 3.2). Windows are cut at the borders: nothing wraps round, and any shape does.

    Args:
        shape: tokens along each of the 1 to 3 axes.
        size, shift: one value, or one for each axis.
        device: as that of the queries.
    """

    name = "windows"

    def __init__(
        self,
        shape: int | Sequence[int],
        size: int | Sequence[int],
        *,
        shift: int | Sequence[int] = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.shape = _shape(shape)
        self.size = per_axis(size, len(self.shape), "size")
        self.shift = per_axis(shift, len(self.shape), "shift")
        axes = zip(self.shape, self.size, self.shift, strict=True)
        super().__init__([_Cells(n, size, shift) for n, size, shift in axes], device)

    def to(self, device: torch.device | str) -> ShiftedWindows:
        return ShiftedWindows(self.shape, self.size, shift=self.shift, device=device)

    def __repr__(self) -> str:
        return f"ShiftedWindows({self.shape}, {self.size}, shift={self.shift})"
