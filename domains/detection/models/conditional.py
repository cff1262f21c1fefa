"""Layers of Conditional DETR (Meng et al. 2021) with groups of queries (Chen et al. 2022).

Shapes: B images, S tokens of the map, Q queries of all groups, d width, H heads. What does not depend on the
image has B = 1 and is broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.detection.models.common import by_onednn
from zoo.attention import EqualGroups, Padding, Pattern, attend
from zoo.attention.layers import check_supports, create_map_attention, on_tokens

Attention = str | Mapping[str, Any]
"""The name of a layer (`zoo list attention`), or a mapping with its name and arguments."""
NOMINAL_MAP = (25, 42)
"""Cells of the map of an image of 800 x 1333 pixels: what tables of a layer are made for."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(B, N, d) -> (B, H, N, d / H)`"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """`(B, H, N, D) -> (B, N, H D)`"""
    return x.transpose(1, 2).flatten(2)


class FFN(nn.Module):
    """Two linear layers."""

    def __init__(self, dim: int, hidden: int, dropout: float, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.activation = nn.ReLU(inplace=True) if activation is None else activation
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(self._hidden(x)))

    def _hidden(self, x: Tensor) -> Tensor:
        if isinstance(self.activation, nn.ReLU) and by_onednn(x) and not torch.is_grad_enabled():
            return torch.ops.mkldnn._linear_pointwise(x, self.fc1.weight, self.fc1.bias, "relu", [], "")
        return self.activation(self.fc1(x))


class EncoderAttention(nn.Module):
    """Positions are added to queries and keys, not to values."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, pos: Tensor, pattern: Pattern | None) -> Tensor:
        wide = 2 * x.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q, k = F.linear(x + pos, weight[:wide], bias[:wide]).chunk(2, -1)
        v = F.linear(x, weight[wide:], bias[wide:])
        q, k, v = (split_heads(y, self.num_heads) for y in (q, k, v))
        out = attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)
        return self.out(join_heads(out))


class OtherEncoderAttention(nn.Module):
    """Any layer of the zoo that looks both ways and takes padded rows; positions are added to its tokens.

    Its values have them as well: a layer makes queries, keys and values of one input.
    """

    def __init__(self, attention: Attention, dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer = create_map_attention(attention, dim, NOMINAL_MAP, num_heads=num_heads)
        check_supports(self.layer, "padding", "any_length", reason="a batch holds images of several sizes")

    def forward(self, x: Tensor, pos: Tensor, pattern: Pattern | None, size: Sequence[int]) -> Tensor:
        mask = pattern.keys if isinstance(pattern, Padding) else None
        return on_tokens(self.layer, x + pos, size, mask)


class EncoderLayer(nn.Module):
    """Attention and FFN, each followed by the norm of the sum.

    Args:
        attention: a layer of the zoo instead of the model's own.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        activation: nn.Module | None = None,
        attention: Attention | None = None,
    ) -> None:
        super().__init__()
        if attention is None:
            self.attention = EncoderAttention(dim, num_heads, dropout)
        else:
            self.attention = OtherEncoderAttention(attention, dim, num_heads)
        self.ffn = FFN(dim, ffn_dim, dropout, activation)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, pattern: Pattern | None, size: Sequence[int]) -> Tensor:
        """`(B, S, d) -> (B, S, d)` on a map of this height and width; pos `(B or 1, S, d)`."""
        x = self.norm1(x + self.dropout(self._attended(x, pos, pattern, size)))
        return self.norm2(x + self.dropout(self.ffn(x)))

    def _attended(self, x: Tensor, pos: Tensor, pattern: Pattern | None, size: Sequence[int]) -> Tensor:
        if isinstance(self.attention, OtherEncoderAttention):
            return self.attention(x, pos, pattern, size)
        return self.attention(x, pos, pattern)


