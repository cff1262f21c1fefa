"""Blocked local attention: a block of queries sees the keys of its block and a halo around it.

Tokens stand in row-major order on a grid of 1 to 3 axes. Per axis: n keys, blocks of `block` keys, windows of
w = block + 2 halo keys. Memory is linear in the tokens: each key is held (w / block) times per axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.errors import AttentionError
from zoo.attention.neighbourhood import Axis, Grid, per_axis
from zoo.attention.patterns import Index, Pattern, Rule, Tile


@dataclass(frozen=True)
class _Blocks:
    """One axis: blocks of `block` keys and `block / stride` queries; windows begin `before` keys early."""

    n: int
    block: int
    halo: int
    stride: int
    bordered: bool

    def __post_init__(self) -> None:
        if self.n < 1 or self.block < 1 or self.halo < 0 or self.stride < 1:
            raise AttentionError(
                f"a block has at least one token and a halo none: block {self.block}, halo {self.halo}, "
                f"stride {self.stride} on {self.n} tokens"
            )
        if self.block % self.stride:
            raise AttentionError(f"a block of {self.block} is not divisible by a stride of {self.stride}")

    @property
    def count(self) -> int:
        return -(-self.n // self.block)

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return self.block // self.stride

    @property
    def window(self) -> int:
        return self.block + 2 * self.halo

    @property
    def before(self) -> int:
        return 0 if self.bordered else self.halo

    @property
    def queries(self) -> int:
        return -(-self.n // self.stride)

    @property
    def keys(self) -> int:
        return self.count * self.block + 2 * self.halo if self.bordered else self.n

    def start(self, i: Tensor) -> Tensor:
        """The first place of the window of the query at i; it may lie before the axis."""
        return i // self.rows * self.block - self.before

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        place = j - self.start(i)
        return (place >= 0) & (place < self.window)

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places of the queries `(count, rows)` and keys `(count, window)` of the blocks; -1 = none."""
        blocks = torch.arange(self.count, device=device)[:, None]
        i = blocks * self.rows + torch.arange(self.rows, device=device)
        j = blocks * self.block - self.before + torch.arange(self.window, device=device)
        return i.masked_fill(i >= self.queries, -1), j.masked_fill((j < 0) | (j >= self.keys), -1)


class Halo(Pattern):
    """Blocked local attention (Vaswani et al. 2021, HaloNet, arXiv 2103.12731, section 2.2).

    The grid is cut into blocks, the last ones perhaps not full. Keys outside of the grid are not seen, unless
    they are given: with `bordered`, keys and values come as `border` makes them.

    Args:
        shape: keys along each of the 1 to 3 axes.
        block: keys along a side of a block: one value, or one for each axis; so for the others.
        halo: keys seen beyond each side of the block.
        stride: queries are every `stride`-th token of each axis, the first one included.
        bordered: keys and values have a border of `halo` tokens around the grid of full blocks.
    """

    tiled = True

    def __init__(
        self,
        shape: int | Sequence[int],
        block: int | Sequence[int],
        halo: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        bordered: bool = False,
    ) -> None:
        self.shape: tuple[int, ...] = (shape,) if isinstance(shape, int) else tuple(shape)
        if not 1 <= len(self.shape) <= 3:
            raise AttentionError(f"a grid has 1 to 3 axes, not {len(self.shape)}")
        self.options = {
            name: per_axis(value, len(self.shape), name)
            for name, value in (("block", block), ("halo", halo), ("stride", stride))
        }
        self.bordered = bordered
        options = zip(self.shape, *self.options.values(), strict=True)
        self.axes = tuple(_Blocks(n, size, beyond, step, bordered) for n, size, beyond, step in options)
        self.queries = tuple(axis.queries for axis in self.axes)
        self.keys = tuple(axis.keys for axis in self.axes)

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        if (nq, nk) != (prod(self.queries), prod(self.keys)):
            raise AttentionError(
                f"{nq} queries and {nk} keys do not fill grids of {self.queries} and {self.keys}"
            )

    def rule(self, nq: int, nk: int) -> Rule:
        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            allowed = None
            for axis in reversed(self.axes):
                on_axis = axis.sees(i % axis.queries, j % axis.keys)
                allowed = on_axis if allowed is None else allowed & on_axis
                i, j = i // axis.queries, j // axis.keys
            assert allowed is not None
            return allowed

        return seen

    def tile_rule(self, nq: int, nk: int) -> None:
        return None

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        batch, device = q.shape[0], q.device
        tables = [axis.tables(device) for axis in self.axes]
        i = _places([table for table, _ in tables], self.queries)
        j = _places([table for _, table in tables], self.keys)
        b = torch.arange(batch, device=device).repeat_interleave(len(i))[:, None]
        index = Index(b, i.repeat(batch, 1), j.repeat(batch, 1))
        rows = _gathered(q, i), _gathered(k, j), _gathered(v, j)
        return [Tile(*rows, index, ragged=not self.bordered)]

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        rows = [axis.rows for axis in self.axes]
        counts = [axis.count for axis in self.axes]
        grid = parts[0].transpose(1, 2).unflatten(1, rows).unflatten(0, (batch, *counts))
        axes = range(len(rows))  # (B, counts .., rows .., H, Dv)
        order = [0, *(a for axis in axes for a in (1 + axis, 1 + len(rows) + axis)), -2, -1]
        grid = grid.permute(order)
        for axis, n in zip(axes, self.queries, strict=True):
            grid = grid.flatten(1 + axis, 2 + axis).narrow(1 + axis, 0, n)
        return grid.flatten(1, len(rows)).transpose(1, 2)

    def border(self, x: Tensor) -> Tensor:
        """Keys or values `(B, H, N, D)` of the grid with zeros around it, as `bordered` takes them."""
        x = x.unflatten(2, self.shape)
        pads = [(a.halo, a.count * a.block - a.n + a.halo) for a in reversed(self.axes)]
        return F.pad(x, (0, 0, *(side for pair in pads for side in pair))).flatten(2, -2)

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"Halo({self.shape}, {options}, bordered={self.bordered})"


