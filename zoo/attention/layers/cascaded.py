"""Heads in a cascade: each reads its own share of the channels, and what the head before it found."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, masked
from zoo.attention.patterns import Causal, Dense, Pattern


def cascade(heads: Iterable[Callable[[Tensor], Tensor]], parts: Iterable[Tensor]) -> list[Tensor]:
    """`y_0 = head_0(x_0)`, `y_i = head_i(x_i + y_{i-1})` (Liu et al. 2023, equations 2 and 3)."""
    outputs: list[Tensor] = []
    for head, part in zip(heads, parts, strict=True):
        outputs.append(head(part + outputs[-1] if outputs else part))
    return outputs


class CascadedGroups(AttentionLayer, name="cascaded"):
    """Cascaded group attention on tokens: `ReLU(concat_i(y_i)) W_o`, `y_i = attention_i(x_i + y_{i-1})`, with
    the channels of a token split into one share `x_i` for each head.

    Later heads see what earlier ones gathered, at the cost of one head's projections each. Maps with
    convolved queries and position tables are in EfficientViT.

    Args:
        dim: C, divisible by the number of heads.
        num_heads: H.
        key_dim: width of queries and keys of a head.
        causal: tokens see themselves and earlier ones.
        bias: of the projections.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, causal=True, padding=True, packed=True)
    paper = "https://arxiv.org/abs/2305.07027"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_dim: int = 16,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise AttentionError(f"{dim} channels cannot be shared out evenly to {num_heads} heads")
        self.dim, self.num_heads, self.key_dim, self.causal = dim, num_heads, key_dim, causal
        self.dropout = dropout
        share = dim // num_heads
        self.qkv = nn.ModuleList(nn.Linear(share, 2 * key_dim + share, bias=bias) for _ in range(num_heads))
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        seen = masked(Causal() if self.causal else Dense(), mask)
        heads = [self._head(project, seen) for project in self.qkv]
        return self.o_proj(torch.cat(cascade(heads, x.chunk(self.num_heads, -1)), -1).relu())

    def _head(self, project: nn.Module, seen: Pattern) -> Callable[[Tensor], Tensor]:
        def head(x: Tensor) -> Tensor:
            widths = (self.key_dim, self.key_dim, x.shape[-1])
            q, k, v = (part[:, None] for part in project(x).split(widths, -1))
            dropout = self.dropout if self.training else 0.0
            return attend(q, k, v, pattern=seen, dropout=dropout).squeeze(1)

        return head
