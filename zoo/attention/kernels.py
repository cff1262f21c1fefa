"""Kernels: how scores become weights.

A kernel maps float32 (or float64) scores `(B, H, Nq, Nk)`, with -inf where a query may not look, to the pair
`(weights, lse)`: weights of the same shape, and the log-sum-exp `(B, H, Nq)` of the scores that it kept. A
row without any visible key has zero weights and lse = -inf, and passes back zero gradients. Rows are computed
apart from each other: a kernel that has to know which they are says so by an attribute `placed = True`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: what statistics are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the keys (Vaswani et al. 2017, equation 1)."""
    peak = scores.detach().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    exponents = (scores - peak).exp()
    total = exponents.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (peak + total.log()).masked_fill(empty, -torch.inf)
    return exponents / total, lse.squeeze(-1)


class TopKSoftmax:
    """Softmax over the k largest visible scores of each row; equal scores: the lower key index first.

    A row that sees fewer than k keys keeps them all.
    """

    def __init__(self, k: int) -> None:
        if k < 1:
            raise AttentionError(f"top-k softmax needs k >= 1, not {k}")
        self.k = k

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if self.k >= scores.shape[-1]:
            return softmax(scores)
        threshold = scores.detach().topk(self.k, dim=-1).values[..., -1:]
        above, level = scores > threshold, scores == threshold
        room = self.k - above.sum(-1, keepdim=True)
        kept = above | (level & (level.cumsum(-1) <= room))
        return softmax(scores.masked_fill(~kept, -torch.inf))

    def __repr__(self) -> str:
        return f"TopKSoftmax({self.k})"
