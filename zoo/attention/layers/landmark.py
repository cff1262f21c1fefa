"""Landmark attention: blocks of tokens that are reached through their last one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.backends import rows_at_once
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax
from zoo.attention.layers.sparse import Selecting
from zoo.attention.select import by_rows


class GroupedSoftmax:
    """The kernel of landmark attention (arXiv 2305.16300, section 3.1), over scores that are causal.

    The tokens of the query's own block and the landmarks of earlier blocks share one softmax; the tokens of
    an earlier block share the weight of its landmark by a softmax of their own. Landmarks get nothing.

    Args:
        landmarks: bool `(B, Nk)` or `(1, Nk)`: the token that closes a block. The last query stands at the
            last key.
    """

    placed = True

    def __init__(self, landmarks: Tensor) -> None:
        if landmarks.dtype != torch.bool or landmarks.ndim != 2:
            raise AttentionError(
                f"landmarks are bool (B, Nk), not {landmarks.dtype} {tuple(landmarks.shape)}"
            )
        self.landmarks = landmarks
        tokens = landmarks.shape[1]
        place = torch.arange(tokens, device=landmarks.device)
        closing = torch.where(landmarks, place, tokens).flip(-1).cummin(-1).values.flip(-1)
        self.block = closing.clamp(max=tokens - 1)  # by the place of its last token

    def __call__(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        if scores.shape[-1] != self.block.shape[-1]:
            raise AttentionError(
                f"landmarks of {self.block.shape[-1]} tokens do not fit {scores.shape[-1]} keys"
            )
        landmark = self.landmarks[:, None, None, :]
        mine = self.block[:, None, None, :] == self.block[:, None, -scores.shape[2] :, None]
        outer, lse = softmax(scores.masked_fill(mine == landmark, -torch.inf))
        block = self.block[:, None, None, :].expand(scores.shape)
        inner = _softmax_by_group(scores.masked_fill(mine | landmark, -torch.inf), block)
        return outer.masked_fill(landmark, 0.0) + inner * outer.gather(-1, block), lse


def _softmax_by_group(scores: Tensor, group: Tensor) -> Tensor:
    """Softmax over those of a row's scores that have the same group, a number below the row's length."""
    peak = torch.full_like(scores, -torch.inf).scatter_reduce(-1, group, scores.detach(), "amax")
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    exponents = (scores - peak.gather(-1, group)).exp()
    total = torch.zeros_like(scores).scatter_add(-1, group, exponents)
    return exponents / total.masked_fill(total == 0, 1.0).gather(-1, group)


class Landmark(Selecting, name="landmark"):
    """Landmark attention: the last token of each block is a landmark, through which later blocks reach it.

    The time is that of dense attention, the memory linear; what it buys is that blocks can be retrieved by
    their landmarks.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        block_size: tokens per block, the landmark included (51 in the paper).
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2305.16300"

    def __init__(self, dim: int, num_heads: int, *, block_size: int = 51, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if block_size < 2:
            raise AttentionError(f"a block holds a token and its landmark at least, not {block_size}")
        self.block_size = block_size

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(k.shape[2], device=k.device)
        landmarks = (place % self.block_size == self.block_size - 1)[None]

        def part(q: Tensor, seen: int) -> Tensor:
            pattern = self.pattern(seen, None if mask is None else mask[:, :seen])
            kernel = GroupedSoftmax(landmarks[:, :seen])
            return attend(q, k[:, :, :seen], v[:, :, :seen], pattern=pattern, kernel=kernel)

        return by_rows(part, q, keys=k.shape[2], rows=rows_at_once(q, k.shape[2]))
