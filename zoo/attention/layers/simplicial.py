"""Attention of third order: a query looks at pairs of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax, wide
from zoo.attention.layers.base import Inputs, masked
from zoo.attention.layers.multihead import HeadCache, MultiHead, WindowCache, split_heads
from zoo.attention.layers.window import Reach
from zoo.attention.patterns import Causal, Dense, Pattern


class SimplicialAttention(MultiHead, name="simplicial"):
    """2-simplicial attention (Clift et al. 2019; Roy et al. 2025): the values are products `v_j * v'_k` and
    the weights `softmax_{jk}(sum_d q_id k_jd k'_kd / sqrt(D))`.

    For each second token k, the query `q_i * k'_k` attends to the first ones; their log-sum-exp weigh the
    second. Cost and memory are N w1 w2 and N w2 with windows, N^3 and N^2 without.

    Args:
        dim: width of the tokens.
        num_heads: H.
        num_kv_heads: Hk, a divisor of H; by default H.
        head_dim: D; by default `dim / num_heads`.
        windows: w1 and w2, the numbers of first and of second tokens that a query sees around its own place,
            or up to it where causal; odd unless causal; by default all. Not with a context.
        causal: tokens see themselves and earlier ones.
        context_dim: width of the context tokens; by default `dim`.
        qkv_bias, out_bias: biases of the projections.
    """

    paper = "https://arxiv.org/abs/2507.02754"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        windows: Sequence[int] | None = None,
        causal: bool = False,
        context_dim: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            causal=causal,
            context_dim=context_dim,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
        )
        if windows is not None:
            if len(windows) != 2:
                raise AttentionError(f"windows are two numbers of tokens, not {tuple(windows)}")
            for size in windows:
                Reach(size, causal=causal)  # says what is wrong with it
        self.windows = None if windows is None else tuple(windows)
        source, inner = self.k_proj.in_features, self.k_proj.out_features
        self.second_k_proj = nn.Linear(source, inner, bias=qkv_bias)
        self.second_v_proj = nn.Linear(source, inner, bias=qkv_bias)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        if context is not None and self.windows is not None:
            raise AttentionError("windows lie around a token's own place: a context needs windows=None")
        source = x if context is None else context
        second = (
            split_heads(proj(source), self.num_kv_heads) for proj in (self.second_k_proj, self.second_v_proj)
        )
        q = split_heads(self.q_proj(x), self.num_heads)
        q, rows, mask = self.heads(q, x, context, mask, positions, cache, *second)
        k, v, second_k, second_v = rows
        at, seen = self._second(q.shape[2], k.shape[2], mask, q.device)
        # (B, Hk, G, S, N, D): heads of queries, one for each second token.
        mixed = q.unflatten(1, (k.shape[1], -1))[:, :, :, None] * _picked(second_k, at)[:, :, None]
        pattern = self.pattern(k.shape[2], mask)
        out, lse = attend(mixed.flatten(1, 3), k, v, pattern=pattern, return_lse=True)
        out, lse = (found.unflatten(1, mixed.shape[1:4]) for found in (out, lse))
        weights, _ = softmax(lse.masked_fill(~seen[:, None, None], -torch.inf).movedim(3, -1))
        values = wide(out * _picked(second_v, at)[:, :, None])
        return self.project((weights.movedim(-1, 3)[..., None] * values).sum(3).flatten(1, 2).to(v.dtype))

    def _second(self, nq: int, nk: int, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places of the second tokens of each query `(S, N)`; which it sees, bool `(B or 1, S, N)`."""
        own = torch.arange(nk - nq, nk, device=device)
        if self.windows is None:
            at = torch.arange(nk, device=device)[:, None].expand(-1, nq)
        else:
            size = min(self.windows[1], nk if self.causal else 2 * nk - 1)
            band = Reach(size, causal=self.causal)
            at = own + torch.arange(-band.left, band.right + 1, device=device)[:, None]
        seen = ((at >= 0) & (at <= (own if self.causal else nk - 1)))[None]
        at = at.clamp(0, nk - 1)
        if mask is not None:
            seen = seen & (mask[:, at] if mask.dtype == torch.bool else mask[:, at] == mask[:, None, own])
        return at, seen

    def pattern(self, num_keys: int, mask: Tensor | None) -> Pattern:
        """Which first tokens are seen."""
        if self.windows is None:
            return masked(Causal() if self.causal else Dense(), mask)
        longest = num_keys if self.causal else 2 * num_keys - 1
        return masked(Reach(min(self.windows[0], longest), causal=self.causal), mask)

    def init_cache(self, batch_size: int) -> HeadCache:
        if self.causal and self.windows is not None:
            return WindowCache(self, max(self.windows))
        return super().init_cache(batch_size)


def _picked(x: Tensor, at: Tensor) -> Tensor:
    """Rows of x `(B, H, M, D)` at places `(S, N)`, `(B, H, S, N, D)`."""
    return x.index_select(2, at.flatten()).unflatten(2, at.shape)
