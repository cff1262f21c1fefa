"""Delta rule layers: the state is corrected towards each value, at a rate that the token sets."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.cache import Cache
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Inputs, head_width
from zoo.attention.layers.linear import RecurrentLayer, StateCache, join, places, split, wide
from zoo.attention.scan import scan


class CausalConvolution(nn.Module):
    """Causal depthwise convolution over few tokens; documents of a packed row do not mix."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = False) -> None:
        super().__init__()
        if kernel < 1:
            raise AttentionError(f"a convolution has a positive kernel, not {kernel}")
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(
        self, x: Tensor, keep: Tensor | None, starts: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x `(B, N, C)`, after `tail` `(B, kernel - 1, C)`; the output, and the tail for what follows."""
        tokens, past = x.shape[1], self.kernel - 1
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0.0)
        rows = F.pad(x, (0, 0, past, 0)) if tail is None else torch.cat([tail.to(x.dtype), x], dim=1)
        document = None if starts is None else F.pad(starts.long().cumsum(1), (past, 0), value=-1)
        out = torch.zeros_like(x) if self.bias is None else self.bias.to(x.dtype)
        for i, tap in enumerate(self.weight[:, 0].to(x.dtype).unbind(-1)):
            seen = rows[:, i : i + tokens]
            if document is not None:
                same = document[:, i : i + tokens] == document[:, past:]
                seen = seen.masked_fill(~same[..., None], 0.0)
            out = torch.addcmul(out, seen, tap)
        return out, rows[:, tokens:]


class ShortConvolution(CausalConvolution):
    """A causal convolution without bias, then SiLU."""

    def forward(
        self, x: Tensor, keep: Tensor | None, starts: Tensor | None, tail: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, tail = super().forward(x, keep, starts, tail)
        return F.silu(out), tail


class DeltaRule(RecurrentLayer):
    """What the three layers have in common; a subclass gives the log decay of the state.

    Args:
        dim: width of the tokens.
        num_heads: heads of queries and keys.
        head_dim: key width of a head; `dim / num_heads` by default.
        value_heads: a multiple of `num_heads`, which it is by default.
        expand_v: value width of a head over its key width.
        kernel: tokens of the short convolutions of q, k and v; None = none, and no SiLU.
        negative: rates reach 2 instead of 1, so that a state can change its sign (Grazzi et al. 2024).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_heads: int | None = None,
        expand_v: float = 1.0,
        kernel: int | None = 4,
        negative: bool = False,
    ) -> None:
        super().__init__()
        width = head_dim or head_width(dim, num_heads)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, width
        self.value_heads = value_heads or num_heads
        if self.value_heads % num_heads:
            raise AttentionError(f"{self.value_heads} value heads are not divisible by {num_heads} key heads")
        self.head_value_dim, self.negative = int(width * expand_v), negative
        keys, values = num_heads * width, self.value_heads * self.head_value_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.b_proj = nn.Linear(dim, self.value_heads, bias=False)
        convolutions = {f"{n}_conv1d": c for n, c in (("q", keys), ("k", keys), ("v", values))}
        for name, channels in convolutions.items():
            self.add_module(name, None if kernel is None else ShortConvolution(channels, kernel))
        self.o_norm = nn.RMSNorm(self.head_value_dim, eps=1e-5)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = (self._projected(name, x, mask, cache) for name in "qkv")
        q, k = (F.normalize(wide(split(y, self.num_heads)), dim=-1) for y in (q, k))
        beta = torch.sigmoid(wide(self.b_proj(x))).mT * (2 if self.negative else 1)
        out = self._run(scan, q, k, split(v, self.value_heads), mask, cache, self._log_decay(x), beta=beta)
        return self.o_proj(self._gated(join(self.o_norm(out)), x))

    def _projected(self, name: str, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        y = getattr(self, f"{name}_proj")(x)
        convolution: ShortConvolution | None = getattr(self, f"{name}_conv1d")
        if convolution is None:
            return y
        tails = cache.tails if isinstance(cache, StateCache) else {}
        out, tails[name] = convolution(y, *places(mask, cache), tails.get(name))
        return out

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """`(B, H, N)` or `(B, H, N, D)`."""
        return None

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        return out


class DeltaNet(DeltaRule, name="deltanet"):
    """DeltaNet: no decay. Arguments: `DeltaRule`."""

    paper = "https://arxiv.org/abs/2406.06484"


class GatedDeltaNet(DeltaRule, name="gated_deltanet"):
    """Gated DeltaNet: one decay per head and token, SiLU gate behind the norm. Arguments: `DeltaRule`."""

    paper = "https://arxiv.org/abs/2412.06464"

    def __init__(self, dim: int, num_heads: int, *, expand_v: float = 2.0, **options: Any) -> None:
        super().__init__(dim, num_heads, expand_v=expand_v, **options)
        self.a_proj = nn.Linear(dim, self.value_heads, bias=False)
        self.g_proj = nn.Linear(dim, self.o_proj.in_features, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(_inverse_softplus(self.value_heads))

    def _log_decay(self, x: Tensor) -> Tensor:
        return (-self.A_log.exp() * F.softplus(wide(self.a_proj(x)) + self.dt_bias)).mT

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        return out * F.silu(self.g_proj(x))


class KimiDeltaAttention(DeltaRule, name="kda"):
    """KDA of Kimi Linear: decay per key channel, sigmoid gate behind the norm. Arguments: `DeltaRule`."""

    paper = "https://arxiv.org/abs/2510.26692"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        rank, keys, values = self.head_value_dim, self.value_heads * self.head_dim, self.o_proj.in_features
        self.f_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.g_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, values))
        self.A_log = nn.Parameter(torch.empty(self.value_heads).uniform_(1, 16).log())
        self.dt_bias = nn.Parameter(_inverse_softplus(keys))

    def _log_decay(self, x: Tensor) -> Tensor:
        rate = split(F.softplus(wide(self.f_proj(x)) + self.dt_bias), self.value_heads)
        return -self.A_log.exp()[:, None, None] * rate

    def _gated(self, out: Tensor, x: Tensor) -> Tensor:
        return out * torch.sigmoid(self.g_proj(x))


def _inverse_softplus(size: int) -> Tensor:
    """What softplus turns into steps drawn between 0.001 and 0.1, evenly in their logarithm."""
    step = torch.empty(size).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    return step + torch.log(-torch.expm1(-step))
