"""FIT: attention inside groups of tokens, and across them through a few latents of each group.

Shapes: B batch, N tokens in t groups of n, C their width; m latents per group. Groups stand in the batch,
`(B t, n, C)`, as the patterns of `EqualGroups` do.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.patterns import Dense, Pattern, Rule

_EPS = 1e-6


class GroupsUpTo(Pattern):
    """Tokens in consecutive groups of `size`; a query sees its own group and the earlier ones."""

    def __init__(self, size: int) -> None:
        self.size = size

    def rule(self, nq: int, nk: int) -> Rule:
        return lambda b, h, i, j: j // self.size <= i // self.size

    def __repr__(self) -> str:
        return f"GroupsUpTo({self.size})"


class LatentAttention(MultiHead):
    """Attention of all latents of a row `(B, t m, C)`; causal: to those of their own and earlier groups.

    Args:
        group: m.
        options: of `MultiHead`.
    """

    def __init__(self, dim: int, num_heads: int, *, group: int, causal: bool, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.group, self.looks_back = group, causal

    def pattern(self, num_keys: int, mask: Tensor | None) -> Pattern:
        return masked(GroupsUpTo(self.group) if self.looks_back else Dense(), mask)


class InGroups(NamedTuple):
    """A row of tokens cut into groups; the last is filled up with padding."""

    x: Tensor
    """`(B t, n, C)`."""
    mask: Tensor | None
    """Bool `(B t, n)`, True = a real token; None = all are."""
    places: Tensor
    """Of the tokens in their row, `(B t, n)`."""

    @classmethod
    def cut(cls, x: Tensor, size: int, mask: Tensor | None, places: Tensor | None = None) -> InGroups:
        """Tokens `(B, N, C)` with a mask `(B, N)`; places `(N,)` or `(B, N)` count from 0 by default."""
        batch, length = x.shape[:2]
        rest = -length % size
        if places is None:
            places = torch.arange(length, device=x.device)
        if rest and mask is None:
            mask = x.new_ones(batch, length, dtype=torch.bool)
        shape = (-1, size)
        return cls(
            F.pad(x, (0, 0, 0, rest)).unflatten(1, shape).flatten(0, 1),
            None if mask is None else F.pad(mask, (0, rest)).unflatten(1, shape).flatten(0, 1),
            F.pad(places.expand(batch, length), (0, rest)).unflatten(1, shape).flatten(0, 1),
        )

    def joined(self, x: Tensor, batch: int, length: int) -> Tensor:
        """Groups `(B t, n, C)` to `(B, N, C)`."""
        return x.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]

    def real(self, batch: int, latents: int) -> Tensor | None:
        """Bool `(B, t m)`: the latents of groups that hold a token."""
        if self.mask is None:
            return None
        return self.mask.any(-1).unflatten(0, (batch, -1)).repeat_interleave(latents, dim=1)


def of_group_before(latents: Tensor, first: Tensor, batch: int) -> Tensor:
    """Latents `(B t, m, C)` of the group before each; the first group gets `first` `(m, C)`."""
    rows = latents.unflatten(0, (batch, -1))
    return torch.cat([first.to(rows.dtype).expand(batch, 1, -1, -1), rows[:, :-1]], dim=1).flatten(0, 1)


def _check(group_size: int, latents: int) -> None:
    if group_size < 1 or latents < 1:
        raise AttentionError(f"groups have at least one token and one latent, not {group_size} and {latents}")


class FitAttention(AttentionLayer, name="fit"):
    """One round of FIT (Chen and Li 2023, section 2) as a layer: `local(x) + write(x, latents)`.

    Tokens attend inside their group. The latents of each group, m trained tokens, read it, attend to the
    latents of all groups, and are read by its tokens: O(N n + (t m)^2). Where it is causal, attention in
    groups is, latents see those of earlier groups, and tokens read the latents of the group before theirs:
    those of their own have seen its later tokens. Groups count from the first place of a row: a padded row
    equals the row alone where padding stands on the right.

    Args:
        dim: C.
        num_heads: of all four attentions.
        group_size: n; a last group may be smaller.
        latents: m.
        causal: tokens see themselves and earlier ones.
        rope_theta: base of rotary positions, of tokens and of latents; by default there are none.
    """

    supports = Supports(bidirectional=True, causal=True, padding=True)
    paper = "https://arxiv.org/abs/2305.12689"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        group_size: int = 64,
        latents: int = 8,
        causal: bool = False,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        _check(group_size, latents)
        self.dim, self.group_size, self.causal = dim, group_size, causal
        self.local = MultiHead(dim, num_heads, causal=causal, rope_theta=rope_theta)
        self.read, self.write = MultiHead(dim, num_heads), MultiHead(dim, num_heads)
        self.across = LatentAttention(dim, num_heads, group=latents, causal=causal, rope_theta=rope_theta)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.latents = nn.Parameter(torch.randn(latents, dim) * dim**-0.5)

    def mix(self, given: Inputs) -> Tensor:
        batch, length, _ = given.x.shape
        groups = InGroups.cut(given.x, self.group_size, given.mask, given.positions)
        x, mask, places = groups
        first = self.latents.expand(len(x), -1, -1)
        rows = (first + self.read(first, x, mask=mask)).unflatten(0, (batch, -1)).flatten(1, 2)
        rows = rows + self.across(self.norm(rows), mask=groups.real(batch, len(self.latents)))
        latents = rows.unflatten(1, (-1, len(self.latents))).flatten(0, 1)
        if self.causal:
            latents = of_group_before(latents, self.latents, batch)
        out = self.local(x, mask=mask, positions=places) + self.write(x, self.norm(latents))
        return groups.joined(out, batch, length)


class _FeedForward(nn.Sequential):
    """`x + W_2 GELU(W_1 LN x)`."""

    def __init__(self, dim: int, ratio: float) -> None:
        hidden = int(dim * ratio)
        super().__init__(
            nn.LayerNorm(dim, eps=_EPS), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class SelfLayer(nn.Module):
    """`x + attention(LN x)`, then the feed-forward net."""

    def __init__(self, attention: MultiHead, ratio: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(attention.dim, eps=_EPS), attention
        self.mlp = _FeedForward(attention.dim, ratio)

    def forward(self, x: Tensor, mask: Tensor | None, places: Tensor | None = None) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x), mask=mask, positions=places))


class _Run(nn.ModuleList):
    """Self-layers one after the other."""

    def forward(self, x: Tensor, mask: Tensor | None, places: Tensor | None = None) -> Tensor:
        for layer in self:
            x = layer(x, mask, places)
        return x


class CrossLayer(nn.Module):
    """`x + attention(LN x, LN context)`, as wide as the narrower of the two, then the feed-forward net."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, ratio: float) -> None:
        super().__init__()
        self.norm, self.context_norm = nn.LayerNorm(dim, eps=_EPS), nn.LayerNorm(context_dim, eps=_EPS)
        width = head_width(min(dim, context_dim), num_heads)
        self.attention = MultiHead(dim, num_heads, head_dim=width, context_dim=context_dim)
        self.mlp = _FeedForward(dim, ratio)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return self.mlp(x + self.attention(self.norm(x), self.context_norm(context), mask=mask))


