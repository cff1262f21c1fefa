"""A small model of tokens with any attention layer of the zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.layers import AttentionLayer, create_attention, find_layer
from zoo.attention.layers.delta import ShortConvolution


class Block(nn.Module):
    """A short causal convolution and attention, then an MLP, each beside a residual."""

    def __init__(self, layer: AttentionLayer, dim: int, kernel: int | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.conv = None if kernel is None else ShortConvolution(dim, kernel)
        self.attn = layer
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        if self.conv is not None:
            y = self.conv(y, None, None, None)[0]
        x = x + self.attn(y)
        return x + self.mlp(self.norm2(x))


class TokenModel(nn.Module):
    """Embedding, blocks with an attention layer, and a head: tokens `(B, N)` to logits over tokens.

    Args:
        attention: name of the layer, or a mapping with its name and arguments. It is causal where it can be.
        vocab: number of tokens.
        dim: width.
        num_heads: of the layer, where its arguments do not name another number.
        depth: blocks.
        kernel: tokens of the convolution before each attention, which tells neighbours; None = none.
        places: longest row whose places get an embedding of their own; None = only the layers tell places.
    """

    def __init__(
        self,
        attention: str | Mapping[str, Any],
        vocab: int,
        *,
        dim: int = 64,
        num_heads: int = 1,
        depth: int = 2,
        kernel: int | None = 3,
        places: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.places = None if places is None else nn.Parameter(torch.randn(places, dim))
        layers = (causal_if_possible(attention, dim, num_heads) for _ in range(depth))
        self.blocks = nn.Sequential(*(Block(layer, dim, kernel) for layer in layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab)

    def forward(self, tokens: Tensor, asked: Tensor | None = None) -> Tensor:
        """Logits `(B, N, V)`, or `(n, V)` at the n places where the bool `asked` `(B, N)` is True."""
        x = self.embed(tokens)
        if self.places is not None:
            x = x + self.places[: tokens.shape[1]]
        x = self.blocks(x)
        return self.head(self.norm(x if asked is None else x[asked]))

    def loss(self, tokens: Tensor, labels: Tensor, ignored: int) -> Tensor:
        """Mean cross-entropy at the places that ask."""
        asked = labels != ignored
        return F.cross_entropy(self(tokens, asked), labels[asked])


def causal_if_possible(attention: str | Mapping[str, Any], dim: int, num_heads: int) -> AttentionLayer:
    """A layer that sees earlier tokens only; all tokens, where it has no other way."""
    name = attention if isinstance(attention, str) else str(attention["name"])
    causal = find_layer(name).supports.causal
    return create_attention(attention, dim, num_heads=num_heads, causal=causal)
