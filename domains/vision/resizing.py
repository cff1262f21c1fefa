"""Tables that were learned for one grid of tokens, on another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_table(table: Tensor, shape: Sequence[int]) -> Tensor:
    """Position embeddings `(1, C, h, w)` at another height and width: bicubic, antialiased."""
    if tuple(table.shape[2:]) == tuple(shape):
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    return F.interpolate(wide, tuple(shape), mode="bicubic", antialias=True).to(table.dtype)
