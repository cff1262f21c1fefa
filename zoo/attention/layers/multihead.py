"""Softmax attention with shared heads, and what is done to its queries, weights and output.

Shapes: B batch, H query heads, Hk key/value heads, D head width, N queries, M keys, C width of the tokens.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import Cache, KVCache, default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import wide
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.merge import merge, sink
from zoo.attention.patterns import Causal, Dense, Pattern, Window
from zoo.attention.rotary import rotary, rotary_tables
from zoo.attention.yarn import Yarn


class MultiHead(AttentionLayer, name="multihead"):
    """`concat_h(softmax(q_h k_g^T / sqrt(D)) v_g) W_o`, head h with keys and values `g = h // (H / Hk)`.

    Hk = H is multi-head attention (Vaswani et al. 2017, section 3.2.2), Hk = 1 multi-query (Shazeer 2019),
    and between them lies grouped-query attention (Ainslie et al. 2023).

    Args:
        dim: C.
        num_heads: H.
        num_kv_heads: Hk, a divisor of H; by default H.
        head_dim: D; by default C / H.
        context_dim: width of the context tokens; by default C.
        causal: tokens see themselves and earlier ones.
        window: number of keys that a causal query sees, itself included; by default all.
        rope_theta: base of the rotary positions, half-split; by default there are none.
        rotary_dim: how many channels of a head are turned; by default all.
        yarn: stretches the rotary positions.
        qk_norm: RMS norm over the channels of each query and key, before they are turned.
        norm_eps: of these norms.
        qkv_bias, out_bias: biases of the projections.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, causal=True, cross=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2305.13245"
    norm_centre: ClassVar[float] = 0.0

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = False,
        window: int | None = None,
        rope_theta: float | None = None,
        rotary_dim: int | None = None,
        yarn: Yarn | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        out_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.causal, self.window = dim, num_heads, causal, window
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_width(dim, num_heads) if head_dim is None else head_dim
        self.rope_theta, self.yarn, self.dropout = rope_theta, yarn, dropout
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self._check_options()
        inner, outer = self.num_kv_heads * self.head_dim, num_heads * self.head_dim
        self.context_dim = context_dim
        source = dim if context_dim is None else context_dim
        self.q_proj = nn.Linear(dim, outer, bias=qkv_bias)
        self.k_proj = nn.Linear(source, inner, bias=qkv_bias)
        self.v_proj = nn.Linear(source, inner, bias=qkv_bias)
        self.o_proj = nn.Linear(outer, dim, bias=out_bias)
        self.q_norm, self.k_norm = (
            HeadNorm(self.head_dim, norm_eps, self.norm_centre) if qk_norm else nn.Identity()
            for _ in range(2)
        )

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        return self.project(self.read(q, k, v, mask))

    def heads(
        self,
        q: Tensor,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        positions: Tensor | None,
        cache: Cache | None,
        *further: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Normed and turned queries, and all rows that they may see.

        Args:
            q: `(B, H, N, D)`.
            further: rows `(B, ?, M, ?)` that a cache keeps beside keys and values.

        Returns:
            Queries `(B, H, N, D)`; keys and values `(B, Hk, M, D)` and the further rows; their mask.
        """
        if context is not None and (self.causal or self.rope_theta is not None):
            raise AttentionError("a causal layer, or one with rotary positions, takes no context")
        source = x if context is None else context
        k, v = (
            proj(source).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.k_proj, self.v_proj)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            places = default_positions(x, cache) if positions is None else positions
            tables = self._tables(places)
            q, k = rotary(q, *tables), rotary(k, *tables)
        rows: tuple[Tensor, ...] = (k, v, *further)
        if cache is not None:
            assert isinstance(cache, HeadCache)
            rows, mask = cache.extend(rows, mask)
        return q, rows, mask

    def pattern(self, num_keys: int, mask: Tensor | None) -> Pattern:
        """Which of the keys are seen, given the mask of `heads`."""
        seen: Pattern = Causal() if self.causal else Dense()
        if self.window is not None and self.window < num_keys:
            seen = Window(self.window, causal=True)
        return masked(seen, mask)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """What the heads see, `(B, H, N, D)`."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, pattern=self.pattern(k.shape[2], mask), dropout=dropout)

    def project(self, out: Tensor) -> Tensor:
        """Heads `(B, H, N, D)` to tokens `(B, N, C)`."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def init_cache(self, batch_size: int) -> HeadCache:
        if not self.causal:
            raise AttentionError("step by step decoding needs causal=True")
        return HeadCache(self) if self.window is None else WindowCache(self, self.window)

    def options(self) -> dict[str, Any]:
        """The arguments after `dim` that make such a `MultiHead` again; those that are None left out."""
        normed = hasattr(self.q_norm, "eps")
        options = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "context_dim": self.context_dim,
            "causal": self.causal,
            "window": self.window,
            "rope_theta": self.rope_theta,
            "rotary_dim": self.rotary_dim if self.rope_theta is not None else None,
            "yarn": self.yarn,
            "qk_norm": normed,
            "norm_eps": self.q_norm.eps if normed else None,
            "qkv_bias": self.q_proj.bias is not None,
            "out_bias": self.o_proj.bias is not None,
            "dropout": self.dropout,
        }
        return {key: value for key, value in options.items() if value is not None}

    def _tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `(N, r)`, or `(B, 1, N, r)`."""
        assert self.rope_theta is not None
        turn = rotary_tables if self.yarn is None else self.yarn.tables
        cos, sin = turn(positions, self.rotary_dim, theta=self.rope_theta)
        return (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])

    def _check_options(self) -> None:
        if min(self.num_heads, self.num_kv_heads) < 1 or self.num_heads % self.num_kv_heads:
            raise AttentionError(
                f"{self.num_heads} query heads are not divisible by {self.num_kv_heads} key/value heads"
            )
        turned = self.rope_theta is not None
        if turned and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise AttentionError(
                f"rotary_dim is even and at most the head width {self.head_dim}, not {self.rotary_dim}"
            )
        if self.window is not None and (self.window < 1 or not self.causal):
            raise AttentionError(f"a window looks back: causal=True and at least one key, not {self.window}")


