"""Where a tile lies in its picture: models with a grid of patches or windows keep that of the picture."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Place(NamedTuple):
    """A tile's first row and column, and the size of the whole picture, in low-resolution pixels."""

    top: int
    left: int
    height: int
    width: int

    def turned(self, tile: Tensor, flips: tuple[int, ...], transposed: bool) -> Place:
        """Of a tile `(1, C, h, w)` after flips of axes 2 and 3, then a transpose, of the whole picture."""
        top = self.height - self.top - tile.shape[2] if 2 in flips else self.top
        left = self.width - self.left - tile.shape[3] if 3 in flips else self.left
        if transposed:
            return Place(left, top, self.width, self.height)
        return Place(top, left, self.height, self.width)
