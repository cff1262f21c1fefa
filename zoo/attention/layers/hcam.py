"""Hierarchical chunk attention memory: pick chunks by their summaries, then read inside of them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.select import attend_blocks, block_means, select

_MASKED = -1e6


class _Within(nn.Module):
    """The projections of the attention inside a chunk."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.linear = nn.Linear(dim, dim)


class HierarchicalMemory(AttentionLayer, name="hcam"):
    """Reads a memory of chunks (arXiv 2105.14039, section 2), with the official parameter names.

    A token scores chunks by their summaries, attends inside each of the k best, and adds up what it read by
    the softmax of the k scores. The memory is `context`, which gets no gradient, or the tokens themselves.

    Args:
        dim: width of the tokens and of the memory.
        num_heads: of the attention inside a chunk.
        chunk_size: tokens per chunk; the last one may be shorter.
        k: chunks that a token reads.
        position_encoding: add sinusoids to the tokens of a chunk, the newest (last) at position 0.
    """

    supports = Supports(bidirectional=True, cross=True, padding=True)
    paper = "https://arxiv.org/abs/2105.14039"
    token_order: ClassVar[str] = "none"
    """The queries of its maps are pairs of a token and a chunk."""

    def __init__(
        self, dim: int, num_heads: int, *, chunk_size: int = 16, k: int = 4, position_encoding: bool = True
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        if chunk_size < 1 or k < 1:
            raise AttentionError(f"chunks have at least one token, and one is read: not {chunk_size}, {k}")
        if position_encoding and dim % 2:
            raise AttentionError(f"sinusoids need an even width, not {dim}")
        self.dim, self.num_heads, self.chunk_size, self.k = dim, num_heads, chunk_size, k
        self.position_encoding = position_encoding
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.within_mem_attn = _Within(dim)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask = given.x, given.context, given.mask
        memory = x if context is None else context.detach()
        size, room = self.chunk_size, -memory.shape[1] % self.chunk_size
        mask = memory.new_ones(memory.shape[:2], dtype=torch.bool) if mask is None else mask
        summaries = block_means(memory[:, None], size, mask)[:, 0]
        mask = F.pad(mask, (0, room))
        contents = F.pad(memory, (0, 0, 0, room)).unflatten(1, (-1, size))
        return self.read(x, contents, summaries, mask.unflatten(1, (-1, size)).any(-1)[:, None], mask)

    def read(
        self,
        x: Tensor,
        contents: Tensor,
        summaries: Tensor,
        mask: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """What the tokens `(B, N, dim)` read.

        Args:
            x: `(B, N, dim)`.
            contents: `(B, M, C, dim)`, M chunks of C tokens; a stored memory is detached (section 2).
            summaries: `(B, M, dim)`.
            mask: bool, broadcastable to `(B, N, M)`, True = the token may read the chunk. It reads others
                only where fewer than k are left, with the weight that a score of -1e6 gives.
            token_mask: bool `(B, M C)`, True = a real token.
        """
        scores = self.query(x) @ self.key(summaries).transpose(-2, -1) * self.dim**-0.5
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            scores = scores.masked_fill(~mask, _MASKED)
        index = select(scores, min(self.k, scores.shape[-1]))
        weights = scores.gather(-1, index).softmax(-1)
        if self.position_encoding:
            contents = contents + _sinusoids(contents)
        slots, within = index.shape[-1], self.within_mem_attn
        q = within.query(x).repeat_interleave(slots, 1)  # each (token, chunk) is a query of its own
        tokens = contents.flatten(1, 2)
        q, k, v = (split_heads(y, self.num_heads) for y in (q, within.key(tokens), within.value(tokens)))
        blocks = index.flatten(1)[:, None, :, None]
        out = attend_blocks(q, k, v, blocks, contents.shape[2], causal=False, mask=token_mask)
        out = within.linear(out.transpose(1, 2).flatten(2)).unflatten(1, (-1, slots))
        return (out * weights[..., None].to(out.dtype)).sum(2)


def _sinusoids(like: Tensor) -> Tensor:
    """`(C, dim)`: sines and cosines of the distance from the end of a chunk `(..., C, dim)`."""
    size, dim = like.shape[-2:]
    position = torch.arange(size - 1, -1, -1, device=like.device)
    powers = torch.arange(0, dim, 2, device=like.device) / dim
    angles = position[:, None] * 10_000.0**-powers
    return torch.cat([angles.sin(), angles.cos()], -1).to(like.dtype)
