"""Linear attention, its decays and gates: layers whose memory is one state per head, whatever the length."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.cache import Cache, default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.linear import (
    elu_features,
    gated_slots,
    mlstm,
    retention_decay,
    squared_features,
    taylor_features,
)
from zoo.attention.rotary import rotary, rotary_tables
from zoo.attention.scan import scan, scan_mean, weighted_mean

_CLOSED = 80.0  # an exponential or sigmoid gate at -80 is closed, a sigmoid at 80 open; exp(80) is finite


class StateCache(Cache):
    """The state after `length` tokens, and the last inputs of short convolutions."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__(layer)
        self.state: Any = None
        self.tails: dict[str, Tensor] = {}

    def nbytes(self) -> int:
        """Bytes in use; the same after any number of tokens."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        held = [x for x in (*states, *self.tails.values()) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)


class RecurrentLayer(AttentionLayer):
    """A causal layer on `scan`: padding leaves the state as it is, documents of a packed row begin anew.

    A packed document is a run of equal ids.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True, maps=False)
    causal = True

    def init_cache(self, batch_size: int) -> StateCache:
        return StateCache(self)

    def _run(
        self,
        run: Callable[..., tuple[Tensor, Any]],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        log_decay: Tensor | None = None,
        **rates: Tensor,
    ) -> Tensor:
        """`run` is `scan` or has its arguments: q, k `(B, H, N, D)`, v `(B, H, N, V)`."""
        keep, starts = places(mask, cache)
        if log_decay is not None:
            rates["log_decay"] = hidden(log_decay, keep)
        state = cache.state if isinstance(cache, StateCache) else None
        out, state = run(q, hidden(k, keep), v, starts=starts, state=state, **rates)
        if isinstance(cache, StateCache):
            cache.state = state
            cache.length += q.shape[2]
        return out


def places(mask: Tensor | None, cache: Cache | None) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are real, and which begin a document: bool `(B, N)`, or None."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    if cache is not None:
        raise AttentionError("a cache holds one document per row: no packed documents with it")
    return None, F.pad(mask[:, 1:] != mask[:, :-1], (1, 0), value=False)


def hidden(x: Tensor, keep: Tensor | None) -> Tensor:
    """Zero where no token is: x `(B, H, N)` or `(B, H, N, D)`, with axes of size 1 repeated."""
    if keep is None:
        return x
    return torch.where(keep[:, None] if x.ndim == 3 else keep[:, None, :, None], x, 0.0)


