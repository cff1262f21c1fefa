"""Mixture of heads: every token weighs the heads it needs (Jin et al. 2024, MoH, arXiv 2410.11842)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.patterns import Causal, Dense
from zoo.attention.rotary import rotary, rotary_tables


class RoutedHeads(AttentionLayer):
    """Shared heads that always act, routed heads of which the k best of each token do, and their weights.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: Hs, the first heads.
        routed_heads: k, how many of the H - Hs others act on a token.
        balance_weight: of `balance_loss` in `aux_loss`.
    """

    paper = "https://arxiv.org/abs/2410.11842"

    def __init__(
        self, dim: int, num_heads: int, shared_heads: int, routed_heads: int, balance_weight: float
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        _check_heads(num_heads, shared_heads, routed_heads)
        self.dim, self.num_heads = dim, num_heads
        self.shared_heads, self.routed_heads = shared_heads, routed_heads
        self.balance_weight = balance_weight
        if routed_heads:
            self.wg = nn.Linear(dim, num_heads - shared_heads, bias=False)
        if routed_heads and shared_heads:
            self.wg_0 = nn.Linear(dim, 2, bias=False)
        if shared_heads > 1:
            self.wg_1 = nn.Linear(dim, shared_heads, bias=False)

    def gated(self, out: Tensor, x: Tensor) -> Tensor:
        """What the heads give `(B, H, N, D)`, weighted by the tokens `(B, N, C)`: `(B, N, H D)`."""
        if self.training and self.routed_heads:
            self.aux_loss = self.balance_weight * self.balance_loss(x)
        out = out.transpose(1, 2)
        return (out * self.gates(x)[..., None].to(out.dtype)).flatten(2)

    def gates(self, x: Tensor) -> Tensor:
        """The weight of each head for tokens `(..., C)`: `(..., H)`."""
        shared = self._shared(x)
        if not self.routed_heads:
            return shared
        weights, kept = self._routed(x)
        routed = weights * kept
        total = routed.sum(-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps)
        routed = self.routed_heads * routed / total
        if not self.shared_heads:
            return routed
        balance = 2 * precise(self.wg_0, x).softmax(-1)
        return torch.cat([shared * balance[..., :1], routed * balance[..., 1:]], dim=-1)

    def balance_loss(self, x: Tensor) -> Tensor:
        """`E^2 mean_e(mean weight_e * mean kept_e)` over tokens `(..., C)` and the E routed heads.

        It is k when all are used alike.
        """
        if not self.routed_heads:
            return x.new_zeros(())
        weights, kept = (part.flatten(0, -2).mean(0) for part in self._routed(x))
        return (weights * kept).mean() * len(weights) ** 2

    def _shared(self, x: Tensor) -> Tensor:
        """`(..., Hs)`; a lone shared head weighs 1."""
        if self.shared_heads > 1:
            return self.shared_heads * precise(self.wg_1, x).softmax(-1)
        return x.new_ones(*x.shape[:-1], self.shared_heads)

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of each routed head, and 1 where it is kept: `(..., H - Hs)`."""
        weights = precise(self.wg, x).softmax(-1)
        return weights, top_k_mask(weights.detach(), self.routed_heads)


