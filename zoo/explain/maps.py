"""Rows and sums of captured maps, read from their tiles."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from zoo.attention.capture import AttentionMap, MapTile


def tile_index(tile: MapTile) -> tuple[Tensor, Tensor, Tensor]:
    """Entry of the batch `(T, 1)`, queries `(T, nq)` and keys `(T, nk)` of each tile; -1 = no token."""
    count, _, queries, keys = tile.weights.shape
    b, i, j = tile.index
    return b.expand(count, 1), i.expand(count, queries), j.expand(count, keys)


def seen_from(found: AttentionMap, entry: int, token: int) -> Tensor:
    """What one query of one entry of the batch attends to: `(H, Nk)`."""
    _, heads, _, keys = found.sizes
    out = found.tiles[0].weights.new_zeros(heads, keys + 1)  # the last column takes what is no token
    for tile in found.tiles:
        b, i, j = tile_index(tile)
        for t, row in ((b == entry) & (i == token)).nonzero().tolist():
            out.index_add_(1, j[t] % (keys + 1), tile.weights[t, :, row].detach())
    return out[:, :-1]


def received(found: AttentionMap, parts: Iterable[Tensor] | None = None) -> Tensor:
    """What each key gets from all queries, `(B, H, Nk)`: sums of the weights, or of `parts`.

    Args:
        parts: other numbers in the place of the weights, `(T, H, nq, nk)` for each tile.
    """
    batch, heads, _, keys = found.sizes
    out = found.tiles[0].weights.new_zeros(batch, keys + 1, heads)
    values = [tile.weights for tile in found.tiles] if parts is None else parts
    for tile, part in zip(found.tiles, values, strict=True):
        b, i, j = tile_index(tile)
        sums = part.detach().masked_fill((i < 0)[:, None, :, None], 0).sum(2).transpose(1, 2)  # (T, nk, H)
        out.index_put_((b.expand_as(j), j), sums, accumulate=True)
    return out[:, :-1].transpose(1, 2)
