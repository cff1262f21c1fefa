"""Gated associative memory: a short convolution and a bank of trained slots, in place of attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.delta import CausalConvolution
from zoo.attention.layers.linear import StateCache, join, places, split


class GatedAssociativeMemory(AttentionLayer, name="gam"):
    """GAM: `sigmoid(g_l) conv(x) + sigmoid(g_g) softmax(x M^T) M`, with M slots that are parameters.

    No token sees another beyond the reach of the convolution, and the slots hold what training put there and
    nothing of the sequence: it cannot recall a value that the context bound to a key (associative recall,
    MQAR, is at chance), however many layers are stacked. Use it where local order and global statistics of
    the data suffice, or beside a layer that attends.

    Parameter names are the official ones. Maps show which slots a token reads.

    Args:
        dim: C, width of the tokens.
        num_heads: each reads its own C / H channels of the slots; 1 in the paper.
        slots: rows of M.
        kernel: tokens under the convolution.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2509.00605"
    causal = True

    def __init__(self, dim: int, num_heads: int = 1, *, slots: int = 512, kernel: int = 3) -> None:
        super().__init__()
        head_width(dim, num_heads)
        if slots < 1:
            raise AttentionError(f"a memory has at least one slot, not {slots}")
        self.dim, self.num_heads = dim, num_heads
        self.memory_bank = nn.Parameter(torch.randn(slots, dim) * dim**-0.5)
        self.causal_conv = CausalConvolution(dim, kernel, bias=True)
        self.gate = nn.Linear(dim, 2 * dim)

    def mix(self, given: Inputs) -> Tensor:
        x, cache = given.x, given.cache
        tail = cache.tails.get("x") if isinstance(cache, StateCache) else None
        local, tail = self.causal_conv(x, *places(given.mask, cache), tail)
        if isinstance(cache, StateCache):
            cache.tails["x"] = tail.detach()
            cache.length += x.shape[1]
        near, far = self.gate(x).chunk(2, dim=-1)
        return near.sigmoid() * local + far.sigmoid() * self.recall(x)

    def recall(self, x: Tensor) -> Tensor:
        """What tokens `(B, N, C)` read from the slots."""
        bank = split(self.memory_bank.to(x.dtype)[None], self.num_heads).expand(len(x), -1, -1, -1)
        return join(attend(split(x, self.num_heads), bank, bank, scale=1.0))

    def init_cache(self, batch_size: int) -> StateCache:
        """Holds the last tokens under the convolution."""
        return StateCache(self)


class GatedAssociativeBlock(GatedAssociativeMemory):
    """The official block: `x + gam(LN x)`, then `x + FFN(LN x)` of width 4 C with GELU."""

    def __init__(self, dim: int, num_heads: int = 1, *, slots: int = 512, kernel: int = 3) -> None:
        super().__init__(dim, num_heads, slots=slots, kernel=kernel)
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def mix(self, given: Inputs) -> Tensor:
        x = given.x + super().mix(given._replace(x=self.ln1(given.x)))
        return x + self.ffn(self.ln2(x))
