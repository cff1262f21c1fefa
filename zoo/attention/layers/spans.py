"""Attention to spans of the past that a first, coarse look finds."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.kernels import wide
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.multihead import split_heads
from zoo.attention.layers.sparse import Selecting
from zoo.attention.merge import merge
from zoo.attention.select import GATHERED, attend_blocks, by_rows, gather_blocks, select_up_to


class Superlinear(Selecting, name="superlinear"):
    """Superlinear multi-step attention (Huang 2026): search spans, then attend in the best: O(N^1.5).

    The query at t (from 1) has `floor(sqrt(t))` candidates: spans of `ceil(span_factor * sqrt(t)) + 1` tokens
    that end at `t - i^2 + 1`, i = 1, 2, ... A search query, of a projection of its own, scores them by the
    key of their last token; a softmax inside each of the `num_spans` best gives their outputs, and the
    softmax of their search scores adds these up. The first candidate ends at the query itself, but has to be
    found as the others have. With a factor of 2 or more, neighbours overlap: each token is in a candidate.

    Args:
        dim: width of the tokens.
        num_heads: of the queries; each searches for itself.
        num_spans: that a query reads.
        span_factor: tokens of a span by the root of the query's place.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2601.18401"

    def __init__(
        self, dim: int, num_heads: int, *, num_spans: int = 2, span_factor: float = 2.0, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if num_spans < 1 or span_factor <= 0:
            raise AttentionError(
                f"at least one span, of some length, is read: not {num_spans}, {span_factor}"
            )
        self.num_spans, self.span_factor = num_spans, span_factor
        self.search_proj = nn.Linear(dim, num_heads * self.head_dim, bias=self.q_proj.bias is not None)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        both = torch.cat(
            [split_heads(proj(x), self.num_heads) for proj in (self.q_proj, self.search_proj)], 1
        )
        both, (k, v), mask = self.heads(both, x, context, mask, positions, cache)
        q, search = both.chunk(2, 1)

        ends = self._ends(search, k, mask)
        index = ends.clamp(min=0).unflatten(1, (self.num_kv_heads, -1)).flatten(2, 3)
        found = gather_blocks(k, index).view(*ends.shape, -1)
        with torch.autocast(x.device.type, enabled=False):
            scores = (wide(search)[:, :, :, None] * wide(found)).sum(-1) * self.head_dim**-0.5
        scores = scores.masked_fill(ends < 0, -torch.inf)
        parts = self._inside(q, k, v, ends, mask)
        return self.project(merge(*zip(parts, scores.unbind(-1), strict=True))[0])

    @torch.no_grad()
    def _ends(self, search: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """The last tokens `(B, H, N, S)` of the best spans, -1 where there are fewer."""
        number = min(self.num_spans, math.isqrt(k.shape[2]))

        def part(search: Tensor, seen: int) -> Tensor:
            steps = torch.arange(1, math.isqrt(seen) + 1, device=k.device)
            place = torch.arange(seen - search.shape[2], seen, device=k.device)
            ends = place[:, None] + 1 - steps.square()
            keys = k[:, :, ends.clamp(min=0)]
            rows = wide(search).unflatten(1, (k.shape[1], -1))
            scores = torch.einsum("bhgnd,bhnsd->bhgns", rows, wide(keys)).flatten(1, 2)
            hidden = (ends < 0)[None, None]
            if mask is not None:
                hidden = hidden | ~mask[:, ends.clamp(min=0)][:, None]
            best = select_up_to(scores.masked_fill(hidden, -torch.inf), number)
            found = ends.expand(scores.shape).gather(-1, best.clamp(min=0))
            return found.masked_fill(best < 0, -1)

        rows = max(1, GATHERED // (math.isqrt(k.shape[2]) * k.shape[1] * k.shape[3]))
        with torch.autocast(k.device.type, enabled=False):
            return by_rows(part, search, keys=k.shape[2], rows=rows)

    def _inside(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Outputs `(B, H, N, D)` of each of the spans that end at `ends` `(B, H, N, S)`."""
        keys, spans = k.shape[2], ends.shape[-1]
        places = torch.arange(keys - q.shape[2] + 1, keys + 1, device=q.device)
        length = (self.span_factor * places.double().sqrt()).ceil().long()[:, None]
        reach = torch.stack([(ends - length).clamp(min=0), ends], -1).flatten(2, 3)
        longest = min(math.ceil(self.span_factor * math.sqrt(keys)) + 1, keys)
        size = max(16, longest // 2)
        block = reach[..., :1] // size + torch.arange((longest - 2) // size + 2, device=q.device)
        block = block.masked_fill(block > reach[..., 1:] // size, -1)  # -1 for a span that there is not
        rows = q.repeat_interleave(spans, 2)  # each pair of a query and a span is a query of its own
        out = attend_blocks(rows, k, v, block, size, reach=reach, mask=mask)
        return out.unflatten(2, (-1, spans)).unbind(3)
