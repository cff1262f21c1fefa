"""Multi-head latent attention: heads that share one low-rank latent of keys and values."""

from __future__ import annotations

from typing import Any, Literal

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

Rotation = Literal["hadamard", "identity"]


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
        nope_dim, rope_dim, value_dim: dn, dr, dv, channels per head without and with rotation, and of values;
            dr = 0: no positions.
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
        if rope_dim < 0 or rope_dim % 2:
            raise AttentionError(f"rope_dim must be even, 0 for no rotation, not {rope_dim}")
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

    def options(self) -> dict[str, Any]:
        """The arguments after `dim` that make such an MLA again; those that are None left out."""
        queries = self.q_proj if self.q_rank is None else self.q_b_proj
        options = {
            "num_heads": self.num_heads,
            "kv_rank": self.kv_rank,
            "q_rank": self.q_rank,
            "nope_dim": self.nope_dim,
            "rope_dim": self.rope_dim,
            "value_dim": self.value_dim,
            "bias": self.o_proj.bias is not None,
            "query_bias": queries.bias is not None,
            "latent_norm": isinstance(self.kv_a_layernorm, HeadNorm),
            "rope_theta": self.rope_theta,
            "yarn": self.yarn,
            "interleaved": self.interleaved,
            "causal": self.causal,
        }
        return {key: value for key, value in options.items() if value is not None}

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `(N, dr / 2)` of positions `(N,)`, or `(B, 1, N, dr / 2)` of `(B, N)`."""
        places = positions if positions.ndim == 1 else positions[:, None]
        if not self.rope_dim:
            none = torch.zeros(*places.shape, 0, device=places.device)
            return none, none
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


class TensorParallelLatent(MultiHeadLatent, name="tpla"):
    """TPLA (Tang et al. 2025): the latent of MLA, turned by an orthogonal matrix, in P shards.

    Each shard has a softmax of its own, over its part of `q_n . k_n` and all of `rot(q_r) . rot(k_r)`, and
    values of its own; the outputs are summed. So P devices each keep r / P + dr numbers per token. P = 1 is
    MLA. `kv_b_proj` reads the turned latent. Shapes: P shards of s = r / P channels.

    Args:
        dim: width C of the tokens.
        num_heads: H.
        shards: P, a divisor of the rank r.
        rotation: "hadamard" spreads what the latent holds evenly over the shards, and needs r a power of two;
            "identity" leaves it as it is. `shard_latent` has principal components too.
        options: of `MultiHeadLatent`.
    """

    paper = "https://arxiv.org/abs/2508.15881"
    turn: Tensor

    def __init__(
        self, dim: int, num_heads: int, *, shards: int = 2, rotation: Rotation = "hadamard", **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if shards < 1 or self.kv_rank % shards:
            raise AttentionError(f"a latent of rank {self.kv_rank} is not divisible by {shards} shards")
        self.shards, self.width = shards, self.kv_rank // shards
        self.register_buffer("turn", rotation_matrix(rotation, self.kv_rank).float())

    def latents(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[c turned | rot(k_r)]` as one head, `(B, 1, N, r + dr)`."""
        c, rope = super().latents(x, cos, sin).split([self.kv_rank, self.rope_dim], dim=-1)
        return torch.cat([c @ self.turn.to(c.dtype), rope], dim=-1)

    def absorbs(self, nq: int, nk: int) -> bool:
        """Whether the absorbed form has fewer products."""
        expansion = self.kv_rank * (self.nope_dim + self.value_dim)
        wider = 2 * self.kv_rank + self.shards * (self.rope_dim - self.nope_dim - self.value_dim)
        return nq * expansion + nq * nk * wider < nk * expansion

    def expanded(self, q: Tensor, latent: Tensor, pattern: Pattern) -> Tensor:
        """Every head of every shard attends to keys and values of its own; returns `(B, H, Nq, dv)`."""
        out = attend(q.repeat(1, self.shards, 1, 1), *self.heads(latent), pattern=pattern, scale=self.scale)
        return out.unflatten(1, (self.shards, -1)).sum(1)

    def heads(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `(B, P H, N, dn + dr)` and values `(B, P H, N, dv)` from latents `(B, 1, N, r + dr)`."""
        c, rope = self._shards(latent)
        kv = torch.einsum("bpns,hcps->bphnc", c, self._up().to(c.dtype))
        nope, v = kv.flatten(1, 2).split([self.nope_dim, self.value_dim], dim=-1)
        return torch.cat([nope, rope.expand(-1, nope.shape[1], -1, -1).to(nope.dtype)], dim=-1), v

    def absorbed(self, q: Tensor, latent: Tensor, pattern: Pattern) -> Tensor:
        """Every head attends to the one latent head of each shard; returns `(B, H, Nq, dv)`."""
        up_k, up_v = self._up().split([self.nope_dim, self.value_dim], dim=1)
        nope, rope = q.split([self.nope_dim, self.rope_dim], dim=-1)
        rows = torch.einsum("bhnc,hcps->bphns", nope, up_k.to(nope.dtype))
        rows = torch.cat([rows, rope[:, None].expand(-1, self.shards, -1, -1, -1).to(rows.dtype)], dim=-1)
        c, turned = self._shards(latent)
        # As in MLA, latents stand for the values as they are.
        kv = torch.cat([c, turned.expand(-1, self.shards, -1, -1)], dim=-1).to(rows.dtype)
        out = attend(rows.flatten(1, 2), kv, kv, pattern=pattern, scale=self.scale)[..., : self.width]
        return torch.einsum("bphns,hcps->bhnc", out.unflatten(1, (self.shards, -1)), up_v.to(out.dtype))

    def _shards(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Latents `(B, 1, N, r + dr)` to `(B, P, N, s)` and rotary keys `(B, 1, N, dr)`."""
        c, rope = latent.split([self.kv_rank, self.rope_dim], dim=-1)
        return c[:, 0].unflatten(-1, (self.shards, -1)).transpose(1, 2), rope

    def _up(self) -> Tensor:
        """`kv_b_proj` by head and shard, `(H, dn + dv, P, s)`."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).unflatten(-1, (self.shards, -1))


def rotation_matrix(rotation: Rotation, rank: int) -> Tensor:
    """Orthogonal `(r, r)` in float64: Sylvester's Hadamard matrix over `sqrt(r)`, or the identity."""
    if rotation == "identity":
        return torch.eye(rank, dtype=torch.float64)
    if rotation != "hadamard":
        raise AttentionError(f"a rotation is 'hadamard' or 'identity', not {rotation!r}")
    if rank & (rank - 1):
        raise AttentionError(
            f"a Hadamard rotation needs a rank that is a power of two, not {rank}: rotation='identity', or "
            "shard_latent(layer, shards, calibration)"
        )
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(rank.bit_length() - 1):
        matrix = torch.kron(matrix.new_tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix * rank**-0.5


@torch.no_grad()
def shard_latent(
    layer: MultiHeadLatent, shards: int, calibration: Tensor | None = None
) -> TensorParallelLatent:
    """TPLA with the weights of MLA; equal to it for one shard.

    Args:
        layer: MLA.
        shards: P.
        calibration: tokens `(B, N, C)`: the latent is turned to its principal components on them, and the
            first shard gets the largest; without, by a Hadamard matrix.
    """
    if type(layer) is not MultiHeadLatent:
        raise AttentionError(f"shards are cut from MultiHeadLatent, not from {type(layer).__name__}")
    rotation = "hadamard" if calibration is None else "identity"
    sharded = TensorParallelLatent(layer.dim, shards=shards, rotation=rotation, **layer.options())
    sharded = sharded.to(layer.o_proj.weight)
    turn = rotation_matrix(rotation, layer.kv_rank) if calibration is None else _principal(layer, calibration)
    turn = turn.to(sharded.turn)
    up = layer.kv_b_proj.weight @ turn
    sharded.load_state_dict(layer.state_dict() | {"turn": turn, "kv_b_proj.weight": up})
    return sharded.train(layer.training)


def _principal(layer: MultiHeadLatent, tokens: Tensor) -> Tensor:
    """Principal components of the latents of tokens as columns `(r, r)`, the largest first, in float64."""
    tables = layer.tables(default_positions(tokens, None))  # of the rotary keys, which are dropped
    c = layer.latents(tokens, *tables)[..., : layer.kv_rank].double().flatten(0, 2)
    return torch.linalg.eigh(c.T @ c).eigenvectors.flip(1)
