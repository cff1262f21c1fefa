"""Pooling of tokens with weights of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.errors import ConfigError, did_you_mean


class GGeM(nn.Module):
    """Group generalised mean (Ko et al. 2022): `y_c = (mean_n max(x_nc, eps)^p_g)^(1 / p_g)`.

    Channels lie in groups, each with an exponent p_g that is learned: 1 is the mean, infinity the maximum.
    Computed from logarithms in float32, so that no power leaves the range of numbers.

    Args:
        dim: C.
        groups: G, of C / G neighbouring channels.
        p: what the exponents start at.
        eps: the smallest value of a token.
    """

    def __init__(self, dim: int, *, groups: int = 8, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ConfigError(f"{dim} channels cannot be shared out evenly to {groups} groups.")
        if p == 0 or eps <= 0:
            raise ConfigError(f"The exponent is not 0 and eps is positive, not p={p} and eps={eps}.")
        self.out_features, self.eps = dim, eps
        self.p = nn.Parameter(torch.full((groups,), float(p)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, C)`"""
        with torch.autocast(x.device.type, enabled=False):
            logs = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(min=self.eps).log()
            p = self.p.to(logs.dtype).repeat_interleave(x.shape[2] // len(self.p))
            powers = p * logs
            largest = powers.detach().amax(1, keepdim=True)
            mean = (powers - largest).exp().mean(1).log() + largest[:, 0]
            return (mean / p).exp().to(x.dtype)

    def extra_repr(self) -> str:
        return f"groups={len(self.p)}, eps={self.eps}"


class AttentivePool(nn.Module):
    """Learned queries that attend to the tokens (efficient probing, Psomas et al. 2025).

    The values, of C / d_out channels, are shared out to the M queries; query m gathers its own share:
    `y = concat_m(A_m V_m)`, `A_m = softmax(q_m x^T (C / H)^-0.5)`. Keys are the tokens themselves.

    Args:
        dim: C.
        num_queries: M.
        num_heads: H; each query attends by slices of the channels. The official program has one.
        d_out: how many times narrower than the tokens the result is.
        key_projection: keys by a linear layer; with one query, the attentive probe of AIM (El-Nouby et al.
            2024).
        bias: of the linear layers.
    """

    token_order: ClassVar[str] = "learned"
    """Its queries lie nowhere on the map."""

    def __init__(
        self,
        dim: int,
        *,
        num_queries: int = 32,
        num_heads: int = 1,
        d_out: int = 1,
        key_projection: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if min(num_queries, num_heads, d_out) < 1:
            raise ConfigError("num_queries, num_heads and d_out are at least 1.")
        if dim % num_heads or dim % (d_out * num_queries * num_heads):
            raise ConfigError(
                f"{dim} channels cannot be shared out evenly: they are a multiple of d_out * num_queries * "
                f"num_heads = {d_out} * {num_queries} * {num_heads}."
            )
        self.num_queries, self.num_heads, self.out_features = num_queries, num_heads, dim // d_out
        self.queries = nn.Parameter(torch.empty(num_queries, dim))
        self.k = nn.Linear(dim, dim, bias=bias) if key_projection else None
        self.v = nn.Linear(dim, self.out_features, bias=bias)
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C) -> (B, C / d_out)`"""
        batch, queries, heads = x.shape[0], self.num_queries, self.num_heads
        q = self.queries.to(x.dtype).expand(batch, -1, -1).unflatten(2, (heads, -1)).transpose(1, 2)
        k = (x if self.k is None else self.k(x)).unflatten(2, (heads, -1)).transpose(1, 2)
        v = self.v(x).unflatten(2, (queries, heads, -1)).permute(0, 3, 1, 2, 4).flatten(3)
        # Every query reads all shares, which costs less than a copy of the keys for each query.
        out = attend(q, k.to(v.dtype), v).unflatten(3, (queries, -1))  # (B, H, M, M, C / (d_out M H))
        return out.diagonal(dim1=2, dim2=3).permute(0, 3, 1, 2).flatten(1)

    def extra_repr(self) -> str:
        return f"num_queries={self.num_queries}, num_heads={self.num_heads}"


POOLS: dict[str, type[nn.Module]] = {"ggem": GGeM, "attentive": AttentivePool}
"""Pools with weights."""


def create_pool(pool: str | Mapping[str, Any], dim: int) -> nn.Module:
    """The pool that a name, or a mapping with a name and arguments, asks for.

    Args:
        pool: `"ggem"`, or `{"name": "attentive", "num_queries": 16}`.
        dim: width of the tokens.

    Raises:
        ConfigError: no such pool, or an argument that it does not take.
    """
    options = {"name": pool} if isinstance(pool, str) else dict(pool)
    name = str(options.pop("name", None))
    if name not in POOLS:
        raise ConfigError(f"There is no pool {name!r}.{did_you_mean(name, POOLS)} Pools: {', '.join(POOLS)}.")
    known = [key for key in inspect.signature(POOLS[name]).parameters if key != "dim"]
    for option in options:
        if option not in known:
            raise ConfigError(
                f"Pool {name!r} has no argument {option!r}.{did_you_mean(option, known)} "
                f"It has: {', '.join(known)}."
            )
    return POOLS[name](dim, **options)
