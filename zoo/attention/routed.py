"""Routed regions: the tokens of a region attend to those of a few other regions (Zhu et al. 2023, BiFormer).

Tokens stand in row-major order on a grid of `shape`, cut into equal rectangles of `size`: the regions,
counted row-major too. Which regions a region sees is an int64 table `(B, R, k)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zoo.attention.attend import attend
from zoo.attention.capture import recorder
from zoo.attention.errors import AttentionError
from zoo.attention.patterns import Index, Pattern, Rule, Tile, same_device
from zoo.attention.select import GATHERED, listed


def route(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k regions whose keys `(B, R, D)` match a region's query `(B, R, D)` best (equations 3 and 4).

    Returns:
        Their products, largest first, and their numbers, both `(B, R, k)`.
    """
    if k > keys.shape[1]:
        raise AttentionError(f"{k} regions to choose, but the grid has {keys.shape[1]}")
    return (queries @ keys.transpose(-1, -2)).topk(k, dim=-1)


class Routed(Pattern):
    """The queries of a region see the keys of the regions listed for it.

    Queries may be a horizontal strip of the grid, some rows of regions; the table then holds these alone.

    Args:
        index: int64 `(B, R, k)`, no region twice in a row.
        shape: rows and columns of tokens, of the keys.
        size: rows and columns of tokens in a region.
    """

    tiled = True

    def __init__(self, index: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> None:
        if index.ndim != 3 or index.dtype != torch.int64:
            raise AttentionError(
                f"chosen regions are int64 (B, R, k), not {index.dtype} {tuple(index.shape)}"
            )
        if min(size) < 1 or shape[0] % size[0] or shape[1] % size[1]:
            raise AttentionError(f"a grid of {shape} is not divisible into regions of {size}")
        self.index, self.shape, self.size = index, shape, size
        self.rows, self.columns = shape[0] // size[0], shape[1] // size[1]
        # A handful of queries per region is too little for a product of its own.
        chosen, tokens = index.shape[2], size[0] * size[1]
        self.whole = tokens <= 8 and 4 * chosen >= self.rows * self.columns and shape[0] * shape[1] <= 1024

    def check(self, batch: int, nq: int, nk: int, device: torch.device) -> None:
        tokens = self.size[0] * self.size[1]
        if self.index.shape[0] != batch or self.index.shape[1] * tokens != nq:
            raise AttentionError(
                f"a table {tuple(self.index.shape)} of regions of {tokens} tokens does not fit B = {batch}, "
                f"Nq = {nq}"
            )
        if nk != self.shape[0] * self.shape[1]:
            raise AttentionError(f"{nk} keys do not fill a grid of {self.shape}")
        if self.index.shape[1] % self.columns:
            raise AttentionError("queries are whole rows of regions")
        same_device("chosen regions", self.index, device)

    def rule(self, nq: int, nk: int) -> Rule:
        index, width, (height, length) = self.index, self.shape[1], self.size

        def region(token: Tensor) -> Tensor:
            return token // width // height * self.columns + token % width // length

        return lambda b, h, i, j: (index[b, region(i)] == region(j)[..., None]).any(-1)

    def mask(self, batch: int, nq: int, nk: int, device: torch.device) -> Tensor:
        seen = listed(self.index, self.rows * self.columns)
        height, width = self.size
        # Two copies of long rows are faster than one of many short ones.
        keys = seen.view(batch, -1, self.rows, 1, self.columns, 1).expand(-1, -1, -1, height, -1, width)
        rows = keys.reshape(batch, -1, 1, self.columns, 1, nk)
        return rows.expand(-1, -1, height, -1, width, -1).reshape(batch, 1, nq, nk)

    def tile_rule(self, nq: int, nk: int) -> None:
        return None

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tile]:
        if self.whole:
            return [Tile(q, k, v)]
        batch, chosen = q.shape[0], self.index.flatten(0, 1)
        width = self.size[1]
        tokens = torch.arange(self.shape[0] * self.shape[1], device=q.device)
        members = self._regions(tokens[None, :, None])[..., 0]
        b = torch.arange(batch, device=q.device)
        queries = members[: self.index.shape[1]].repeat(batch, 1)
        index = Index(b.repeat_interleave(self.index.shape[1])[:, None], queries, members[chosen].flatten(1))
        # Keys come by rows of a region: `width` tokens that stand side by side.
        offsets = b[:, None, None, None] * (tokens.shape[0] // width)
        pieces = ((members[:, ::width] // width)[self.index] + offsets).flatten()

        def gathered(x: Tensor) -> Tensor:
            rows = x.transpose(1, 2).unflatten(1, (-1, width)).flatten(0, 1).index_select(0, pieces)
            return rows.view(chosen.shape[0], -1, *rows.shape[2:]).transpose(1, 2)

        return [Tile(self._regions(q.transpose(1, 2)).transpose(1, 2), gathered(k), gathered(v), index)]

    def _regions(self, x: Tensor) -> Tensor:
        """`(B, N, ...)` to `(B R, tokens of a region, ...)`."""
        x = x.unflatten(1, (-1, self.size[0], self.columns, self.size[1])).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)

    def join(self, parts: list[Tensor], batch: int, nq: int) -> Tensor:
        if self.whole:
            return parts[0]
        rows = parts[0].transpose(1, 2).unflatten(0, (batch, -1, self.columns)).unflatten(3, self.size)
        return rows.transpose(2, 3).flatten(1, 4).transpose(1, 2)

    def to(self, device: torch.device | str) -> Routed:
        return Routed(self.index.to(device), self.shape, self.size)

    def __repr__(self) -> str:
        return f"Routed({tuple(self.index.shape)}, shape={self.shape}, size={self.size})"


def attend_regions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    shape: tuple[int, int],
    size: tuple[int, int],
    *,
    scale: float | None = None,
) -> Tensor:
    """`attend` under `Routed`, for so many rows of regions at a time that the keys gathered stay small.

    The backward pass gathers them again.

    Args:
        q, k: `(B, H, N, D)`.
        v: `(B, H, N, Dv)`.
        index: chosen regions `(B, R, k)`.
        shape, size: of the grid and of a region.
        scale: `D ** -0.5` by default.

    Returns:
        `(B, H, N, Dv)`
    """
    columns, strip = shape[1] // size[1], size[0] * shape[1]
    per_row = index.shape[2] * strip * k.shape[1] * (k.shape[3] + v.shape[3])
    height = max(1, GATHERED // per_row)

    def part(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return attend(q, k, v, pattern=Routed(index, shape, size), scale=scale)

    if height * strip >= q.shape[2] or recorder() is not None:
        return part(q, k, v, index)
    run: Callable[..., Any] = part
    if torch.is_grad_enabled():
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        run = partial(checkpoint, part, **options)
    strips = zip(q.split(height * strip, 2), index.split(height * columns, 1), strict=True)
    parts: list[Any] = [run(queries, k, v, chosen) for queries, chosen in strips]
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)
