"""Sparse attention whose pattern does not look at the tokens: blocks at fixed distances, random subsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Supports
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.layers.sparse import Selecting
from zoo.attention.packed import OrderedGroups
from zoo.attention.select import attend_shared


class PowerAttention(Selecting, name="power"):
    """PowerAttention: block i sees block j if `i - j < window`, `i - j` is a power of two, or `j = 0`.

    Each query sees O(log N) blocks, and after O(log N) layers every token before it: whatever the distance
    between two blocks, it is a sum of powers of two.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        block_size: tokens per block.
        window: blocks of the local window, the query's own included.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2503.03588"

    def __init__(
        self, dim: int, num_heads: int, *, block_size: int = 256, window: int = 2, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if block_size < 1 or window < 1:
            raise AttentionError(
                f"blocks have at least one token, a window its own block: not {block_size}, {window}"
            )
        self.block_size, self.local_blocks = block_size, window

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        size, keys = self.block_size, k.shape[2]
        index = power_blocks(-(-keys // size), self.local_blocks, q.device)
        index = index[(keys - q.shape[2]) // size :]
        return attend_shared(q, k, v, index[None, None], rows=size, size=size, mask=mask)


def power_blocks(blocks: int, window: int, device: torch.device | str | None = None) -> Tensor:
    """The blocks `(M, S)` that each of M blocks sees, S at most `window + log2(M) + 1`; -1 = no block."""
    powers = [1 << i for i in range(blocks.bit_length()) if window <= 1 << i < blocks]
    distances = torch.tensor([*range(min(window, blocks)), *powers], device=device)
    seen = torch.arange(blocks, device=device)[:, None] - distances
    first = torch.zeros_like(seen[:, :1])
    return torch.cat([first, torch.where(seen > 0, seen, -1)], -1)


class Subsampled(MultiHead, name="ssa"):
    """Stochastically subsampled attention (Hussain et al. 2023): random keys in training, all of them after.

    In training, each forward pass draws an order of the tokens near their own, and cuts it into groups:
    a query sees the keys of its group. The order sorts `place + noise`, with Gaussian noise, from torch's
    generator of the device (`torch.manual_seed`). The paper shuffles the keys against the queries; here both
    are in one order, so that each query sees itself, and a causal one never nothing.

    Args:
        dim: width of the tokens.
        num_heads: of the queries; they share the order.
        share: of the tokens, how many are in a group.
        locality: standard deviation of the noise, in sizes of a group; None = any order is as likely.
        options: of `MultiHead`.
    """

    supports = Supports(bidirectional=True, causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2306.01705"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        share: float = 0.25,
        locality: float | None = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if not 0 < share <= 1 or (locality is not None and locality < 0):
            raise AttentionError(
                f"a share lies in (0, 1], and locality is not negative: not {share}, {locality}"
            )
        self.share, self.locality = share, locality

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if not self.training:
            return super().read(q, k, v, mask)
        if q.shape[2] != k.shape[2]:
            raise AttentionError("subsampled attention decodes in evaluation mode only: call eval()")
        size = max(1, round(self.share * k.shape[2]))
        subset = OrderedGroups(self._order(k.shape[2], size, k.device), size)
        return attend(q, k, v, pattern=subset & self.pattern(k.shape[2], mask), dropout=self.dropout)

    def _order(self, tokens: int, size: int, device: torch.device) -> Tensor:
        if self.locality is None:
            return torch.randperm(tokens, device=device)
        noise = torch.randn(tokens, device=device) * (self.locality * size)
        return (torch.arange(tokens, device=device) + noise).argsort()
