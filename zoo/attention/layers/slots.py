"""Attention with bounded memory: all tokens are written to few slots, which the queries then read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import Cache
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import wide
from zoo.attention.layers.base import Inputs, Supports, masked
from zoo.attention.layers.linear import StateCache, hidden
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.linear import gated_slots
from zoo.attention.patterns import Dense

_UNSEEN = -1e4  # the logarithm of padding's weight in a slot: finite, and nothing beside a token's


class BoundedMemory(MultiHead, name="abc"):
    """ABC (Peng et al. 2022): `softmax(q K~^T / sqrt(D)) V~` with M slots of keys and of values.

    `K~_m = sum_j w_jm k_j`, the weights a softmax of `k_j . c_m` over the tokens; V~ alike with vectors c'
    and values (the slots of CAB, Zhang et al. 2023). Causal, a token reads the slots of the tokens up to it:
    each slot is a recurrence that decays by `exp(z_{t-1} - z_t)`, z the log-sum-exp so far. A context is read
    whole, causal or not: queries never see each other.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: H.
        slots: M, for all heads.
        context_dim: width of the context tokens; by default `dim`.
        causal: tokens see themselves and earlier ones.
        accumulate: False: the program of CAB as published, where causal slots hold the current token alone,
            at its share `exp(k_t . c_m - z_t)`.
        bias: of the four projections.
        dropout: of the weights of the slots, where they are not a recurrence.
    """

    supports = Supports(bidirectional=True, causal=True, cross=True, padding=True, cache=True)
    paper = "https://arxiv.org/abs/2110.02488"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        slots: int = 16,
        context_dim: int | None = None,
        causal: bool = False,
        accumulate: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            context_dim=context_dim,
            causal=causal,
            qkv_bias=bias,
            out_bias=bias,
            dropout=dropout,
        )
        if slots < 1:
            raise AttentionError(f"memory has at least one slot, not {slots}")
        self.accumulate = accumulate
        self.compress_k, self.compress_v = (
            nn.Parameter(nn.init.xavier_uniform_(torch.empty(self.head_dim, slots), gain=2**-0.5))
            for _ in range(2)
        )

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, cache = given.x, given.context, given.mask, given.cache
        source = x if context is None else context
        q, k, v = (
            split_heads(proj(rows), self.num_heads)
            for proj, rows in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        if self.causal and context is None:
            return self.project(self._up_to(q, k, v, mask, cache))
        pattern = masked(Dense(), mask)
        memory = (
            attend(_each(places, rows), rows, rows, pattern=pattern, scale=1.0)
            for places, rows in ((self.compress_k, k), (self.compress_v, v))
        )
        return self.project(attend(q, *memory, dropout=self.dropout if self.training else 0.0))

    def _up_to(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, cache: Cache | None) -> Tensor:
        """Every query with the slots of the tokens up to it; keep is bool `(B, N)`, or None."""
        state = cache.state if isinstance(cache, StateCache) else None
        shares, decays, totals = [], [], []
        for i, (places, rows) in enumerate(((self.compress_k, k), (self.compress_v, v))):
            logits = wide(rows @ places.to(rows.dtype))
            if keep is not None:
                logits = logits.masked_fill(~keep[:, None, :, None], _UNSEEN)
            total = logits.logcumsumexp(2)
            before = total[:, :, :1] if state is None else state[2 + i]
            if state is not None:
                total = torch.logaddexp(total, before)
            shares.append(hidden((logits - total).exp(), keep))
            decays.append(torch.cat([before, total[:, :, :-1]], 2) - total)
            totals.append(total[:, :, -1:].detach())
        slots: tuple[Tensor, ...] = () if state is None else state[:2]
        if self.accumulate:
            out, slots = gated_slots(
                q,
                hidden(k, keep),
                hidden(v, keep),
                shares[0],
                log_decay=decays[0],
                value_slots=shares[1],
                value_log_decay=decays[1],
                state=(slots[0], slots[1]) if slots else None,
            )
        else:
            scores = wide((q * k).sum(-1, keepdim=True)) * self.head_dim**-0.5 * shares[0]
            out = (scores.softmax(-1) * shares[1]).sum(-1, keepdim=True).to(v.dtype) * v
            slots = (out.new_zeros(0), out.new_zeros(0))  # nothing is kept but the sums
        if isinstance(cache, StateCache):
            cache.state = (*slots, *totals)
            cache.length += q.shape[2]
        return out

    def init_cache(self, batch_size: int) -> StateCache:
        """Holds the slots and the sums of their weights: `2 H M (D + 1)` numbers, whatever the length."""
        if not self.causal:
            raise AttentionError("slots of causal=False hold later tokens: decoding needs causal=True")
        return StateCache(self)


def _each(places: Tensor, rows: Tensor) -> Tensor:
    """Vectors of slots `(D, M)` as queries `(B, H, M, D)` beside rows `(B, H, N, D)`."""
    return places.mT.to(rows.dtype).expand(*rows.shape[:2], -1, -1)
