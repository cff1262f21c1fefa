"""Linear attention whose feature maps are learned, so that it can take over the work of softmax."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from zoo.attention.cache import default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import Inputs, Supports
from zoo.attention.layers.hybrid import LearnedFeatures
from zoo.attention.layers.linear import RecurrentLayer, StateCache, both_ways, wide
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.scan import scan_mean


class Hedgehog(MultiHead, RecurrentLayer, name="hedgehog"):
    """`phi_q(q) . phi_k(k)` in place of softmax's exponent, `phi(x) = [softmax(x W), softmax(-x W)]`.

    Projections, norms and rotary positions are those of `MultiHead`, so that the layer can start from one.
    The feature maps, one of queries and one of keys per query head, are then trained to give its outputs
    (LoLCATs, arXiv 2410.10254, section 3.1).

    Args:
        dim: C.
        num_heads: H.
        features: F; a head has 2 F features. By default the head width D.
        eps: added to the sum of weights.
        options: of `MultiHead`, but no window.
    """

    paper = "https://arxiv.org/abs/2402.04347"
    supports = Supports(
        bidirectional=True, causal=True, cross=True, padding=True, packed=True, cache=True, maps=False
    )

    def __init__(
        self, dim: int, num_heads: int, *, features: int | None = None, eps: float = 1e-12, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if self.window is not None:
            raise AttentionError(
                "hedgehog sees all earlier tokens: for a window beside linear attention take lolcats"
            )
        if self.dropout:
            raise AttentionError("hedgehog has no weights of pairs to drop: dropout=0")
        self.features, self.eps = self.head_dim if features is None else features, eps
        if self.features < 1:
            raise AttentionError(f"a feature map has at least one feature, not {features}")
        self.feature_map_q, self.feature_map_k = (
            LearnedFeatures(num_heads, self.head_dim, self.features) for _ in range(2)
        )

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        places = default_positions(x, cache) if positions is None else positions
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), _ = self.heads(q, x, context, mask, places, None)
        q, k = self.feature_map_q(wide(q)), self.feature_map_k(wide(k))
        v = v.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        run = partial(scan_mean, scale=1.0, eps=self.eps) if self.causal else partial(both_ways, eps=self.eps)
        return self.project(self._run(run, q, k, v, mask, cache))

    def init_cache(self, batch_size: int) -> StateCache:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self.causal:
            raise AttentionError("hedgehog with causal=False sees later tokens: it has no cache")
        return StateCache(self)