class HeadCache(KVCache):
    """Keys and values `(B, Hk, length, D)`, and which of them are real tokens."""

    masked = False

    def extend(
        self, rows: tuple[Tensor, ...], mask: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Adds rows `(B, ?, n, ?)` with a mask `(B, n)`, and returns those that the new queries may see."""
        if mask is not None and mask.dtype != torch.bool:
            raise AttentionError("a cache holds one document per row: it takes no document ids")
        self.masked = self.masked or mask is not None
        batch, new = rows[0].shape[0], rows[0].shape[2]
        real = rows[0].new_ones(batch, new, dtype=torch.bool) if mask is None else mask
        *found, real = self.append(*rows, real[:, None, :, None])
        return tuple(found), real[:, 0, :, 0] if self.masked else None


class WindowCache(HeadCache):
    """Keeps the `size - 1` last tokens only."""

    def __init__(self, layer: AttentionLayer, size: int) -> None:
        super().__init__(layer)
        self.size = size

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        kept = self._buffers or tuple(rows[..., :0, :] for rows in new)
        found = tuple(torch.cat(pair, dim=-2) for pair in zip(kept, new, strict=True))
        first = max(found[0].shape[-2] - (self.size - 1), 0)
        self._buffers = tuple(rows[..., first:, :].detach().clone() for rows in found)
        self.length += new[0].shape[-2]
        return found

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._buffers


class SinkAttention(MultiHead, name="sinks"):
    """`softmax` over the keys and a learned logit per head, which takes weight but has no value.

    The layer of gpt-oss (2025) by its parameter names: there, with biases and a window in every other layer.
    Captured maps show the softmax without the sink.
    """

    paper = "https://arxiv.org/abs/2508.10925"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        """Options are those of `MultiHead`."""
        super().__init__(dim, num_heads, **options)
        self.sinks = nn.Parameter(torch.zeros(num_heads))

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pattern, dropout = self.pattern(k.shape[2], mask), self.dropout if self.training else 0.0
        out, lse = attend(q, k, v, pattern=pattern, dropout=dropout, return_lse=True)
        return sink(out, lse, self.sinks[:, None])


class LearnedPair(MultiHead, name="bias_kv"):
    """`softmax` over the keys and a learned key of each query head, which has a learned value.

    `add_bias_kv` of CAB (Zhang et al. 2023) and of `nn.MultiheadAttention`, by their parameter names. Every
    query sees the pair, also where it sees nothing else. Dropout leaves the weight of the pair as it is.
    Captured maps show the softmax without it.
    """

    paper = "https://arxiv.org/abs/2210.07661"

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        """Options are those of `MultiHead`, without rotary positions: the pair has no place."""
        super().__init__(dim, num_heads, **options)
        if self.rope_theta is not None:
            raise AttentionError("a learned key has no place to be turned by: rope_theta=None")
        shape = 1, 1, num_heads * self.head_dim
        self.bias_k, self.bias_v = (
            nn.Parameter(nn.init.xavier_normal_(torch.empty(shape))) for _ in range(2)
        )

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pattern, dropout = self.pattern(k.shape[2], mask), self.dropout if self.training else 0.0
        seen = attend(q, k, v, pattern=pattern, dropout=dropout, return_lse=True)
        key, value = (split_heads(pair, self.num_heads) for pair in (self.bias_k, self.bias_v))
        score = (wide(q) * key).sum(-1) * self.head_dim**-0.5
        return merge(seen, (value.expand_as(seen[0]), score))[0]


class GatedAttention(MultiHead, name="gated"):
    """`(o * sigmoid(x W_g)) W_o` (Qiu et al. 2025, equation 5), with the gate's rows inside of `q_proj`.

    The rows are those of the authors' weights: for each key/value head, the queries of its H / Hk heads, then
    their gates.

    Args:
        gate: one per head, or one per channel.
        options: of `MultiHead`.
    """

    paper = "https://arxiv.org/abs/2505.06708"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        gate: Literal["headwise", "elementwise"] = "elementwise",
        **options: Any,
    ) -> None:
        if gate not in ("headwise", "elementwise"):
            raise AttentionError(f"a gate is 'headwise' or 'elementwise', not {gate!r}")
        super().__init__(dim, num_heads, **options)
        self.gate_width = 1 if gate == "headwise" else self.head_dim
        self.blocks = self.num_kv_heads  # pairs (queries, gates) that the rows of `q_proj` are
        rows = num_heads * (self.head_dim + self.gate_width)
        self.q_proj = nn.Linear(dim, rows, bias=self.q_proj.bias is not None)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q, gate = self._queries_and_gates(x)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        return self.project(self.read(q, k, v, mask) * gate.sigmoid())

    def _queries_and_gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`(B, H, N, D)`, and `(B, H, N, 1)` or `(B, H, N, D)`."""
        heads = self.num_heads // self.blocks
        rows = self.q_proj(x).unflatten(-1, (self.blocks, -1))
        queries, gates = rows.split([heads * self.head_dim, heads * self.gate_width], dim=-1)
        return split_heads(queries.flatten(2), self.num_heads), split_heads(gates.flatten(2), self.num_heads)


class Qwen3NextAttention(GatedAttention, name="qwen3_next"):
    """Gated attention by the weights of Qwen3-Next: query and gate head by head, norms around one."""

    norm_centre = 1.0

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = True, **options: Any) -> None:
        """Options are those of `GatedAttention`."""
        super().__init__(dim, num_heads, qk_norm=qk_norm, **options)
        self.blocks = num_heads


