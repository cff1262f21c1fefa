"""Attention among channels instead of tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads


class ChannelGroups(AttentionLayer, name="channel_groups"):
    """Channel group attention (Ding et al. 2022, DaViT, section 3.2): channels of a head see each other.

    A channel is a row of N numbers, so that every token takes part in every weight, at a cost linear in N.
    Captured maps are `(B, H, D, D)`, channels by channels.

    Args:
        dim: C.
        num_heads: H, groups of channels; a divisor of C.
        affinity: `kv`: `softmax(k^T v / sqrt(D)) q^T`, as in the official program and its weights. `qk`:
            `softmax(q^T k / sqrt(N)) v^T`, as in Florence-2.
        qkv_bias, out_bias: biases of the projections.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2204.03645"
    token_order: ClassVar[str] = "none"
    """Its maps are of channels: nothing to draw over an image."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        affinity: Literal["kv", "qk"] = "kv",
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if affinity not in ("kv", "qk"):
            raise AttentionError(f"affinity is 'kv' or 'qk', not {affinity!r}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, head_width(dim, num_heads)
        self.affinity, self.dropout = affinity, dropout
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        q, k, v = (split_heads(rows, self.num_heads).mT for rows in self.qkv(x).chunk(3, dim=-1))
        if mask is not None:
            k = k * mask[:, None, None].to(k.dtype)
        options: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0}
        if self.affinity == "kv":
            out = attend(k, v, q, scale=self.head_dim**-0.5, **options)
        elif mask is None:
            out = attend(q, k, v, scale=x.shape[1] ** -0.5, **options)
        else:
            tokens = mask.sum(1).clamp(min=1).to(torch.promote_types(q.dtype, torch.float32))
            out = attend(q * tokens.rsqrt()[:, None, None, None].to(q.dtype), k, v, scale=1.0, **options)
        return self.proj(out.flatten(1, 2).mT)
