"""Linear attention whose weights fall off with distance as a cosine."""

from __future__ import annotations

from math import pi

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.cache import default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import wide
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.linear import LinearAttention, StateCache


class CosFormer(LinearAttention, name="cosformer"):
    """Weights `relu(q_i) . relu(k_j) cos(pi (i - j) / 2 M)` (Qin et al. 2022, cosFormer).

    The cosine of a difference is `cos cos + sin sin`: twice as many features, and no tokens are paired.

    Args:
        dim: width of the tokens, divisible by `num_heads`.
        num_heads: H.
        max_length: M, at least the number of tokens; by default that of the queries or of the keys, whichever
            is larger, for each row without its padding. Decoding and packed documents need it.
        causal: tokens see earlier ones only; otherwise all.
        eps: the least sum of weights that is divided by.
        bias: of the four projections.
    """

    paper = "https://arxiv.org/abs/2202.08791"
    scale = 1.0
    floor = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None = None,
        causal: bool = True,
        eps: float = 1e-6,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, eps=eps, bias=bias)
        if max_length is not None and max_length < 1:
            raise AttentionError(f"max_length is at least one token, not {max_length}")
        self.max_length = max_length

    def features(self, q: Tensor, k: Tensor, given: Inputs) -> tuple[Tensor, Tensor]:
        """`(B, H, N, 2 D)` each."""
        x, context, mask = given.x, given.context, given.mask
        at = default_positions(x, given.cache) if given.positions is None else given.positions
        at = at.expand(len(x), -1) + 1
        other = at if context is None else default_positions(context, None).expand(len(x), -1) + 1
        length = self._length(at, other, mask)
        return _turned(q, at, length), _turned(k, other, length)

    def _length(self, at: Tensor, other: Tensor, mask: Tensor | None) -> Tensor | int:
        """M of each row, `(B, 1)`, from the places `(B, N)` of queries and `(B, M)` of keys."""
        if self.max_length is not None:
            if not torch.compiler.is_compiling() and int(max(at.amax(), other.amax())) > self.max_length:
                raise AttentionError(
                    f"tokens stand beyond max_length={self.max_length}, where weights would turn negative: "
                    "build the layer with a larger one"
                )
            return self.max_length
        if mask is not None and mask.dtype != torch.bool:
            raise AttentionError("packed documents need max_length, at least the length of the longest")
        last = (other if mask is None else other.masked_fill(~mask, 1)).amax(1, keepdim=True)
        return last if other is at else torch.maximum(last, at.amax(1, keepdim=True))

    def init_cache(self, batch_size: int) -> StateCache:
        if self.max_length is None:
            raise AttentionError("decoding needs max_length: the weights depend on how long a row can become")
        return super().init_cache(batch_size)


def _turned(x: Tensor, at: Tensor, length: Tensor | int) -> Tensor:
    """`[relu(x) sin(pi t / 2 M), relu(x) cos(pi t / 2 M)]` of x `(B, H, N, D)` at t `(B, N)`, M `(B, 1)`."""
    x = F.relu(wide(x))
    angle = (pi / 2 * at.to(x.dtype) / length)[:, None, :, None]
    return torch.cat([x * angle.sin(), x * angle.cos()], dim=-1)
