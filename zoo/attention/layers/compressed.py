"""Compressed convolutional attention: attention in a narrow space, mixed by two short convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.heads import expand, shared_map
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, masked
from zoo.attention.layers.multihead import HeadCache
from zoo.attention.patterns import Causal, Window
from zoo.attention.rotary import rotary, rotary_tables


class CompressedCache(HeadCache):
    """Keys and values, and what the next token needs of the last ones.

    Attributes:
        tail: the last `t0 + t1 - 2` columns `(B, (H + Hk) D, t0 + t1 - 2)` before the convolutions.
        delayed: the delayed half of the next token's values, `(B, 1, Hk D / 2)`.
    """

    def __init__(self, layer: AttentionLayer, tail: Tensor, delayed: Tensor) -> None:
        super().__init__(layer)
        self.tail, self.delayed = tail, delayed

    def nbytes(self) -> int:
        """Bytes in use, without the room for further tokens."""
        return super().nbytes() + sum(x.numel() * x.element_size() for x in (self.tail, self.delayed))


class ConvolvedProjection(nn.Module):
    """Queries, keys and values of CCA, before their norm.

    `[q | k]` pass a depthwise causal convolution and one per head, and get the mean of query and key added;
    half of the value channels come from the token before.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, kernels: tuple[int, int], bias: bool
    ) -> None:
        super().__init__()
        self.widths = (num_heads * head_dim, num_kv_heads * head_dim)
        self.head_dim, self.shift = head_dim, sum(kernels) - 2
        width, half = sum(self.widths), self.widths[1] // 2
        self.q_proj = nn.Linear(dim, self.widths[0], bias=bias)
        self.k_proj = nn.Linear(dim, self.widths[1], bias=bias)
        self.v_proj_current = nn.Linear(dim, half, bias=bias)
        self.v_proj_delayed = nn.Linear(dim, half, bias=bias)
        self.conv_qk_depthwise = nn.Conv1d(width, width, kernels[0], groups=width)
        self.conv_qk_grouped = nn.Conv1d(width, width, kernels[1], groups=num_heads + num_kv_heads)
        self.register_buffer("key_of", shared_map(num_heads, num_kv_heads), persistent=False)

    key_of: Tensor

    def forward(self, x: Tensor, cache: CompressedCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """`(B, N, C)` to q `(B, H, N, D)`, k and v `(B, Hk, N, D)`."""
        z = torch.cat([self.q_proj(x), self.k_proj(x)], dim=-1)
        mixed = self._convolved(z, cache).split(self.widths, dim=-1)
        (q, k), (conv_q, conv_k) = (map(self._heads, part) for part in (z.split(self.widths, dim=-1), mixed))
        mean_q = (q + expand(k, self.key_of)) / 2
        mean_k = mean_q.unflatten(1, (k.shape[1], -1)).mean(2)
        return conv_q + mean_q, conv_k + mean_k, self._heads(self._values(x, cache))

    def _convolved(self, z: Tensor, cache: CompressedCache | None) -> Tensor:
        """Both convolutions of `(B, N, (H + Hk) D)`, over the tail of the cache or zeros, and the tokens."""
        columns = z.transpose(1, 2)
        if cache is None:
            columns = F.pad(columns, (self.shift, 0))
        else:
            columns = torch.cat([cache.tail.to(columns.dtype), columns], dim=-1)
            cache.tail = columns[..., columns.shape[-1] - self.shift :].detach()
        return self.conv_qk_grouped(self.conv_qk_depthwise(columns)).transpose(1, 2)

    def _values(self, x: Tensor, cache: CompressedCache | None) -> Tensor:
        """`[current | delayed by one token]` over the whole width `(B, N, Hk D)`."""
        current, delayed = self.v_proj_current(x), self.v_proj_delayed(x)
        before = self.first_delayed(x) if cache is None else cache.delayed
        delayed = torch.cat([before.to(delayed.dtype), delayed], dim=1)
        if cache is not None:
            cache.delayed = delayed[:, -1:].detach()
        return torch.cat([current, delayed[:, :-1]], dim=-1)

    def first_delayed(self, x: Tensor) -> Tensor:
        """What the first of the tokens `(B, N, C)` gets from before the start: the projection of zeros."""
        return self.v_proj_delayed(x.new_zeros(len(x), 1, x.shape[-1]))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class ScaledUnitNorm(nn.Module):
    """Queries and keys of length `sqrt(D)`; each key head times its temperature."""

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__()
        self.temp = nn.Parameter(torch.ones(num_kv_heads))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q `(B, H, N, D)`, k `(B, Hk, N, D)`."""
        return self._unit(q), self._unit(k) * self.temp[:, None, None].to(k.dtype)

    def _unit(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        unit = F.normalize(wide, dim=-1, eps=torch.finfo(torch.float32).eps)
        return (unit * x.shape[-1] ** 0.5).to(x.dtype)


class CompressedConvolutional(AttentionLayer, name="cca"):
    """CCA and, with fewer key/value heads, CCGQA, as in ZAYA1: `q_i . k_j / sqrt(D)` in H heads, H D < C.

    A padded row equals the row alone when its padding stands on the right, or when projections have no bias.

    Args:
        dim: width C of the tokens.
        num_heads, num_kv_heads, head_dim: H, Hk (H by default), D (C / 2 H by default).
        kernels: t0, t1, tokens under the depthwise and the per-head convolution.
        bias: of the linear projections.
        rope_theta, rotary_factor: base, and part of the channels that is rotated.
        window: keys that a query sees, itself included; None = all earlier ones.
    """

    paper = "https://arxiv.org/abs/2510.04476"
    supports = Supports(causal=True, padding=True, cache=True)
    causal = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        kernels: tuple[int, int] = (2, 2),
        bias: bool = False,
        rope_theta: float = 5_000_000.0,
        rotary_factor: float = 0.5,
        window: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and dim % (2 * num_heads)):
            raise AttentionError(f"half the width {dim} is not divisible by {num_heads} heads: give head_dim")
        width = dim // (2 * num_heads) if head_dim is None else head_dim
        if width < 1 or kv_heads * width % 2:
            raise AttentionError(f"{kv_heads} value heads of width {width} have no two halves")
        if min(kernels) < 1:
            raise AttentionError(f"convolutions cover at least one token, not {kernels}")
        self.dim, self.rope_theta, self.window = dim, rope_theta, window
        self.rotary_dim = int(width * rotary_factor)
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise AttentionError(
                f"rotary_factor {rotary_factor} of {width} channels is not even and positive"
            )
        self.qkv_proj = ConvolvedProjection(dim, num_heads, kv_heads, width, kernels, bias)
        self.qk_norm = ScaledUnitNorm(kv_heads)
        self.o_proj = nn.Linear(num_heads * width, dim, bias=bias)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions, cache = given.x, given.mask, given.positions, given.cache
        places = default_positions(x, cache) if positions is None else positions
        cos, sin = rotary_tables(
            places if places.ndim == 1 else places[:, None], self.rotary_dim, theta=self.rope_theta
        )
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        kept = cache if isinstance(cache, CompressedCache) else None
        q, k, v = self.qkv_proj(x, kept)
        q, k = (rotary(part, cos, sin) for part in self.qk_norm(q, k))
        if kept is not None:
            (k, v), mask = kept.extend((k, v), mask)
        pattern = Causal()
        if self.window is not None and self.window < k.shape[2]:
            pattern = Window(self.window, causal=True)
        return self.o_proj(attend(q, k, v, pattern=masked(pattern, mask)).transpose(1, 2).flatten(2))

    def init_cache(self, batch_size: int) -> CompressedCache:
        """Holds keys and values, the tail of the convolutions and the next delayed value."""
        weight = self.qkv_proj.q_proj.weight
        tail = weight.new_zeros(batch_size, sum(self.qkv_proj.widths), self.qkv_proj.shift)
        first = self.qkv_proj.first_delayed(weight.new_zeros(batch_size, 1, self.dim))
        return CompressedCache(self, tail, first.detach())