class Fit(nn.Module):
    """Far-reaching interleaved transformers (Chen and Li 2023): a stack of `(local)global(local)...`.

    Each number in brackets is one of layers inside the groups, each other one of layers across all latents,
    between latents that read their group and a group that reads them; `"(2)4(2)4(2)"` has two such rounds.
    Causal as `FitAttention` is. Positions are rotary, or what the caller adds to the tokens.

    Args:
        layers: such a string.
        dim, latent_dim: widths of tokens and of latents.
        num_heads, latent_heads: of the layers in groups and of all others.
        group_size: n; a last group may be smaller.
        latents: m.
        mlp_ratio: width of the feed-forward nets over that of their tokens.
        causal: tokens see themselves and earlier ones.
        rope_theta: base of rotary positions, of tokens and of latents; by default there are none.
    """

    def __init__(
        self,
        layers: str,
        dim: int,
        latent_dim: int,
        *,
        num_heads: int,
        latent_heads: int,
        group_size: int,
        latents: int,
        mlp_ratio: float = 4.0,
        causal: bool = False,
        rope_theta: float | None = None,
    ) -> None:
        super().__init__()
        _check(group_size, latents)
        self.group_size, self.causal = group_size, causal
        local, across = fit_layers(layers)
        options: dict[str, Any] = {"causal": causal, "rope_theta": rope_theta}
        self.local = nn.ModuleList(
            _Run(SelfLayer(MultiHead(dim, num_heads, **options), mlp_ratio) for _ in range(count))
            for count in local
        )
        self.across = nn.ModuleList(
            _Run(
                SelfLayer(LatentAttention(latent_dim, latent_heads, group=latents, **options), mlp_ratio)
                for _ in range(count)
            )
            for count in across
        )
        self.read, self.write = (
            nn.ModuleList(CrossLayer(*widths, latent_heads, mlp_ratio) for _ in across)
            for widths in ((latent_dim, dim), (dim, latent_dim))
        )
        self.latents = nn.Parameter(torch.randn(latents, latent_dim) * latent_dim**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens `(B, N, C)`, with a mask `(B, N)`, True = real, to tokens `(B, N, C)` and latents
        `(B, t m, latent_dim)`."""
        batch, length, _ = x.shape
        groups = InGroups.cut(x, self.group_size, mask)
        x, mask, places = groups
        real = groups.real(batch, len(self.latents))
        latents = self.latents.expand(len(x), -1, -1)
        for number, run in enumerate(self.local):
            if number:
                latents = self.read[number - 1](latents, x, mask)
                rows = latents.unflatten(0, (batch, -1)).flatten(1, 2)
                rows = self.across[number - 1](rows, real)
                latents = rows.unflatten(1, (-1, len(self.latents))).flatten(0, 1)
                seen = of_group_before(latents, self.latents, batch) if self.causal else latents
                x = self.write[number - 1](x, seen, None)
            x = run(x, mask, places)
        return groups.joined(x, batch, length), latents.unflatten(0, (batch, -1)).flatten(1, 2)


def fit_layers(layers: str) -> tuple[list[int], list[int]]:
    """Numbers of local and of global layers: `"(2)4(3)"` is [2, 3] and [4]."""
    if not re.fullmatch(r"\(\d+\)(\d+\(\d+\))+", layers):
        raise AttentionError(
            f"layers of FIT are '(local)global(local)...' with numbers in their places, such as '(2)4(2)', "
            f"not {layers!r}"
        )
    numbers = [int(number) for number in re.findall(r"\d+", layers)]
    return numbers[::2], numbers[1::2]
