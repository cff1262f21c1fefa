"""Multi-head latent attention: heads that share one low-rank latent of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, masked
from zoo.attention.layers.multihead import HeadCache, HeadNorm, split_heads
from zoo.attention.patterns import Causal, Dense, Pattern
from zoo.attention.rotary import rotary, rotary_tables
from zoo.attention.yarn import Yarn


class MultiHeadLatent(AttentionLayer, name="mla"):
    """MLA of DeepSeek-V2 (section 2.1) and V3: scores `(q_n . k_n + rot(q_r) . rot(k_r)) / sqrt(dn + dr)`.

    One latent `c` (rank r) and one rotary key `k_r` (dr) per token, shared by all heads, are cached.
    *Expanded*, `k_n = W_uk c` and `v = W_uv c` per head. *Absorbed*, `q_n . W_uk c = (W_uk^T q_n) . c`: the
    heads attend to the latents themselves, and `W_uv` follows. Both are equal; that with fewer products runs.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        kv_rank: r.
        q_rank: rank of the queries' own bottleneck; None = one projection.
        nope_dim, rope_dim, value_dim: dn, dr, dv, channels per head without and with rotation, and of values.
        bias: of `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
        query_bias: of the projection to the queries, `q_proj` or `q_b_proj`, which has none in DeepSeek.
        latent_norm: RMS norm of the latents.
        rope_theta, yarn: rotary positions.
        interleaved: rotary pairs are neighbouring channels.
        causal: tokens see themselves and earlier ones.
    """

    paper = "https://arxiv.org/abs/2405.04434"
    supports = Supports(bidirectional=True, causal=True, padding=True, packed=True, cache=True)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kv_rank: int,
        q_rank: int | None = None,
        nope_dim: int = 128,
        rope_dim: int = 64,
        value_dim: int = 128,
        bias: bool = False,
        query_bias: bool = False,
        latent_norm: bool = True,
        rope_theta: float = 10_000.0,
        yarn: Yarn | None = None,
        interleaved: bool = True,
        causal: bool = True,
    ) -> None:
        super().__init__()
        if min(num_heads, kv_rank, nope_dim, value_dim) < 1:
            raise AttentionError(
                f"heads, rank and widths are positive, not {num_heads}, {kv_rank}, {nope_dim}, {value_dim}"
            )
        if rope_dim < 2 or rope_dim % 2:
            raise AttentionError(f"rope_dim must be even and positive, not {rope_dim}")
        self.dim, self.num_heads, self.kv_rank, self.q_rank = dim, num_heads, kv_rank, q_rank
        self.nope_dim, self.rope_dim, self.value_dim = nope_dim, rope_dim, value_dim
        self.rope_theta, self.yarn, self.interleaved, self.causal = rope_theta, yarn, interleaved, causal
        width = nope_dim + rope_dim
        self.scale = width**-0.5 * (1.0 if yarn is None else yarn.score_scale)

        def norm(rank: int) -> nn.Module:
            return HeadNorm(rank, eps=1e-6) if latent_norm else nn.Identity()

        if q_rank is None:
            self.q_proj = nn.Linear(dim, num_heads * width, bias=query_bias)
        else:
            self.q_a_proj = nn.Linear(dim, q_rank, bias=bias)
            self.q_a_layernorm = norm(q_rank)
            self.q_b_proj = nn.Linear(q_rank, num_heads * width, bias=query_bias)
        self.kv_a_proj_with_mqa = nn.Linear(dim, kv_rank + rope_dim, bias=bias)
        self.kv_a_layernorm = norm(kv_rank)
        self.kv_b_proj = nn.Linear(kv_rank, num_heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * value_dim, dim, bias=bias)

    def mix(self, given: Inputs) -> Tensor:
        x, mask, positions, cache = given.x, given.mask, given.positions, given.cache
        cos, sin = self.tables(default_positions(x, cache) if positions is None else positions)
        q = self.queries(x, cos, sin)
        latent = self.latents(x, cos, sin)
        if isinstance(cache, HeadCache):
            (latent,), mask = cache.extend((latent,), mask)
        pattern = masked(Causal() if self.causal else Dense(), mask)
        form = self.absorbed if self.absorbs(x.shape[1], latent.shape[2]) else self.expanded
        return self.o_proj(form(q, latent, pattern).transpose(1, 2).flatten(2))

    def init_cache(self, batch_size: int) -> HeadCache:
        """Holds `[c | rot(k_r)]`: r + dr numbers per token."""
        if not self.causal:
            raise AttentionError("only causal layers decode step by step")
        return HeadCache(self)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `(N, dr / 2)` of positions `(N,)`, or `(B, 1, N, dr / 2)` of `(B, N)`."""
        places = positions if positions.ndim == 1 else positions[:, None]
        tables = rotary_tables if self.yarn is None else self.yarn.tables
        return tables(places, self.rope_dim, theta=self.rope_theta)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[q_n | rot(q_r)]`, `(B, H, N, dn + dr)`."""
        q = self.q_proj(x) if self.q_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        nope, rope = split_heads(q, self.num_heads).split([self.nope_dim, self.rope_dim], dim=-1)
        return torch.cat([nope, rotary(rope, cos, sin, interleaved=self.interleaved)], dim=-1)

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[c | rot(k_r)]` as one head, `(B, 1, N, r + dr)`."""
        latent, rope = self.kv_a_proj_with_mqa(x).split([self.kv_rank, self.rope_dim], dim=-1)
        rope = rotary(rope[:, None], cos, sin, interleaved=self.interleaved)
        latent = self.kv_a_layernorm(latent)[:, None]
        return torch.cat([latent, rope.to(latent.dtype)], dim=-1)

    def absorbs(self, nq: int, nk: int) -> bool:
        """Whether the absorbed form has fewer products."""
        expansion = self.kv_rank * (self.nope_dim + self.value_dim)
        wider = 2 * self.kv_rank + self.rope_dim - self.nope_dim - self.value_dim
        return nq * expansion + nq * nk * wider < nk * expansion

    def expanded(self, q: Tensor, latent: Tensor, pattern: Pattern) -> Tensor:
        """Every head attends to keys and values of its own; returns `(B, H, Nq, dv)`."""
        return attend(q, *self.heads(latent), pattern=pattern, scale=self.scale)

    def heads(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(B, H, N, dn + dr)` and values `(B, H, N, dv)` from latents `(B, 1, N, r + dr)`."""
        c, rope = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        kv = split_heads(self.kv_b_proj(c[:, 0]), self.num_heads)
        nope, v = kv.split([self.nope_dim, self.value_dim], dim=-1)
        return torch.cat([nope, rope.expand(-1, self.num_heads, -1, -1).to(nope.dtype)], dim=-1), v

    def absorbed(self, q: Tensor, latent: Tensor, pattern: Pattern) -> Tensor:
        """Every head attends to the one latent head; returns `(B, H, Nq, dv)`."""
        up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        up_k, up_v = up.split([self.nope_dim, self.value_dim], dim=1)  # (H, dn or dv, r)
        nope, rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        rows = nope @ up_k
        rows = torch.cat([rows, rope.to(rows.dtype)], dim=-1)
        # The latents stand for the values as they are, rotary part included: fused kernels want one width.
        kv = latent.to(rows.dtype)
        out = attend(rows, kv, kv, pattern=pattern, scale=self.scale)[..., : self.kv_rank]
        return out @ up_v.transpose(1, 2)
