"""Where the tokens of a captured map lie on the grid of their layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import torch
from torch import Tensor

from zoo.attention.capture import AttentionMap
from zoo.attention.halo import Halo
from zoo.attention.patterns import Both, EqualGroups, Pattern

STRIDES = (2, 3, 4, 8, 16)
"""How much coarser than the grid of the layer pooled tokens may be."""
MOST_AHEAD = 8
"""Tokens without a place before those of the map: classes, registers."""


@dataclass(frozen=True)
class Places:
    """The cell of each token on a grid.

    Attributes:
        grid: rows and columns of cells.
        real: how many rows and columns of cells the image covers; what lies beyond is padding.
        cells: int64 `(n, N)`, cells counted row by row, -1 for a token that lies nowhere; entry b of a batch
            of maps has the places `cells[b % n]`, as where n windows of an image stand in the batch.
    """

    grid: tuple[int, int]
    real: tuple[float, float]
    cells: Tensor

    @property
    def windows(self) -> int:
        return self.cells.shape[0]

    @cached_property
    def points(self) -> Tensor:
        """`(n, N, 2)`: the centre of each cell as fractions of the height and width of the image.

        NaN for tokens that lie nowhere or outside of the image.
        """
        rows, columns = self.cells // self.grid[1] + 0.5, self.cells % self.grid[1] + 0.5
        points = torch.stack([rows / self.real[0], columns / self.real[1]], -1)
        outside = (self.cells < 0) | (points > 1).any(-1)
        return points.masked_fill(outside[..., None], torch.nan)

    def token_at(self, point: tuple[float, float]) -> tuple[int, int] | None:
        """Window and token at a point, given as fractions of height and width; None where there is none."""
        row, column = (
            min(int(share * real), side - 1)
            for share, real, side in zip(point, self.real, self.grid, strict=True)
        )
        found = (self.cells == row * self.grid[1] + column).nonzero()
        return (int(found[0, 0]), int(found[0, 1])) if len(found) else None

    def raster(self, values: Tensor) -> Tensor:
        """Values of tokens `(n, N)`, summed over those of a cell, as a map `(rows, columns)`."""
        flat = values.new_zeros(self.grid[0] * self.grid[1] + 1)
        cells = torch.where(self.cells < 0, len(flat) - 1, self.cells).to(values.device)
        return flat.index_add(0, cells.flatten(), values.flatten())[:-1].view(self.grid)


def find_places(
    found: AttentionMap, batch: int, grid: tuple[int, int], *, order: str = "windows", behind: int = 0
) -> tuple[Places, Places] | None:
    """The places of queries and keys of a map, where its sizes fit the grid; None where they do not.

    A pattern that knows its grid says it itself. Otherwise tokens are taken to lie row by row, after a few
    without a place (classes); fewer ones than cells to be pooled; and more maps than images to be those of
    windows.

    Args:
        found: the map.
        batch: images.
        grid: rows and columns of the map that the layer works on.
        order: what its module says of its tokens: `windows`, as above; `pooled`, means rather than tokens
            with classes; `learned`, queries that are weights and lie nowhere; `none`, nothing lies on the
            map.
        behind: tokens without a place at the end.
    """
    maps, _, nq, nk = found.sizes
    if order == "none" or maps % batch:
        return None
    patterns = list(_patterns(found.pattern))
    if maps == batch:
        for pattern in patterns:
            if isinstance(pattern, Halo) and len(pattern.shape) == 2:
                return _of_halo(pattern)
            shape = getattr(pattern, "shape", ())
            if len(shape) == 2 and nq == nk == shape[0] * shape[1]:
                return (_on_grid(shape, grid),) * 2  # pyright: ignore[reportReturnType]
    if any(isinstance(pattern, EqualGroups) for pattern in patterns):
        behind = nk - grid[0] * grid[1]
    if nq == nk:
        both = _alike(nq, grid, maps // batch, behind)
        return None if both is None else (both, both)
    if maps != batch:
        return None
    queries = None if order == "learned" else _apart(nq, grid, behind, order)
    keys = _apart(nk, grid, behind, order)
    nowhere = Places(grid, grid, torch.full((1, nq), -1))
    return None if keys is None else (queries or nowhere, keys)


def _patterns(pattern: Pattern) -> Iterator[Pattern]:
    if isinstance(pattern, Both):
        yield from _patterns(pattern.leader)
        yield from _patterns(pattern.other)
    else:
        yield pattern


def _on_grid(shape: tuple[int, int], grid: tuple[int, int]) -> Places:
    real = min(shape[0], grid[0]), min(shape[1], grid[1])
    return Places(shape, real, torch.arange(shape[0] * shape[1])[None])


def _of_halo(pattern: Halo) -> tuple[Places, Places]:
    """Queries of every stride-th token; keys of the map, or of the map in a border of zeros."""
    (height, width), rows = pattern.shape, [axis.stride for axis in pattern.axes]
    real = height / rows[0], width / rows[1]
    queries = Places(
        (pattern.queries[0], pattern.queries[1]),
        real,
        torch.arange(pattern.queries[0] * pattern.queries[1])[None],
    )
    before = [axis.halo if pattern.bordered else 0 for axis in pattern.axes]
    y, x = (torch.arange(keys) - first for keys, first in zip(pattern.keys, before, strict=True))
    inside = ((y >= 0) & (y < height))[:, None] & (x >= 0) & (x < width)
    cells = torch.where(inside, y[:, None] * width + x, -1)
    return queries, Places((height, width), (height, width), cells.view(1, -1))


def _alike(tokens: int, grid: tuple[int, int], count: int, behind: int) -> Places | None:
    """Of tokens that attend to one another."""
    if count > 1:
        return _windows(tokens, grid, count)
    if tokens == grid[0] * grid[1]:
        return _whole(tokens, grid, 0)
    return _windows(tokens, grid, 1) or _whole(tokens, grid, behind) or _by_stride(tokens, grid)


def _apart(tokens: int, grid: tuple[int, int], behind: int, order: str) -> Places | None:
    """Of queries or keys that are not as many as the others."""
    if tokens == grid[0] * grid[1]:
        return _whole(tokens, grid, 0)
    if order == "pooled":
        return _pooled(tokens, grid) or _whole(tokens, grid, behind)
    return _whole(tokens, grid, behind) or _pooled(tokens, grid)


def _whole(tokens: int, grid: tuple[int, int], behind: int) -> Places | None:
    """Row by row, between some tokens without a place."""
    cells = grid[0] * grid[1]
    ahead = tokens - cells - behind
    if not 0 <= ahead <= MOST_AHEAD:
        return None
    numbers = torch.cat([torch.full((ahead,), -1), torch.arange(cells), torch.full((behind,), -1)])
    return Places(grid, grid, numbers[None])


def _pooled(tokens: int, grid: tuple[int, int]) -> Places | None:
    """Means of cells of some stride, or of as many parts of the map along both sides."""
    found, side = _by_stride(tokens, grid), isqrt(tokens)
    if found is None and side > 1 and side * side == tokens:
        return Places((side, side), (side, side), torch.arange(tokens)[None])
    return found


def _by_stride(tokens: int, grid: tuple[int, int]) -> Places | None:
    for stride in STRIDES:
        coarse = -(-grid[0] // stride), -(-grid[1] // stride)
        if coarse[0] * coarse[1] == tokens:
            return Places(coarse, (grid[0] / stride, grid[1] / stride), torch.arange(tokens)[None])
    return None


def _windows(tokens: int, grid: tuple[int, int], count: int) -> Places | None:
    """Squares, in rows; the last ones reach into the padding."""
    side = isqrt(tokens)
    rows, columns = -(-grid[0] // side), -(-grid[1] // side)
    if side * side != tokens or rows * columns != count:
        return None
    full = rows * side, columns * side
    cells = torch.arange(full[0] * full[1]).view(rows, side, columns, side).transpose(1, 2)
    return Places(full, grid, cells.reshape(count, tokens))