@dataclass(frozen=True)
class _Reach(Axis):
    """An axis on which a token sees those at most `reach` places away."""

    reach: int
    tile: int

    def __post_init__(self) -> None:
        if self.n < 1 or self.reach < 0:
            raise AttentionError(f"tokens see 0 or more places far, not {self.reach} on {self.n} tokens")

    def sees(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= self.reach

    def tables(self, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
        starts = torch.arange(0, self.n, self.tile, device=device)[:, None]
        i = starts + torch.arange(self.tile, device=device)
        j = starts + torch.arange(-self.reach, self.tile + self.reach, device=device)
        return i.masked_fill(i >= self.n, -1), j.masked_fill((j < 0) | (j >= self.n), -1)


class Near(Grid):
    """A token sees those at most `reach` places away along each axis of a grid, fewer at its border.

    Args:
        shape: tokens along each of the 1 to 3 axes.
        reach: places.
        device: as that of the queries.
    """

    name = "windows"

    def __init__(self, shape: Sequence[int], reach: int, *, device: torch.device | str | None = None) -> None:
        self.shape, self.reach = tuple(shape), reach
        super().__init__([_Reach(n, reach, min(n, 8)) for n in self.shape], device)

    def to(self, device: torch.device | str) -> Near:
        return Near(self.shape, self.reach, device=device)

    def __repr__(self) -> str:
        return f"Near({self.shape}, {self.reach})"


def _places(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Row-major token numbers `(T1 T2 .., n1 n2 ..)` from the tables `(Ta, na)` of the axes; -1 = none."""
    out = tables[0]
    for table, n in zip(tables[1:], sizes[1:], strict=True):
        x, y = out[:, None, :, None], table[None, :, None, :]
        out = torch.where((x < 0) | (y < 0), -1, x * n + y).flatten(2).flatten(0, 1)
    return out


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """Tokens of x `(B, H, N, D)` at `(T, n)` as `(B T, H, n, D)`; a place without a token gets some."""
    rows = x.transpose(1, 2).index_select(1, at.clamp(min=0).flatten())
    return rows.unflatten(1, at.shape).flatten(0, 1).transpose(1, 2)


def with_offsets(
    q: Tensor, k: Tensor, tables: Sequence[Tensor], pattern: Halo, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys with channels whose products are relative logits: `q . k + sum_a like . r_a`.

    r_a is row `place of the key in its window - place of the query in its block + w - 1` of table a, as in
    HaloNet. Instead of a bias for every pair, a key marks its place modulo w, and a query lists what each
    mark is worth to it.

    Args:
        q: `(B, H, Nq, D)`, scaled as it is to be; the scale of `attend` is then 1.
        k: `(B, Hk, Nk, D)`.
        tables: `(2 w - 1, D)` for each axis.
        like: what meets the tables, where it is not q.

    Returns:
        `(B, H, Nq, D + sum_a w)` and `(B, Hk, Nk, D + sum_a w)`.
    """
    grid = (q if like is None else like).unflatten(2, pattern.queries)
    worth, marks = [], []
    for a, (axis, table) in enumerate(zip(pattern.axes, tables, strict=True)):
        i = torch.arange(axis.queries, device=q.device)[:, None]
        mark = torch.arange(axis.window, device=q.device)
        place = (mark - axis.start(i)) % axis.window
        relative = table[place - i % axis.rows + axis.window - 1]  # (queries, w, D)
        rows = grid.movedim(2 + a, 0)
        logits = rows.flatten(1, -2) @ relative.to(q.dtype).mT
        worth.append(logits.unflatten(1, rows.shape[1:-1]).movedim(0, 2 + a).flatten(2, -2))
        mark = F.one_hot(torch.arange(axis.keys, device=q.device) % axis.window, axis.window)
        sizes = [n if other == a else 1 for other, n in enumerate(pattern.keys)]
        mark = mark.view(*sizes, axis.window).expand(*pattern.keys, axis.window).flatten(0, -2)
        marks.append(mark.to(k.dtype).expand(*k.shape[:-1], axis.window))
    return torch.cat([q, *worth], -1), torch.cat([k, *marks], -1)
