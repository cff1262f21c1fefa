"""Head maps: which key/value head each query head reads; fixed (GQA), or computed from the keys."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError


def shared_map(num_heads: int, num_kv_heads: int) -> Tensor:
    """The map `(H,)` of grouped-query attention (Ainslie et al. 2023): query head h reads `h // (H / Hk)`."""
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise AttentionError(f"{num_heads} query heads are not divisible by {num_kv_heads} key/value heads")
    return torch.arange(num_heads) // (num_heads // num_kv_heads)


def expand(x: Tensor, head_map: Tensor) -> Tensor:
    """Keys or values `(B, Hk, N, D)` as each query head reads them, `(B, H, N, D)`, by a map `(H,)`.

    Keys and values may have maps, and numbers of heads, of their own (DHA; Chen et al. 2024).
    """
    if head_map.ndim != 1 or head_map.is_floating_point() or head_map.dtype == torch.bool:
        raise AttentionError(f"a head map is integers (H,), not {head_map.dtype} {tuple(head_map.shape)}")
    # Tokens first is how projections lie in memory: their gradient adds up faster.
    return x.transpose(1, 2).index_select(2, head_map).transpose(1, 2)


def key_norms(k: Tensor) -> Tensor:
    """Norm of each key head over tokens and channels, summed over the batch: `(B, Hk, N, D)` to `(Hk,)`."""
    wide = torch.promote_types(k.dtype, torch.float32)
    # One axis after the other takes a third of the time of both at once.
    rows = torch.linalg.vector_norm(k.detach(), dim=3, dtype=wide)
    return torch.linalg.vector_norm(rows, dim=2).sum(0)


def min_max(statistic: Tensor) -> Tensor:
    """`(n - min n) / (max n - min n)`; equal values, where that is 0 / 0, all become 1."""
    low, high = statistic.aminmax()
    return torch.where(high > low, (statistic - low) / (high - low), 1.0)


def raw_shares(weights: Tensor, num_heads: int) -> Tensor:
    """`num_heads` split in proportion to weights `(Hk,)`, before rounding; all 0 count as equal."""
    weights = torch.where(weights.sum() > 0, weights, 1.0)
    return num_heads * weights / weights.sum()


def allocate(weights: Tensor, num_heads: int) -> Tensor:
    """How many of `num_heads` query heads each key/value head serves, in proportion to `weights` `(Hk,)`.

    Shares are rounded half to even; then, until they add up, the largest gives one away, or the smallest gets
    one, the first among equals (Khan et al. 2024, key-driven GQA, arXiv 2408.08454).
    """
    counts = raw_shares(weights, num_heads).round().long()
    excess, index = counts.sum() - num_heads, torch.arange(len(counts), device=counts.device)
    # Correction j of head i starts from the count `counts_i - sign j`; the largest (smallest) comes first.
    sign = excess.sign()
    order = (index - sign * counts[:, None]) * len(counts) + index[:, None]
    first_not_due = order.flatten().sort().values.take(excess.abs())
    return counts - sign * (order < first_not_due).sum(-1)


def map_of(counts: Tensor, num_heads: int) -> Tensor:
    """The map `(H,)` in which the first `counts_0` query heads read head 0, the next `counts_1` head 1."""
    places = torch.arange(num_heads, device=counts.device)[:, None]
    return (places >= counts.cumsum(0)[:-1]).sum(-1)