class GroupSelfAttention(nn.Module):
    """Queries of one group see each other: content and position have projections of their own, added up."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.content = nn.Linear(dim, 3 * dim)
        self.pos = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, pos: Tensor, groups: int) -> Tensor:
        """`(B, Q, d) -> (B, Q, d)`; pos `(B or 1, Q, d)`; groups of Q / G consecutive queries."""
        q, k, v = self.content(x).chunk(3, -1)
        pos_q, pos_k = self.pos(pos).chunk(2, -1)
        q, k, v = (split_heads(y, self.num_heads) for y in (q + pos_q, k + pos_k, v))
        pattern = EqualGroups(x.shape[1] // groups) if groups > 1 else None
        out = attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)
        return self.out(join_heads(out))

    def of_nothing(self) -> Tensor:
        """What comes out where all content is zero, `(1, 1, d)`: all values are the bias, whatever weighs
        them."""
        values = self.content.bias[2 * self.out.in_features :]
        return self.out(values)[None, None]


class ConditionalCrossAttention(nn.Module):
    """Per head, content and position stand side by side: the scores are the sum of two products (eq. 2).

    Args:
        with_pos: the embedding of the query and the position of the key are added to their content as well,
            as in the first layer.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float, *, with_pos: bool) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q_content = nn.Linear(dim, dim)
        self.q_pos = nn.Linear(dim, dim) if with_pos else None
        self.q_sine = nn.Linear(dim, dim)
        self.kv_content = nn.Linear(dim, 2 * dim)
        self.k_pos = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Tensor,
        query_pos: Tensor,
        sine: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        pattern: Pattern | None,
    ) -> Tensor:
        """Content x, query_pos and sine `(B or 1, Q or 1, d)`, memory and its position `(B, S, d)` to
        `(B, Q, d)`."""
        q = self.q_content(x)
        k, v = self.kv_content(memory).chunk(2, -1)
        k_pos = self.k_pos(memory_pos)
        if self.q_pos is not None:
            q = q + self.q_pos(query_pos)
            k = k + k_pos
        q, k = self._paired(q, self.q_sine(sine), memory), self._paired(k, k_pos, memory)
        v = split_heads(v, self.num_heads)
        out = attend(q, k, v, pattern=pattern, dropout=self.dropout if self.training else 0.0)
        return self.out(join_heads(out))

    def _paired(self, content: Tensor, pos: Tensor, memory: Tensor) -> Tensor:
        """Heads with both beside each other, `(B, H, N, 2 d / H)`."""
        both = [split_heads(y, self.num_heads) for y in torch.broadcast_tensors(content, pos)]
        return torch.cat(both, -1).expand(memory.shape[0], -1, -1, -1)


class DecoderLayer(nn.Module):
    """Self-attention within groups, cross-attention, FFN, each followed by the norm of the sum."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        *,
        with_pos: bool,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.self_attention = GroupSelfAttention(dim, num_heads, dropout)
        self.cross_attention = ConditionalCrossAttention(dim, num_heads, dropout, with_pos=with_pos)
        self.ffn = FFN(dim, ffn_dim, dropout, activation)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        content: Tensor | None,
        query_pos: Tensor,
        sine: Tensor,
        memory: Tensor,
        memory_pos: Tensor,
        pattern: Pattern | None,
        groups: int,
    ) -> Tensor:
        """`(B, Q, d)`; content None stands for zeros, of which evaluation needs no self-attention."""
        if content is None and not self.training:
            x = self.norm1(self.self_attention.of_nothing())
        else:
            if content is None:
                content = memory.new_zeros(len(memory), *query_pos.shape[1:])
            x = self.norm1(content + self.dropout(self.self_attention(content, query_pos, groups)))
        crossed = self.cross_attention(x, query_pos, sine, memory, memory_pos, pattern)
        x = self.norm2(x + self.dropout(crossed))
        return self.norm3(x + self.dropout(self.ffn(x)))


def reset_transformer(module: nn.Module) -> None:
    """Xavier for every matrix of decoder layers, the fused ones block by block."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            for block in part.weight.data.split(min(part.weight.shape)):
                nn.init.xavier_uniform_(block)