class HeadNorm(nn.Module):
    """`(centre + weight) * x / rms(x)` over the channels of each head, in float32 or wider."""

    def __init__(self, dim: int, eps: float, centre: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - centre))
        self.eps, self.centre = eps, centre

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = (self.centre + self.weight).to(wide)
        return F.rms_norm(x.to(wide), scale.shape, scale, self.eps).to(x.dtype)


class AffineScaled(MultiHead, name="affine_scaled"):
    """Weights `a_i softmax_ij + (m - a_i) / n_i` on the n_i keys seen (arXiv 2602.23057, equations 6 to 9).

    The scale a in [0, 1] is one per query and head, m its running mean: rows of weights sum to one on
    average. The second term is a plain mean of values, so any fused softmax serves.

    Args:
        activation: of the scale: `clip(0.1 z + 0.5, 0, 1)`, or the sigmoid.
        rho: the share of the old mean at each training step (equation 11).
        options: of `MultiHead`.
    """

    paper = "https://arxiv.org/abs/2602.23057"
    alpha_ma: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        activation: Literal["linear_clipping", "sigmoid"] = "linear_clipping",
        rho: float = 0.9,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if activation not in ("linear_clipping", "sigmoid"):
            raise AttentionError(
                f"the scale's activation is 'linear_clipping' or 'sigmoid', not {activation!r}"
            )
        self.activation, self.rho = activation, rho
        self.alpha_proj = nn.Linear(dim, num_heads, bias=False)
        self.register_buffer("alpha_ma", torch.zeros(num_heads))

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        alpha, real = self.alpha(x), mask
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        mean = self._mean_seen(q, v, mask)
        rest = self.alpha_ma[:, None] - alpha
        out = alpha[..., None] * self.read(q, k, v, mask) + rest[..., None] * mean
        if self.training:
            self._follow(alpha.detach(), real if context is None else None)
        return self.project(out)

    def alpha(self, x: Tensor) -> Tensor:
        """`(B, H, N)` in [0, 1]."""
        z = self.alpha_proj(x).transpose(1, 2)
        return z.sigmoid() if self.activation == "sigmoid" else (0.1 * z + 0.5).clamp(0.0, 1.0)

    def _mean_seen(self, q: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`(B, H, N or 1, D)`: the mean of the values that each query sees."""
        if mask is not None and mask.dtype != torch.bool:
            return self.read(torch.zeros_like(q), torch.zeros_like(v), v, mask)
        real = v.new_ones(1, 1, v.shape[2], 1) if mask is None else mask[:, None, :, None].to(v.dtype)
        values = v if mask is None else v * real
        total, count = (self._sum_seen(rows, q.shape[2]) for rows in (values, real))
        mean = (total / count.clamp(min=1.0)).to(v.dtype)
        return mean.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def _sum_seen(self, rows: Tensor, num_queries: int) -> Tensor:
        """`(B, ?, N or 1, D)`: sums over the keys seen of rows `(B, ?, M, D)`, in float32 or wider."""
        wide = torch.promote_types(rows.dtype, torch.float32)
        if not self.causal:
            return rows.sum(2, keepdim=True, dtype=wide)
        if self.window is not None and self.window < rows.shape[2]:
            upto = rows.cumsum(2, dtype=wide)
            return (upto - F.pad(upto, (0, 0, self.window, 0))[:, :, : -self.window])[:, :, -num_queries:]
        past, new = rows.tensor_split([rows.shape[2] - num_queries], dim=2)
        return past.sum(2, keepdim=True, dtype=wide) + new.cumsum(2, dtype=wide)

    def _follow(self, alpha: Tensor, real: Tensor | None) -> None:
        """One step of the running mean, over real tokens."""
        weight = torch.ones_like(alpha[:, :1]) if real is None or real.dtype != torch.bool else real[:, None]
        mean = (alpha * weight).sum((0, 2)) / weight.sum().clamp(min=1)
        self.alpha_ma.lerp_(mean.to(self.alpha_ma.dtype), 1.0 - self.rho)


def gqa_from_mha(layer: MultiHead, num_kv_heads: int) -> MultiHead:
    """The layer with fewer key/value heads, each the mean of consecutive ones: the start of uptraining.

    Ainslie et al. 2023, section 2.1. Queries and output projection stay as they are.
    """
    if type(layer) is GatedAttention:
        raise AttentionError("the rows of GatedAttention's q_proj go by key/value head: they cannot stay")
    if num_kv_heads < 1 or layer.num_kv_heads % num_kv_heads:
        raise AttentionError(f"{layer.num_kv_heads} key/value heads do not form {num_kv_heads} equal groups")
    grouped = copy.deepcopy(layer)
    grouped.num_kv_heads = num_kv_heads
    for linear in (grouped.k_proj, grouped.v_proj):
        for name, parameter in linear.named_parameters():
            rows = parameter.detach().unflatten(0, (num_kv_heads, -1, layer.head_dim))
            setattr(linear, name, nn.Parameter(rows.mean(1).flatten(0, 1)))
        linear.out_features = num_kv_heads * layer.head_dim
    return grouped


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Tokens `(B, N, H D)` to heads `(B, H, N, D)`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
