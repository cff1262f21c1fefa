"""Softmax attention through few landmarks, the means of segments of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax, wide
from zoo.attention.layers.base import Inputs, Supports, masked
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.patterns import Dense


class NystromAttention(MultiHead, name="nystrom"):
    """`softmax(q k_l^T) softmax(q_l k_l^T)^+ softmax(q_l k^T) v` (Xiong et al. 2021, Nystromformer).

    The m landmarks q_l and k_l are means of equal segments of the tokens, the last ones one longer where m
    does not divide N. Six steps of an iteration give the pseudo-inverse. Queries and keys are both divided by
    sqrt(D): scores are `q . k / D`. A row of at most m tokens is plain softmax attention.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: H.
        landmarks: m.
        conv_kernel: tokens, an odd number, of a convolution of each head's values that is added; by default
            there is none.
        published: the program of CAB: the iteration starts from one scale for the whole batch, landmarks are
            means over padding as zeros too, and head h of row b takes the mask of row `(b H + h) mod B`. By
            default each head of a row has its own scale, and segments hold real tokens.
        bias: of the four projections.
        dropout: of the first softmax.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2102.03902"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        landmarks: int = 16,
        conv_kernel: int | None = None,
        published: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, qkv_bias=bias, out_bias=bias, dropout=dropout)
        if landmarks < 1:
            raise AttentionError(f"there is at least one landmark, not {landmarks}")
        if conv_kernel is not None and conv_kernel % 2 == 0:
            raise AttentionError(f"a convolution that keeps the number of tokens is odd, not {conv_kernel}")
        self.landmarks, self.published = landmarks, published
        self.conv = None
        if conv_kernel is not None:
            self.conv = nn.Conv2d(
                num_heads,
                num_heads,
                (conv_kernel, 1),
                padding=(conv_kernel // 2, 0),
                bias=False,
                groups=num_heads,
            )

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        q, k, v = (split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.published:  # each head is a row of its own
            q, k, v = (rows.flatten(0, 1)[:, None] for rows in (q, k, v))
            mask = None if mask is None else mask.repeat(self.num_heads, 1)
        if mask is not None:
            k, v = (rows.masked_fill(~mask[:, None, :, None], 0.0) for rows in (k, v))
        out = self._plain(q, k, v, mask) if x.shape[1] <= self.landmarks else self._nystrom(q, k, v, mask)
        out, v = (rows.reshape(len(x), self.num_heads, *rows.shape[2:]) for rows in (out, v))
        return self.project(out if self.conv is None else out + self.conv(v))

    def init_cache(self, batch_size: int) -> HeadCache:
        raise AttentionError("landmarks are means of all tokens: there is no cache; abc decodes step by step")

    def _plain(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, pattern=masked(Dense(), mask), scale=1 / self.head_dim, dropout=dropout)

    def _nystrom(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scale, m = 1 / self.head_dim, self.landmarks
        real = torch.ones_like(q[:1, 0, :, 0], dtype=torch.bool) if mask is None or self.published else mask
        with torch.autocast(q.device.type, enabled=False):
            members = segment_members(real, m)
            q_marks, k_marks = (_pooled(rows, members) for rows in (q, k))
        gathered = attend(q_marks, k, v, pattern=masked(Dense(), mask), scale=scale)
        with torch.autocast(q.device.type, enabled=False):
            between = softmax(wide(q_marks) @ wide(k_marks).mT * scale)[0]
            solved = (self._inverse(between) @ wide(gathered)).to(q.dtype)
        out = attend(q, k_marks, solved, scale=scale, dropout=self.dropout if self.training else 0.0)
        if mask is None or self.published:
            return out
        # Rows of no more real tokens than landmarks: their real tokens stand first.
        order = (~mask).long().argsort(dim=1, stable=True)[:, :m]
        first_k, first_v = (rows.take_along_dim(order[:, None, :, None], 2) for rows in (k, v))
        few = (real.sum(1) <= m)[:, None, None, None]
        return torch.where(few, self._plain(q, first_k, first_v, mask.take_along_dim(order, 1)), out)

    def _inverse(self, x: Tensor) -> Tensor:
        """An approximate pseudo-inverse of matrices `(B, H, m, m)` whose rows sum to one."""
        columns = x.sum(-2)
        largest = columns.amax() if self.published else columns.amax(-1)[..., None, None]
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        inverse = x.mT / largest
        for _ in range(6):
            product = x @ inverse
            rest = 15 * identity - product @ (7 * identity - product)
            inverse = 0.25 * inverse @ (13 * identity - product @ rest)
        return inverse


def segment_members(real: Tensor, segments: int) -> Tensor:
    """Which tokens m equal segments of the real ones hold, bool `(B, m, N)`.

    With n real tokens, the first `(n // m + 1) m - n` segments hold `n // m` of them, the others one more.

    Args:
        real: bool `(B, N)`.
        segments: m.
    """
    rank, count = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    size = count // segments
    short = (size + 1) * segments - count
    edge = short * size
    segment = torch.where(rank < edge, rank // size.clamp(min=1), short + (rank - edge) // (size + 1))
    numbers = torch.arange(segments, device=real.device)[:, None]
    return (segment[:, None] == numbers) & real[:, None]


def _pooled(x: Tensor, members: Tensor) -> Tensor:
    """Tokens `(B, H, N, D)` to the means `(B, H, m, D)` of segments; those of none are zero."""
    tokens = wide(x).transpose(1, 2).flatten(2)
    sums = members.to(tokens.dtype) @ tokens
    means = (sums / members.sum(-1, keepdim=True).clamp(min=1)).unflatten(-1, (x.shape[1], -1))
    return means.transpose(1, 2).to(x.dtype)
