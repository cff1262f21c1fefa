"""Tokens that stand for the heads, among those of the sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width, masked
from zoo.attention.layers.multihead import split_heads
from zoo.attention.patterns import Dense


class HeadTokens(AttentionLayer, name="head_tokens"):
    """Head-interacted attention (Lu et al. 2022, DHVT, section 3.4), by its official names of weights.

    H tokens join the N others: head token h is made of the h-th share of the channels of the mean token. All
    attend to all; then the head tokens are dropped, their mean added to the class tokens.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        class_tokens: how many of the first tokens get the mean of the head tokens.
        qkv_bias: bias of queries, keys and values.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2210.05958"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        class_tokens: int = 0,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if class_tokens < 0:
            raise AttentionError(f"class_tokens is a number of tokens, not {class_tokens}")
        width = head_width(dim, num_heads)
        self.dim, self.num_heads, self.class_tokens = dim, num_heads, class_tokens
        self.dropout = dropout
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.ht_proj, self.ht_norm = nn.Linear(width, dim), nn.LayerNorm(width)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, num_heads, dim), std=0.02))

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        tokens, first = x.shape[1], self.class_tokens
        x = torch.cat([x, self.head_tokens(x, mask).to(x.dtype)], 1)
        seen = mask if mask is None else F.pad(mask, (0, self.num_heads), value=True)
        q, k, v = (split_heads(rows, self.num_heads) for rows in self.qkv(x).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, pattern=masked(Dense(), seen), dropout=dropout)
        out = self.proj(out.transpose(1, 2).flatten(2))
        out, heads = out[:, :tokens], out[:, tokens:]
        if not first:
            return out
        return torch.cat([out[:, :first] + heads.mean(1, keepdim=True), out[:, first:]], 1)

    @property
    def tokens_behind(self) -> int:
        """Rows and columns of its maps, behind those of the tokens, that are the heads'."""
        return self.num_heads

    def head_tokens(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens `(B, N, C)`, some of which are padding, to those of the heads, `(B, H, C)`."""
        if mask is None:
            mean = x.mean(1)
        else:
            mean = torch.where(mask[..., None], x, 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        shares = self.ht_proj(mean.unflatten(1, (self.num_heads, -1))).unflatten(2, (self.num_heads, -1))
        return F.gelu(self.ht_norm(shares)).flatten(2) + self.pos_embed
