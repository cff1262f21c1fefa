"""Relative positions as in Transformer-XL, on heads that have passed a short convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import Cache
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, masked
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.patterns import Causal, Dense
from zoo.attention.select import by_rows

_ROWS = 256  # queries whose logits with all keys are in memory at once


class ConvolvedCache(HeadCache):
    """Keys and values, and for each of the three convolutions the last `kernel - 1` tokens before it."""

    def __init__(self, layer: AttentionLayer, tails: dict[str, Tensor]) -> None:
        super().__init__(layer)
        self.tails = tails

    def nbytes(self) -> int:
        """Bytes in use, without the room for further tokens."""
        return super().nbytes() + sum(x.numel() * x.element_size() for x in self.tails.values())


class HeadConvolution(nn.Conv1d):
    """A causal convolution of each channel over the tokens, with one filter per channel for all heads."""

    def __init__(self, head_dim: int, kernel: int) -> None:
        super().__init__(head_dim, head_dim, kernel, groups=head_dim)
        self.tail = kernel - 1

    def forward(self, x: Tensor, before: Tensor | None = None) -> Tensor:
        """`(B, H, N, D)`, after the `kernel - 1` tokens `(B, H, kernel - 1, D)` before it, or zeros."""
        x = F.pad(x, (0, 0, self.tail, 0)) if before is None else torch.cat([before.to(x.dtype), x], 2)
        return super().forward(x.flatten(0, 1).mT).mT.unflatten(0, x.shape[:2])


class ConvolvedRelative(MultiHead, name="rcmha"):
    """RCMHA (arXiv 2308.03429): `((q_i + u) . k_j + q_i . P_{j-i} + b_{j-i}) / sqrt(D)`, the scores of
    Transformer-XL (Dai et al. 2019, section 3.3), with q, k and v convolved over the tokens, head by head.

    Memory tokens come as context, before the tokens themselves: `context = torch.cat([memory, x], 1)`, whose
    last N tokens stand where the queries stand. The queries' convolution starts at the first of them.
    Relative logits of some hundred queries with all keys are in memory at once, never those of all.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: H.
        max_length: how far back P and b reach, in tokens; as far ahead without causal.
        kernel: tokens under a convolution, which looks back.
        causal: tokens see themselves and earlier ones.
        context_dim: width of the context tokens; by default `dim`.
    """

    supports = Supports(bidirectional=True, causal=True, cross=True, padding=True, cache=True)
    paper = "https://arxiv.org/abs/2308.03429"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int = 4096,
        kernel: int = 3,
        causal: bool = True,
        context_dim: int | None = None,
    ) -> None:
        super().__init__(dim, num_heads, context_dim=context_dim, causal=causal, out_bias=True)
        if max_length < 1 or kernel < 1:
            raise AttentionError(f"max_length and kernel are at least 1, not {max_length} and {kernel}")
        self.max_length = max_length
        self.v_proj = nn.Linear(self.v_proj.in_features, dim)
        self.q_conv, self.k_conv, self.v_conv = (HeadConvolution(self.head_dim, kernel) for _ in range(3))
        self.key_pos_embeddings = nn.Parameter(torch.zeros(2 * max_length, num_heads, self.head_dim))
        self.key_pos_bias = nn.Parameter(torch.zeros(2 * max_length, num_heads))
        self.query_pos_bias = nn.Parameter(torch.zeros(num_heads, self.head_dim))

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, cache = given.x, given.context, given.mask, given.cache
        source = x if context is None else context
        if self.causal and source.shape[1] < x.shape[1]:
            raise AttentionError(
                f"a causal context ends with the {x.shape[1]} tokens themselves: it has {source.shape[1]}; "
                "give torch.cat([memory, x], 1)"
            )
        q = self._convolved("q", x, mask if context is None else None, cache)
        k, v = (self._convolved(name, source, mask, cache) for name in "kv")
        if isinstance(cache, ConvolvedCache):
            (k, v), mask = cache.extend((k, v), mask)
        if max(q.shape[2], k.shape[2]) > self.max_length:
            raise AttentionError(
                f"relative positions reach {self.max_length} tokens, not {max(q.shape[2], k.shape[2])}: "
                "build the layer with a larger max_length"
            )
        return self.project(self.read(q, k, v, mask))

    def _convolved(self, name: str, x: Tensor, keep: Tensor | None, cache: Cache | None) -> Tensor:
        """Queries, keys or values `(B, H, N, D)`; padding counts as the zeros before the first token."""
        rows = split_heads(self.get_submodule(f"{name}_proj")(x), self.num_heads)
        if keep is not None:
            rows = rows.masked_fill(~keep[:, None, :, None], 0.0)
        conv = self.get_submodule(f"{name}_conv")
        if not isinstance(cache, ConvolvedCache):
            return conv(rows)
        before, past = cache.tails[name], rows.shape[2]
        cache.tails[name] = torch.cat([before.to(rows.dtype), rows], 2)[:, :, past:].detach()
        return conv(rows, before)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        nq, nk = q.shape[2], k.shape[2]
        places = torch.arange(nk - nq, nk, device=q.device)[None, None, :, None]
        scale = self.head_dim**-0.5

        def part(q: Tensor, places: Tensor, seen: int) -> Tensor:
            bias = self.relative(q, places[0, 0, 0, 0], seen) * scale
            pattern = masked(Causal() if self.causal else Dense(), None if mask is None else mask[:, :seen])
            q = q + self.query_pos_bias[:, None].to(q.dtype)
            return attend(q, k[:, :, :seen], v[:, :, :seen], pattern=pattern, bias=bias, scale=scale)

        return by_rows(part, q, places, keys=nk, rows=_ROWS, causal=self.causal)

    def relative(self, q: Tensor, first: Tensor, keys: int) -> Tensor:
        """`q_i . P_{j-i} + b_{j-i}`, `(B, H, n, keys)`, of queries `(B, H, n, D)` from place `first` on."""
        n = q.shape[2]
        width = keys + n - 1  # distances of the last query to the first key, up to the first to the last
        at = torch.arange(width, device=q.device) - (n - 1) - first + self.max_length
        table, bias = (rows[at].to(q.dtype) for rows in (self.key_pos_embeddings, self.key_pos_bias))
        logits = q @ table.permute(1, 2, 0) + bias.mT[:, None]
        if n == 1:
            return logits
        # Row i begins n - 1 - i columns late: as one line, cut in rows one shorter, the columns are keys.
        line = logits.flatten(2)[..., n - 1 : n - 1 + n * (width - 1)]
        return line.unflatten(2, (n, width - 1))[..., :keys]

    def init_cache(self, batch_size: int) -> ConvolvedCache:
        """Holds keys and values, and the last tokens before the convolutions."""
        if not self.causal:
            raise AttentionError("step by step decoding needs causal=True")
        empty = self.q_conv.weight.new_zeros(batch_size, self.num_heads, self.q_conv.tail, self.head_dim)
        return ConvolvedCache(self, dict.fromkeys("qkv", empty))
