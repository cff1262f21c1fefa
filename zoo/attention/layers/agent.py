"""Attention by way of a few agents, tokens that stand between the queries and the keys."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.maps import axes_of, rows_and_columns


class AgentAttention(AttentionLayer, name="agent"):
    """`softmax(q a^T + B2) softmax(a k^T + B1) v + DWC(v)` (Han et al. 2024, Agent Attention, equation 4).

    The n agents a are means of the queries over a grid of n cells: they gather what the keys hold, and the
    queries read it from them, at a cost linear in the number of tokens. The biases B1 and B2 are sums of a
    small map and of one table for each axis. On maps of another size than that of the tables all of them are
    resized linearly. Weights by their official names, but for one matrix `qkv` where nothing is reduced.

    Args:
        dim: C.
        num_heads: H.
        shape: tokens along each of the 1 or 2 axes, the size of the tables; by default one axis.
        agents: n; on two axes a square number.
        reduction: keys and values come from patches of so many tokens along each axis, by a convolution.
        class_token: the first token lies outside of the map; it is read and written, but not in the agents.
        bias_size: of the small map.
        qkv_bias, out_bias: biases of the projections.
        dropout: of the attention weights.
    """

    ah_bias: nn.Parameter | None
    ha_bias: nn.Parameter | None
    ac_bias: nn.Parameter | None
    ca_bias: nn.Parameter | None

    supports = Supports(bidirectional=True)
    paper = "https://arxiv.org/abs/2312.08874"
    token_order: ClassVar[str] = "pooled"
    """In its maps, agents are means of parts of the grid."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        agents: int = 49,
        reduction: int = 1,
        class_token: bool = False,
        bias_size: int = 7,
        qkv_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head_width(dim, num_heads)
        self.shape = None if shape is None else tuple(shape)
        self.axes = axes_of(shape)
        side = isqrt(max(agents, 0))
        self.pool = (1, agents) if self.axes == 1 else (side, side)
        if agents < 1 or self.pool[0] * self.pool[1] != agents:
            raise AttentionError(f"agents={agents}: on two axes agents are a square number, at least 1")
        if reduction < 1 or (reduction > 1 and class_token):
            raise AttentionError(f"reduction is at least 1, and 1 beside a class token, not {reduction}")
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.reduction, self.class_token = reduction, class_token
        if reduction == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=out_bias)
        kernel, patch = ((1, 3), (1, reduction)) if self.axes == 1 else ((3, 3), (reduction, reduction))
        self.dwc = nn.Conv2d(dim, dim, kernel, padding=(kernel[0] // 2, 1), groups=dim)
        if reduction > 1:
            self.q, self.kv = nn.Linear(dim, dim, bias=qkv_bias), nn.Linear(dim, 2 * dim, bias=qkv_bias)
            self.sr, self.norm = nn.Conv2d(dim, dim, patch, stride=patch), nn.LayerNorm(dim)
        self._make_tables(agents, bias_size, patch)

    def _make_tables(self, n: int, size: int, patch: tuple[int, int]) -> None:
        heads = self.num_heads
        sides = (1, size) if self.shape is None else (1, *self.shape)[-2:]
        rows, columns = sides
        k_rows, k_columns = (max(1, side // step) for side, step in zip(sides, patch, strict=True))
        small = (1, size) if self.axes == 1 else (size, size)
        self.an_bias = nn.Parameter(torch.empty(heads, n, *small))
        self.na_bias = nn.Parameter(torch.empty(heads, n, *small))
        self.aw_bias = nn.Parameter(torch.empty(1, heads, n, 1, k_columns))
        self.wa_bias = nn.Parameter(torch.empty(1, heads, 1, columns, n))
        self.ah_bias = self.ha_bias = self.ac_bias = self.ca_bias = None
        if self.axes == 2:
            self.ah_bias = nn.Parameter(torch.empty(1, heads, n, k_rows, 1))
            self.ha_bias = nn.Parameter(torch.empty(1, heads, rows, 1, n))
        if self.class_token:
            self.ac_bias = nn.Parameter(torch.empty(1, heads, n, 1))
            self.ca_bias = nn.Parameter(torch.empty(1, heads, 1, n))
        for name, table in self.named_parameters(recurse=False):
            assert name.endswith("_bias")
            nn.init.trunc_normal_(table, std=0.02)

    def mix(self, given: Inputs) -> Tensor:
        x = given.x
        first = int(self.class_token)
        shape = rows_and_columns(self.shape, x.shape[1] - first)
        q, k, v, reduced = self._projected(x, shape)
        pooled = F.adaptive_avg_pool2d(_as_map(q[:, first:], shape), self.pool).flatten(2).mT
        agents, q, k, values = (split_heads(t, self.num_heads) for t in (pooled, q, k, v))
        dropout = self.dropout if self.training else 0.0
        gathered = attend(agents, k, values, bias=self._gathering(reduced), dropout=dropout)
        out = attend(q, agents, gathered, bias=self._reading(shape), dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2) + self._convolved(v, reduced, shape))

    def _projected(self, x: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Queries `(B, N, C)`, keys and values `(B, M, C)`, and the shape of the map of keys."""
        if self.reduction == 1:
            return *self.qkv(x).chunk(3, dim=-1), shape
        patch = self.sr.kernel_size
        short = [max(step - side, 0) for side, step in zip(shape, patch, strict=True)]
        map = self.sr(F.pad(_as_map(x, shape), (0, short[1], 0, short[0])))
        k, v = self.kv(self.norm(map.flatten(2).mT)).chunk(2, dim=-1)
        return self.q(x), k, v, (map.shape[2], map.shape[3])

    def _convolved(self, v: Tensor, reduced: tuple[int, int], shape: tuple[int, int]) -> Tensor:
        """The depthwise convolution of the values `(B, M, C)`, `(B, N, C)`; nothing for a class token."""
        map = _as_map(v[:, int(self.class_token) :], reduced)
        if reduced != shape:
            map = F.interpolate(map, shape, mode="bilinear")
        return F.pad(self.dwc(map).flatten(2).mT, (0, 0, int(self.class_token), 0))

    def _gathering(self, shape: tuple[int, int]) -> Tensor:
        """B1: of the agents to the keys, `(1, H, n, M)`."""
        bias = F.interpolate(self.an_bias, shape, mode="bilinear") + resized(self.aw_bias, 4, shape[1])
        if self.ah_bias is not None:
            bias = bias + resized(self.ah_bias, 3, shape[0])
        bias = bias.flatten(3)
        return bias if self.ac_bias is None else torch.cat([self.ac_bias, bias], 3)

    def _reading(self, shape: tuple[int, int]) -> Tensor:
        """B2: of the queries to the agents, `(1, H, N, n)`."""
        small = F.interpolate(self.na_bias, shape, mode="bilinear").permute(0, 2, 3, 1)
        bias = small + resized(self.wa_bias, 3, shape[1])
        if self.ha_bias is not None:
            bias = bias + resized(self.ha_bias, 2, shape[0])
        bias = bias.flatten(2, 3)
        return bias if self.ca_bias is None else torch.cat([self.ca_bias, bias], 2)


def resized(table: Tensor, axis: int, size: int) -> Tensor:
    """A table with `size` entries along an axis, linearly between those that it has."""
    if table.shape[axis] == size:
        return table
    rows = table.movedim(axis, -1)
    found = F.interpolate(rows.reshape(1, -1, rows.shape[-1]), size, mode="linear")
    return found.view(*rows.shape[:-1], size).movedim(-1, axis)


def _as_map(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Tokens `(B, N, C)` to a map `(B, C, H, W)`; a view."""
    return x.mT.unflatten(2, shape)
