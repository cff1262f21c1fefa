"""Softmax attention that forgets, and attention that breaks a stick instead of a softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Inputs, Supports
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.patterns import Causal, Pattern, Rule


def forgetting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    *,
    pattern: Pattern | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax of `scale q_i . k_j + c_i - c_j`, `c` the running sum of the log forget gates.

    Forgetting attention (Lin et al. 2025, equation 6). The bias has rank one and goes into further channels
    of queries and keys, in float32: any backend runs it, in linear memory.

    Args:
        q: `(B, H, N, D)`.
        k, v: `(B, Hk, M, D)` and `(B, Hk, M, Dv)`; the last N keys stand where the queries stand.
        log_forget: `(B, H, M)`, at most 0.
        pattern: causal by default, and part of a causal one otherwise.

    Returns:
        `(B, H, N, Dv)` and the log-sum-exp `(B, H, N)`.
    """
    batch, heads, n = q.shape[:3]
    kv_heads, m = k.shape[1:3]
    if log_forget.shape != (batch, heads, m) or m < n:
        raise AttentionError(
            f"forget gates are (B, H, M) = {(batch, heads, m)}, M >= N = {n}, not {tuple(log_forget.shape)}"
        )
    if heads % kv_heads:
        raise AttentionError(f"{heads} query heads are not divisible by {kv_heads} key/value heads")
    pattern = Causal() if pattern is None else pattern
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide, dtype = torch.promote_types(q.dtype, torch.float32), v.dtype
    total = log_forget.double().cumsum(-1)  # c
    if n == 1:  # decoding: the bias is but one row
        bias = (total[:, :, -1:] - total).to(wide)[:, :, None]
        return attend(q, k, v, pattern=pattern, bias=bias, scale=factor, dropout=dropout, return_lse=True)
    # What is large in c_i and c_j comes first, in multiples of 64, and cancels without rounding.
    coarse = (total.detach() / 64).round() * 64
    queries, keys = zip(*(_difference(c.to(wide), q, k) for c in (coarse, total - coarse)), strict=True)
    q = torch.cat([*queries, q.to(wide) * factor], dim=-1)
    k = torch.cat([*keys, k.to(wide)], dim=-1)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = attend(q, k, v.to(wide), pattern=pattern, scale=1.0, dropout=dropout, return_lse=True)
    return out.to(dtype), lse


def _difference(c: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Channels `(B, H, N, 1 + G)` and `(B, Hk, M, 1 + G)` whose product is `c_i - c_j`, for c `(B, H, M)`.

    A query adds its own c, and picks that of its head out of the G beside the key that its heads share.
    """
    beside = c.unflatten(1, (k.shape[1], -1)).transpose(2, 3)
    pick = torch.eye(beside.shape[3], dtype=c.dtype, device=c.device).repeat(k.shape[1], 1)[:, None]
    own = c[:, :, -q.shape[2] :, None]
    queries = torch.cat([own, pick.expand(*q.shape[:3], -1)], dim=-1)
    return queries, torch.cat([torch.ones_like(beside[..., :1]), -beside], dim=-1)


class ForgettingAttention(MultiHead, name="forgetting"):
    """Forgetting attention (Lin et al. 2025) with gates `sigmoid(x W_f + b_f)` per head.

    The decay says where a token stands: rotary positions are optional.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2503.02130"

    def __init__(self, dim: int, num_heads: int, *, causal: bool = True, **options: Any) -> None:
        """Options are those of `MultiHead`."""
        _must_be_causal(self, causal)
        super().__init__(dim, num_heads, causal=True, **options)
        self.f_proj = nn.Linear(dim, num_heads)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions, cache = given.x, given.mask, given.positions, given.cache
        gates = self.f_proj(x).transpose(1, 2)
        log_forget = F.logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32)))
        if mask is not None and mask.dtype == torch.bool:
            log_forget = log_forget * mask[:, None]
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v, gates), mask = self.heads(q, x, None, mask, positions, cache, log_forget[..., None])
        dropout = self.dropout if self.training else 0.0
        pattern = self.pattern(k.shape[2], mask)
        return self.project(forgetting(q, k, v, gates[..., 0], pattern=pattern, dropout=dropout)[0])


class Before(Pattern):
    """A query sees the keys before its own place, aligned as in `Causal`."""

    def rule(self, nq: int, nk: int) -> Rule:
        return lambda b, h, i, j: j < i + (nk - nq)

    def __repr__(self) -> str:
        return "Before()"


def stick_breaking(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel: the nearest visible key breaks off `sigmoid(s)` of a stick, the next one of what is left.

    `w_ij = sigmoid(s_ij) prod_{j < l < i} (1 - sigmoid(s_il))` (Tan et al. 2024, equation 3).

    Returns:
        The weights, and in place of the log-sum-exp the logarithm of what is left of the stick.
    """
    left = -F.softplus(scores).flip(-1).cumsum(-1).flip(-1)  # by this key and all nearer ones, in logs
    return (scores + left).exp(), left[..., 0]  # log sigmoid(s) = s - softplus(s)


class StickBreaking(MultiHead, name="stick_breaking"):
    """Stick-breaking attention (Tan et al. 2024): recency without positions, and without a softmax.

    Args:
        attend_current: a token also sees itself.
        options: of `MultiHead`.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2410.17980"

    def __init__(
        self, dim: int, num_heads: int, *, attend_current: bool = False, causal: bool = True, **options: Any
    ) -> None:
        _must_be_causal(self, causal)
        super().__init__(dim, num_heads, causal=True, **options)
        self.attend_current = attend_current

    def pattern(self, num_keys: int, mask: Tensor | None) -> Pattern:
        seen = super().pattern(num_keys, mask)
        return seen if self.attend_current else seen & Before()

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pattern, dropout = self.pattern(k.shape[2], mask), self.dropout if self.training else 0.0
        return attend(q, k, v, pattern=pattern, kernel=stick_breaking, dropout=dropout)


def _must_be_causal(layer: MultiHead, causal: bool) -> None:
    if not causal:
        raise AttentionError(f"{type(layer).__name__} looks back only: causal=True")
