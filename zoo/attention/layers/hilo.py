"""High and low frequencies: some heads look within small windows, the others at their means."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.maps import axes_of, from_windows, padded, rows_and_columns, windows
from zoo.attention.patterns import Padding


class HiLo(AttentionLayer, name="hilo"):
    """HiLo attention (Pan et al. 2022, LITv2, section 3.2), by its official names of weights.

    `H - L` heads see the other tokens of their window of s x s; L heads, the low frequencies, see the means
    of all windows. The channels of the first ones come first. A window at the border holds what there is of
    it: nothing that fills up is seen or counted in a mean.

    Args:
        dim: C.
        num_heads: H.
        shape: tokens along each of the 1 or 2 axes; by default one axis of any length.
        window: s; with 1 all heads see all tokens.
        alpha: the share of heads that see the means: `L = int(alpha * H)`.
        qkv_bias: of the projections to queries, keys and values.
        dropout: of the attention weights.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2205.13213"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        shape: Sequence[int] | None = None,
        window: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if window < 1 or not 0 <= alpha <= 1:
            raise AttentionError(f"window is at least 1 and alpha in [0, 1], not {window} and {alpha}")
        self.shape = None if shape is None else tuple(shape)
        self.axes = axes_of(shape)
        self.dim, self.window, self.dropout = dim, window, dropout
        width = head_width(dim, num_heads)
        self.low_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low, high = self.low_heads * width, self.high_heads * width
        if low:
            self.l_q, self.l_kv = nn.Linear(dim, low, bias=qkv_bias), nn.Linear(dim, 2 * low, bias=qkv_bias)
            self.l_proj = nn.Linear(low, low)
        if high:
            self.h_qkv, self.h_proj = nn.Linear(dim, 3 * high, bias=qkv_bias), nn.Linear(high, high)

    def mix(self, given: Inputs) -> Tensor:
        x, mask = given.x, given.mask
        shape = rows_and_columns(self.shape, x.shape[1])
        size = (1 if self.axes == 1 else self.window, self.window)
        whole = all(side % step == 0 for side, step in zip(shape, size, strict=True))
        real = None
        if mask is not None or not whole:
            real = x.new_ones(1, x.shape[1]) if mask is None else mask.to(x.dtype)
            real = padded(real.view(-1, *shape, 1), size)
        map = padded(x.unflatten(1, shape), size)
        parts = []
        if self.high_heads:
            parts.append(self._high(map, real, size)[:, : shape[0], : shape[1]].flatten(1, 2))
        if self.low_heads:
            parts.append(self._low(x, map, real, size))
        return torch.cat(parts, -1)

    def _high(self, map: Tensor, real: Tensor | None, size: tuple[int, int]) -> Tensor:
        """`(B, H', W', C)` to the high-frequency part of the channels, each window by itself."""
        q, k, v = (split_heads(t, self.high_heads) for t in windows(self.h_qkv(map), size).chunk(3, dim=-1))
        pattern = None
        if real is not None:
            seen = windows(real, size)[..., 0].bool()
            pattern = Padding(seen.repeat(q.shape[0] // seen.shape[0], 1))
        out = attend(q, k, v, pattern=pattern, dropout=self._dropout)
        return self.h_proj(from_windows(out.transpose(1, 2).flatten(2), size, (map.shape[1], map.shape[2])))

    def _low(self, x: Tensor, map: Tensor, real: Tensor | None, size: tuple[int, int]) -> Tensor:
        """`(B, N, C)` to the low-frequency part of the channels, from the means of windows."""
        means, pattern = map, None
        if real is not None:
            share = _means(real, size)
            means = _means(map * real, size) / share.clamp(min=1e-6)
            pattern = Padding(share.flatten(1).bool().expand(x.shape[0], -1))
        elif self.window > 1:
            means = _means(map, size)
        q = split_heads(self.l_q(x), self.low_heads)
        k, v = (split_heads(t, self.low_heads) for t in self.l_kv(means.flatten(1, 2)).chunk(2, dim=-1))
        out = attend(q, k, v, pattern=pattern, dropout=self._dropout)
        return self.l_proj(out.transpose(1, 2).flatten(2))

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0


def _means(x: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, H, W, C)` to the means of windows `(B, H / s, W / s, C)`."""
    return F.avg_pool2d(x.permute(0, 3, 1, 2), size).permute(0, 2, 3, 1)