class MixtureOfHeads(RoutedHeads, name="moh"):
    """MoH: `out = W_o concat_h(g_h(x) o_h)`; shared heads always act, of the others the k best of each token.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: Hs, the first heads.
        routed_heads: k, how many of the H - Hs others act on a token.
        qkv_bias: of the projection in; the one out has a bias.
        rope_theta: base of the rotary positions, half-split; by default there are none.
        causal: tokens see themselves and earlier ones.
        balance_weight: of `balance_loss` in `aux_loss`.
    """

    supports = Supports(bidirectional=True, causal=True, padding=True, packed=True, cache=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int,
        routed_heads: int,
        qkv_bias: bool = True,
        rope_theta: float | None = None,
        causal: bool = False,
        balance_weight: float = 0.01,
    ) -> None:
        super().__init__(dim, num_heads, shared_heads, routed_heads, balance_weight)
        self.causal, self.rope_theta = causal, rope_theta
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions, cache = given.x, given.mask, given.positions, given.cache
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope_theta is not None:
            places = default_positions(x, cache) if positions is None else positions
            q, k = self._turned(self.rope_theta, places, q, k)
        if isinstance(cache, HeadCache):
            (k, v), mask = cache.extend((k, v), mask)
        out = attend(q, k, v, pattern=masked(Causal() if self.causal else Dense(), mask))
        return self.proj(self.gated(out, x))

    def init_cache(self, batch_size: int) -> HeadCache:
        """Holds keys and values."""
        if not self.causal:
            raise AttentionError("only causal layers decode step by step")
        return HeadCache(self)

    @staticmethod
    def _turned(theta: float, positions: Tensor, *rows: Tensor) -> list[Tensor]:
        """Rows `(B, H, N, D)` at positions `(N,)` or `(B, N)`."""
        places = positions if positions.ndim == 1 else positions[:, None]
        tables = rotary_tables(places, rows[0].shape[-1], theta=theta)
        return [rotary(part, *tables) for part in rows]


class MixtureOfHeadsLlama(MultiHead, name="moh_llama"):
    """MoH-LLaMA3: no router; of the heads that are not shared, the k with the longest query act, unweighted.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shared_heads: Hs, the first heads; H / 2 by default.
        routed_heads: k, H / 4 by default.
        rope_theta: base of the rotary positions.
        options: of `MultiHead`.
    """

    paper = RoutedHeads.paper
    supports = Supports(causal=True, padding=True, packed=True, cache=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shared_heads: int | None = None,
        routed_heads: int | None = None,
        rope_theta: float = 500_000.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal=True, rope_theta=rope_theta, **options)
        self.shared_heads = num_heads // 2 if shared_heads is None else shared_heads
        self.routed_heads = max(1, num_heads // 4) if routed_heads is None else routed_heads
        _check_heads(num_heads, self.shared_heads, self.routed_heads)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(precise(self.q_proj, x), self.num_heads)
        gates = self.gates(q)
        q, (k, v), mask = self.heads(q.to(x.dtype), x, context, mask, positions, cache)
        out = self.read(q, k, v, mask)
        return self.project(out * gates[..., None].to(out.dtype))

    def gates(self, q: Tensor) -> Tensor:
        """0 or 1 for each head and token `(B, H, N)` by queries `(B, H, N, D)`; no gradient passes."""
        kept = top_k_mask(self.routing_norms(q), self.routed_heads)
        return F.pad(kept, (self.shared_heads, 0), value=1.0).transpose(1, 2)

    def routing_norms(self, q: Tensor) -> Tensor:
        """Lengths `(B, N, H - Hs)` of the queries `(B, H, N, D)` before rotation."""
        return torch.linalg.vector_norm(q[:, self.shared_heads :].detach(), dim=-1).transpose(1, 2)


def precise(proj: nn.Linear, x: Tensor) -> Tensor:
    """`proj(x)` in float32 or wider, also under autocast: rounding must not choose the heads."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if proj.bias is None else proj.bias.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(wide), proj.weight.to(wide), bias)


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest of the last axis, 0 elsewhere."""
    return torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)


def _check_heads(num_heads: int, shared_heads: int, routed_heads: int) -> None:
    if not 0 <= shared_heads <= num_heads:
        raise AttentionError(f"shared heads are 0 .. {num_heads}, not {shared_heads}")
    rest = num_heads - shared_heads
    if not min(rest, 1) <= routed_heads <= rest:
        raise AttentionError(
            f"of the {rest} routed heads {min(rest, 1)} .. {rest} act on a token, not {routed_heads}"
        )