def split(x: Tensor, heads: int) -> Tensor:
    """`(B, N, H D)` to `(B, H, N, D)`."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """`(B, H, N, D)` to `(B, N, H D)`."""
    return x.transpose(1, 2).flatten(2)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Projected(RecurrentLayer):
    """Projections to q, k `(B, H, N, D)` and v `(B, H, N, V)`, and back."""

    def __init__(self, dim: int, num_heads: int, key_dim: int, value_dim: int, bias: bool) -> None:
        super().__init__()
        self.dim, self.num_heads, self.value_dim = dim, num_heads, value_dim
        self.head_dim, self.head_value_dim = (head_width(w, num_heads) for w in (key_dim, value_dim))
        self.q_proj = nn.Linear(dim, key_dim, bias=bias)
        self.k_proj = nn.Linear(dim, key_dim, bias=bias)
        self.v_proj = nn.Linear(dim, value_dim, bias=bias)
        self.o_proj = nn.Linear(value_dim, dim, bias=bias)

    def _heads(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        source = x if context is None else context
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        return split(q, self.num_heads), split(k, self.num_heads), split(v, self.num_heads)


class LinearAttention(_Projected, name="linear"):
    """`phi(q) . phi(k)` in place of softmax's exponent, with `phi = elu + 1`.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: heads of width `dim / num_heads`.
        causal: tokens see earlier ones only; otherwise all.
        eps: added to the sum of weights.
        bias: of all four projections.
    """

    supports = Supports(
        bidirectional=True, causal=True, cross=True, padding=True, packed=True, cache=True, maps=False
    )
    paper = "https://arxiv.org/abs/2006.16236"
    scale: ClassVar[float | None] = None
    """Of the queries; by default that of `scan`."""
    floor: ClassVar[bool] = False
    """`eps` is the least sum of weights, instead of being added."""

    def __init__(
        self, dim: int, num_heads: int, *, causal: bool = True, eps: float = 1e-6, bias: bool = False
    ) -> None:
        super().__init__(dim, num_heads, dim, dim, bias)
        self.causal, self.eps = causal, eps

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, cache = given.x, given.context, given.mask, given.cache
        if self.causal and context is not None:
            raise AttentionError("causal linear attention sees its own tokens: context needs causal=False")
        q, k, v = self._heads(x, context)
        q, k = self.features(q, k, given)
        form = scan_mean if self.causal else both_ways
        run = partial(form, scale=self.scale, eps=self.eps, floor=self.floor)
        return self.o_proj(join(self._run(run, q, k, v, mask, cache)))

    def features(self, q: Tensor, k: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
        """Of queries and keys `(B, H, N, D)` and `(B, H, M, D)`, not negative."""
        return elu_features(q), elu_features(k)

    def init_cache(self, batch_size: int) -> StateCache:
        if not self.causal:
            raise AttentionError("linear attention with causal=False sees later tokens: it has no cache")
        return super().init_cache(batch_size)


def both_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Tensor | None,
    state: None,
    scale: float | None = None,
    eps: float,
    floor: bool = False,
) -> tuple[Tensor, None]:
    """Every token sees all, or all of its document: those before and at it, and those at and after it."""
    wide = torch.promote_types(v.dtype, torch.float32)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, ones = q.to(wide) * factor, k.to(wide), F.pad(v.to(wide), (0, 1), value=1.0)
    if starts is None:
        sums = q @ (k.mT @ ones)
    else:
        ends = F.pad(starts[:, 1:], (0, 1), value=False)
        before, _ = scan(q, k, ones, starts=starts, scale=1.0)
        after, _ = scan(*(x.flip(2) for x in (q, k, ones)), starts=ends.flip(1), scale=1.0)
        sums = before + after.flip(2) - (q * k).sum(-1, keepdim=True) * ones
    return weighted_mean(sums, eps, floor).to(v.dtype), None


class LightningAttention(RecurrentLayer, name="lightning"):
    """A constant decay per head; SiLU on q, k, v, RMSNorm over all heads and a sigmoid gate behind it.

    Parameter names are those of MiniMax-01 (MiniMaxLightningAttention).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        head_dim: width of a head; `dim / num_heads` by default.
        layer: index of this layer of `num_layers`: later layers decay less.
        eps: of the RMSNorm.
    """

    paper = "https://arxiv.org/abs/2501.08313"
    slopes: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        layer: int = 0,
        num_layers: int = 1,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if not 0 <= layer < num_layers:
            raise AttentionError(f"layer {layer} is not one of {num_layers}, counted from 0")
        self.dim, self.num_heads = dim, num_heads
        width = num_heads * (head_dim or head_width(dim, num_heads))
        self.norm = nn.RMSNorm(width, eps=eps)
        self.qkv_proj = nn.Linear(dim, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, dim, bias=False)
        self.output_gate = nn.Linear(dim, width, bias=False)
        heads = torch.arange(1, num_heads + 1, dtype=torch.float64)
        depth = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
        self.register_buffer("slopes", (2.0 ** (-8 * heads / num_heads) * depth).float(), persistent=False)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = split(F.silu(self.qkv_proj(x)), self.num_heads).chunk(3, dim=-1)
        out = self._run(partial(scan, scale=1.0), q, k, v, mask, cache, -self.slopes[None, :, None])
        return self.out_proj(torch.sigmoid(self.output_gate(x)) * self.norm(join(out)))


class Retention(_Projected, name="retention"):
    """RetNet: a constant decay per head, rotary positions, a norm per head and a SiLU gate.

    Args:
        dim: width of the tokens.
        num_heads: heads; a head of keys has even width `dim / num_heads`, one of values twice that.
        theta: base of the rotary frequencies.
    """

    paper = "https://arxiv.org/abs/2307.08621"
    decay: Tensor

    def __init__(self, dim: int, num_heads: int, *, theta: float = 10_000.0, bias: bool = False) -> None:
        super().__init__(dim, num_heads, dim, 2 * dim, bias)
        if self.head_dim % 2:
            raise AttentionError(f"rotary positions need an even head width, not {self.head_dim}")
        self.theta = theta
        self.g_proj = nn.Linear(dim, 2 * dim, bias=bias)
        self.g_norm = nn.RMSNorm(self.head_value_dim, eps=1e-5, elementwise_affine=False)
        self.register_buffer("decay", retention_decay(num_heads), persistent=False)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions, cache = given.x, given.mask, given.positions, given.cache
        q, k, v = self._heads(x)
        at = default_positions(x, cache) if positions is None else positions
        cos, sin = (
            t if at.ndim == 1 else t[:, None] for t in rotary_tables(at, self.head_dim, theta=self.theta)
        )
        q, k = rotary(q, cos, sin, interleaved=True), rotary(k, cos, sin, interleaved=True)
        out = self._run(scan, q, k, v, mask, cache, self.decay[None, :, None])
        return self.o_proj(join(self.g_norm(out)) * F.silu(self.g_proj(x)))


class GatedLinearAttention(_Projected, name="gla"):
    """GLA: a decay per key channel from the token, `sigmoid(.)^(1 / temperature)`; norm and SiLU gate behind.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        expand_k: width of all keys over `dim`.
        expand_v: width of all values over `dim`.
        rank: of the projection that gives the decay.
        temperature: its inverse scales the log decay.
    """

    paper = "https://arxiv.org/abs/2312.06635"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        temperature: float = 16.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, int(dim * expand_k), int(dim * expand_v), bias)
        self.temperature = temperature
        self.gk_proj = self._gate(rank)
        self.g_proj = nn.Linear(dim, self.value_dim, bias=bias)
        self.g_norm = nn.RMSNorm(self.head_value_dim, eps=1e-5)

    def _gate(self, rank: int) -> nn.Module:
        width = self.num_heads * self.head_dim
        return nn.Sequential(nn.Linear(self.dim, rank, bias=False), nn.Linear(rank, width))

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        decay = split(F.logsigmoid(wide(self.gk_proj(x))) / self.temperature, self.num_heads)
        out = self._run(scan, *self._heads(x), mask, cache, decay)
        return self.o_proj(join(self.g_norm(out)) * F.silu(self.g_proj(x)))


class SimpleGatedLinearAttention(GatedLinearAttention, name="simple_gla"):
    """GLA with one decay per head and token, as in Mamba-2."""

    paper = "https://arxiv.org/abs/2405.21060"

    def _gate(self, rank: int) -> nn.Module:
        return nn.Linear(self.dim, self.num_heads)


class MLSTMAttention(_Projected, name="mlstm"):
    """The matrix memory of xLSTM: exponential input and sigmoid forget gates; norm and sigmoid gate behind.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        expand_k: width of all queries over `dim`.
        gate_cap: gates before their activations pass `cap * tanh(. / cap)`.
    """

    paper = "https://arxiv.org/abs/2405.04517"

    def __init__(
        self, dim: int, num_heads: int, *, expand_k: float = 0.5, gate_cap: float = 15.0, bias: bool = False
    ) -> None:
        super().__init__(dim, num_heads, int(dim * expand_k), dim, bias)
        self.gate_cap = gate_cap
        self.i_proj, self.f_proj = nn.Linear(dim, num_heads), nn.Linear(dim, num_heads)
        nn.init.constant_(self.i_proj.bias, -10.0)
        with torch.no_grad():
            self.f_proj.bias.copy_(torch.linspace(3.0, 6.0, num_heads))
        self.g_proj = nn.Linear(dim, dim, bias=bias)
        self.norm = nn.RMSNorm(self.head_value_dim, eps=1e-6)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        cap = self.gate_cap
        write, forget = (cap * torch.tanh(wide(f(x)).mT / cap) for f in (self.i_proj, self.f_proj))
        keep, _ = places(mask, cache)
        if keep is not None:  # padding neither writes nor forgets
            write = write.masked_fill(~keep[:, None], -_CLOSED)
            forget = forget.masked_fill(~keep[:, None], _CLOSED)
        out = self._run(_mlstm, *self._heads(x), mask, cache, input_gate=write, forget_gate=forget)
        return self.o_proj(join(self.norm(out)) * torch.sigmoid(self.g_proj(x)))


def _mlstm(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Any]:
    result = mlstm(q, k, v, **options)
    return result.out, result.state


class BasedAttention(RecurrentLayer, name="based"):
    """Based: the exponent of softmax by its Taylor series to the second order, in few key channels.

    Parameter names are the official ones (`proj_q`, `proj_k`, `proj_v`, `out_proj`).

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_dim: key width D of a head; the state has `1 + D + D (D + 1) / 2` rows.
        head_dim: value width of a head; `dim / num_heads` by default.
        eps: added to the sum of weights.
    """

    paper = "https://arxiv.org/abs/2402.18668"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        feature_dim: int = 16,
        head_dim: int | None = None,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.eps = dim, num_heads, eps
        width = num_heads * (head_dim or head_width(dim, num_heads))
        self.proj_q = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(dim, num_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(dim, width, bias=False)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = (split(f(x), self.num_heads) for f in (self.proj_q, self.proj_k, self.proj_v))
        q, k = taylor_features(wide(q)), taylor_features(wide(k))
        run = partial(scan_mean, scale=1.0, eps=self.eps)
        return self.out_proj(join(self._run(run, q, k, v, mask, cache)))


class ReBasedAttention(_Projected, name="rebased"):
    """ReBased: the square of `q . k`, after a norm with trained scale and shift of the key channels.

    Args:
        dim: width of the tokens.
        num_heads: heads.
        feature_dim: key width D of a head; the state has `D (D + 1) / 2` rows.
        eps: added to the sum of weights.
    """

    paper = "https://arxiv.org/abs/2402.10644"

    def __init__(
        self, dim: int, num_heads: int, *, feature_dim: int = 16, eps: float = 1e-6, bias: bool = False
    ) -> None:
        super().__init__(dim, num_heads, num_heads * feature_dim, dim, bias)
        self.eps = eps
        self.q_norm, self.k_norm = nn.LayerNorm(feature_dim), nn.LayerNorm(feature_dim)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = self._heads(x)
        q, k = squared_features(wide(self.q_norm(q))), squared_features(wide(self.k_norm(k)))
        run = partial(scan_mean, scale=1.0, eps=self.eps)
        return self.o_proj(join(self._run(run, q, k, v, mask, cache)))


class GatedSlotAttention(_Projected, name="gsa"):
    """GSA: softmax attention to few slots of memory, each with its own decay.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: heads.
        slots: per head.
        temperature: its inverse scales the log decay.
    """

    paper = "https://arxiv.org/abs/2409.07146"

    def __init__(
        self, dim: int, num_heads: int, *, slots: int = 64, temperature: float = 8.0, bias: bool = False
    ) -> None:
        super().__init__(dim, num_heads, dim, dim, bias)
        self.temperature = temperature
        self.f_proj = nn.Linear(dim, num_heads * slots, bias=bias)
        self.g_norm = nn.RMSNorm(dim, eps=1e-5)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, cache = given.x, given.mask, given.cache
        q, k, v = (F.silu(y) for y in self._heads(x))
        decay = F.logsigmoid(split(wide(self.f_proj(x)), self.num_heads)) / self.temperature
        slots = hidden(-torch.expm1(decay), places(mask, cache)[0])
        out = self._run(gated_slots, q, k, v, mask, cache, decay, slots=slots)
        return self.o_proj(F.silu(self.g_norm(join(out))))
