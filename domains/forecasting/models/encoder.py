"""The encoder of Chronos-2: attention over time and over the rows of a group, in turn.

Shapes: B rows (single series), S tokens of each, D channels, H heads of d channels. Tokens are `(S, B, D)`,
so that attention over time and over rows are both views of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.forecasting.models.groups import RowGroups, attend_rows, can_skip_weights, values_alone
from zoo.attention import Padding, attend, rotary
from zoo.attention.layers import create_attention
from zoo.attention.layers.multihead import MultiHead
from zoo.errors import ConfigError

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class RMSNorm(nn.Module):
    """`w x / sqrt(mean(x^2) + eps)`, the mean in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`"""
        scaled = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(self.weight.dtype)


class ResidualBlock(nn.Module):
    """An MLP with one hidden layer beside a linear layer (`input` and `output` patch embedding)."""

    def __init__(self, in_dim: int, hidden: int, out_dim: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.hidden_layer = nn.Linear(in_dim, hidden)
        self.output_layer = nn.Linear(hidden, out_dim)
        self.residual_layer = nn.Linear(in_dim, out_dim)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., in) -> (..., out)`"""
        hidden = self.activation(self.hidden_layer(x))
        return self.dropout(self.output_layer(hidden)) + self.residual_layer(x)


class Attention(nn.Module):
    """Projections without bias around attention without a scale, along one axis of tokens `(S, B, D)`."""

    def __init__(self, dim: int, head_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.weight_dropout = dropout
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, inner, bias=False)
        self.v = nn.Linear(dim, inner, bias=False)
        self.o = nn.Linear(inner, dim, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """`(S, B, H d) -> (S, B, H, d)`"""
        return x.unflatten(-1, (self.num_heads, -1))

    @property
    def rate(self) -> float:
        """Of dropping a weight, at present."""
        return self.weight_dropout if self.training else 0.0


class TimeAttention(Attention):
    """A row's tokens see each other, with rotary positions."""

    def forward(self, x: Tensor, keep: int, tables: tuple[Tensor, Tensor], padding: Padding | None) -> Tensor:
        """Tokens `(S, B, D)` -> the last `keep` of them, tables `(S, d / 2)`."""
        cos, sin = tables
        q, k, v = (self.heads(part).permute(1, 2, 0, 3) for part in (self.q(x[-keep:]), self.k(x), self.v(x)))
        q, k = rotary(q, cos[-keep:], sin[-keep:]), rotary(k, cos, sin)
        out = attend(q, k, v, pattern=padding, scale=1.0, dropout=self.rate)
        return self.o(out.permute(2, 0, 1, 3).flatten(2))

    @torch.no_grad()
    def as_layer(self, rope_theta: float) -> MultiHead:
        """The same attention as a layer of the core."""
        dim, inner = self.q.in_features, self.q.out_features
        options: dict[str, Any] = {"head_dim": inner // self.num_heads, "rope_theta": rope_theta}
        layer = MultiHead(dim, self.num_heads, dropout=self.weight_dropout, **options).to(self.q.weight)
        layer.q_proj.weight.copy_(self.q.weight * layer.head_dim**0.5)  # scores here have no scale
        for target, own in ((layer.k_proj, self.k), (layer.v_proj, self.v), (layer.o_proj, self.o)):
            target.weight.copy_(own.weight)
        return layer.train(self.training)


class OtherTimeAttention(nn.Module):
    """Any layer of the core that sees both ways and takes padded rows, in the place of `TimeAttention`."""

    def __init__(self, attention: str | Mapping[str, Any], dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer = create_attention(attention, dim, causal=False, num_heads=num_heads)
        if not self.layer.supports.padding:
            raise ConfigError(
                f"attention={attention}: {type(self.layer).__name__} takes no padded rows; series of several "
                "lengths, or with missing patches, need that."
            )

    def forward(self, x: Tensor, keep: int, tables: tuple[Tensor, Tensor], padding: Padding | None) -> Tensor:
        """Tokens `(S, B, D)` -> the last `keep` of them; positions are the layer's own matter."""
        mask = None if padding is None else padding.keys
        return self.layer(x.transpose(0, 1), mask=mask).transpose(0, 1)[-keep:]


class GroupAttention(Attention):
    """The rows of a group see each other, at each token by itself, without positions."""

    def forward(self, x: Tensor, groups: RowGroups, seen: Tensor | None, unseen: str) -> Tensor:
        """`(S, B, D) -> (S, B, D)`, for `seen` `(S, B)`."""
        if can_skip_weights(groups):
            return self.o(values_alone(self.v(x), seen, unseen=unseen))
        q, k, v = (self.heads(part).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        out = attend_rows(q, k, v, groups, seen, dropout=self.rate, unseen=unseen)
        return self.o(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers without bias."""

    def __init__(self, dim: int, hidden: int, activation: str, dropout: float) -> None:
        super().__init__()
        self.wi = nn.Linear(dim, hidden, bias=False)
        self.wo = nn.Linear(hidden, dim, bias=False)
        self.activation = ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D) -> (..., D)`"""
        return self.wo(self.dropout(self.activation(self.wi(x))))


class TimeLayer(nn.Module):
    """Residual attention over time."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        num_heads: int,
        dropout: float,
        eps: float,
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.self_attention: TimeAttention | OtherTimeAttention = (
            OtherTimeAttention(attention, dim, num_heads)
            if attention
            else TimeAttention(dim, head_dim, num_heads, dropout)
        )
        self.layer_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: int, tables: tuple[Tensor, Tensor], padding: Padding | None) -> Tensor:
        """Tokens `(S, B, D)` -> the last `keep` of them."""
        return x[-keep:] + self.dropout(self.self_attention(self.layer_norm(x), keep, tables, padding))


class GroupLayer(nn.Module):
    """Residual attention over the rows of a group."""

    def __init__(self, dim: int, head_dim: int, num_heads: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.self_attention = GroupAttention(dim, head_dim, num_heads, dropout)
        self.layer_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, groups: RowGroups, seen: Tensor | None, unseen: str) -> Tensor:
        """`(S, B, D) -> (S, B, D)`"""
        return x + self.dropout(self.self_attention(self.layer_norm(x), groups, seen, unseen))


class FeedForward(nn.Module):
    """Residual MLP."""

    def __init__(self, dim: int, hidden: int, activation: str, dropout: float, eps: float) -> None:
        super().__init__()
        self.mlp = MLP(dim, hidden, activation, dropout)
        self.layer_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`(S, B, D) -> (S, B, D)`"""
        return x + self.dropout(self.mlp(self.layer_norm(x)))


class Block(nn.Module):
    """Attention over time, attention over the rows of a group, MLP; each normed before and residual."""

    def __init__(
        self,
        dim: int,
        head_dim: int,
        num_heads: int,
        hidden: int,
        activation: str,
        dropout: float,
        eps: float,
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            [
                TimeLayer(dim, head_dim, num_heads, dropout, eps, attention),
                GroupLayer(dim, head_dim, num_heads, dropout, eps),
                FeedForward(dim, hidden, activation, dropout, eps),
            ]
        )

    def forward(
        self,
        x: Tensor,
        keep: int,
        tables: tuple[Tensor, Tensor],
        groups: RowGroups,
        seen: Tensor | None,
        unseen: str,
    ) -> Tensor:
        """Tokens `(S, B, D)`, `seen` `(S, B)` (None = all) -> the last `keep` of them."""
        over_time, over_rows, mlp = self.layer
        padding = None if seen is None else Padding(seen.T)
        x = over_time(x, keep, tables, padding)
        return mlp(over_rows(x, groups, None if seen is None else seen[-keep:], unseen))


class Encoder(nn.Module):
    """The blocks and the norm after them."""

    def __init__(self, blocks: Sequence[Block], dim: int, dropout: float, eps: float) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.final_layer_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keep: int,
        tables: tuple[Tensor, Tensor],
        groups: RowGroups,
        seen: Tensor | None,
        unseen: str,
    ) -> Tensor:
        """Tokens `(S, B, D)` -> the last `keep` of them, the only ones the last block makes."""
        x = self.dropout(x)
        for block in self.block[:-1]:
            x = block(x, len(x), tables, groups, seen, unseen)
        x = self.block[-1](x, keep, tables, groups, seen, unseen)
        return self.dropout(self.final_layer_norm(x))

    def core_layers(self, rope_theta: float) -> dict[str, MultiHead]:
        """The published attention over time as layers of the core, where `OtherTimeAttention` holds them."""
        own = {name: part for name, part in self.named_modules() if isinstance(part, TimeAttention)}
        return {f"{name}.layer": attention.as_layer(rope_theta) for name, attention in own.items()}
