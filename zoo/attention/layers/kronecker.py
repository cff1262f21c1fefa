"""Attention of a map to the means of its rows and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Inputs, Supports
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.maps import axes_of, rows_and_columns
from zoo.attention.patterns import Padding


class KroneckerAttention(MultiHead, name="kronecker"):
    """KAO (Gao et al. 2020): keys and values are the means of the h rows and w columns of a map.

    All tokens are queries (KAO-KV), `O(h w (h + w))`; or the means are (KAO-QKV), `O((h + w)^2)`, and a token
    gets the sum of what its row and its column found.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: H.
        shape: rows and columns; by default one row of any length, whose columns are the tokens.
        queries: all tokens, or the means.
        bias: of the four projections.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2007.08442"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        queries: Literal["tokens", "means"] = "tokens",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=bias, out_bias=bias, dropout=dropout)
        if queries not in ("tokens", "means"):
            raise AttentionError(f"queries are the 'tokens' or the 'means', not {queries!r}")
        axes_of(shape)
        self.shape, self.queries = None if shape is None else tuple(shape), queries

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        shape = rows_and_columns(self.shape, x.shape[1])
        means, real = _means(x, mask, shape)
        q, k, v = (
            split_heads(proj(rows), self.num_heads)
            for proj, rows in (
                (self.q_proj, x if self.queries == "tokens" else means),
                (self.k_proj, means),
                (self.v_proj, means),
            )
        )
        pattern = None if real is None else Padding(real)
        out = attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)
        if self.queries == "means":
            rows, columns = out.split(shape, dim=2)
            out = (rows[:, :, :, None] + columns[:, :, None]).flatten(2, 3)
        return self.project(out)

    def init_cache(self, batch_size: int) -> HeadCache:
        raise AttentionError("means of rows and columns hold later tokens: there is no cache")


def _means(x: Tensor, mask: Tensor | None, shape: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """Means `(B, h + w, C)` of the rows and the columns of `(B, N, C)`; which of them hold a real token."""
    if mask is None:
        grid = x.unflatten(1, shape)
        return torch.cat([grid.mean(2), grid.mean(1)], 1), None
    grid, real = x.masked_fill(~mask[..., None], 0.0).unflatten(1, shape), mask.unflatten(1, shape)
    count = torch.cat([real.sum(2), real.sum(1)], 1)
    return torch.cat([grid.sum(2), grid.sum(1)], 1) / count.clamp(min=1)[..., None], count > 0
