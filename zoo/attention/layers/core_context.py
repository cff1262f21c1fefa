"""Core context aware attention: far tokens by groups, near ones each for itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.cache import KVCache, default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs
from zoo.attention.layers.multihead import WindowCache, split_heads
from zoo.attention.layers.sparse import PastBlocks, Selecting
from zoo.attention.layers.window import Reach
from zoo.attention.merge import merge
from zoo.attention.patterns import Padding, Pattern, Rule
from zoo.attention.select import by_rows


class AfterCores(Pattern):
    """Keys that no core token stands for: those from the first group on that is not `window` tokens away.

    The last of Nq queries is token `tokens - 1`, and stands at the last key.
    """

    def __init__(self, size: int, window: int, tokens: int) -> None:
        self.size, self.window, self.tokens = size, window, tokens

    def rule(self, nq: int, nk: int) -> Rule:
        place, key = self.tokens - nq, self.tokens - nk
        size, window = self.size, self.window
        return lambda b, h, i, j: j + key >= (i + (place + 1 - window)) // size * size

    def __repr__(self) -> str:
        return f"AfterCores({self.size}, {self.window}, tokens={self.tokens})"


class CoreCache(WindowCache):
    """Core tokens of each query head, and the keys, values and queries of the tokens of the window."""

    def __init__(self, layer: AttentionLayer, size: int) -> None:
        super().__init__(layer, size)
        self.cores = KVCache(layer)

    def nbytes(self) -> int:
        return super().nbytes() + self.cores.nbytes()


class CoreContext(Selecting, name="core_context"):
    """Core context aware attention (Chen et al. 2025, CCA-Attention): core tokens and near ones, one softmax.

    A group of g tokens becomes one core token: keys and values weighted by the softmax of the scores that the
    group's last query gives its keys. The query at t (from 1) sees the core tokens of the first
    `floor((t - window) / g)` groups, and each token after them: at least `window`, none twice. There are no
    parameters for it. Each query head has core tokens of its own, made of keys that are turned already.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        group_size: g.
        window: keys that a query sees each for itself, its own included; up to g - 1 more.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2412.12465"

    def __init__(
        self, dim: int, num_heads: int, *, group_size: int = 16, window: int = 1024, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if group_size < 1 or window < 1:
            raise AttentionError(
                f"a group has at least one token, a window the query's own: not {group_size}, {window}"
            )
        self.group_size, self.local_window = group_size, window

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        positions = default_positions(x, cache) if positions is None else positions
        q, (k, v), mask = self.heads(q, x, context, mask, positions, None)
        if cache is None:
            return self.project(self._read(q, k, v, mask, self._cores(q, k, v, mask), k.shape[2]))
        assert isinstance(cache, CoreCache)
        return self.project(self._step(q, k, v, mask, cache))

    def _step(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: CoreCache) -> Tensor:
        (k, v, queries), mask = cache.extend((k, v, q), mask)
        held, done = cache.length - k.shape[2], cache.cores.length * self.group_size
        ready = cache.length // self.group_size * self.group_size
        if ready > done:
            part = slice(done - held, ready - held)
            real = None if mask is None else mask[:, part]
            group = self._cores(queries[:, :, part], k[:, :, part], v[:, :, part], real)
            cache.cores.append(*group)
        return self._read(q, k, v, mask, cache.cores.tensors, cache.length)

    def _cores(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values `(B, H, M, D)` of M = N // g core tokens, and bool `(B, 1, M, 1)`: which are real.

        The last query of a group is its last real one; a group without real tokens is none.
        """
        size, number = self.group_size, q.shape[2] // self.group_size
        if not number:
            return ()
        q, k, v = (x[:, :, : number * size].unflatten(2, (number, size)) for x in (q, k, v))
        real = q.new_ones(len(q), number, size, dtype=torch.bool)
        if mask is not None:
            real = mask[:, : number * size].unflatten(1, (number, size))
        place = torch.arange(size, device=q.device)
        at = torch.where(real, place, -1).amax(-1).clamp(min=0)[:, None, :, None, None]
        last = q.gather(3, at.expand(-1, q.shape[1], -1, -1, q.shape[-1]))
        last, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (last, k, torch.cat([k, v], -1)))
        pooled = attend(last, keys, values, pattern=Padding(real.flatten(0, 1)))
        pooled = pooled[:, :, 0].unflatten(0, (-1, number)).transpose(1, 2)
        return *pooled.split(k.shape[-1], -1), real.any(-1)[:, None, :, None]

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        cores: tuple[Tensor, ...],
        tokens: int,
    ) -> Tensor:
        """What the last queries of `tokens` tokens see, of which keys and values are the last ones too."""
        size, window = self.group_size, self.local_window
        near: Pattern = Reach(min(window + size - 1, k.shape[2]), causal=True)
        near = near & AfterCores(size, window, tokens)
        near = near if mask is None else near & Padding(mask)
        if tokens < window + size:
            return attend(q, k, v, pattern=near)
        keys, values, real = cores

        def far(q: Tensor, seen: int) -> Tensor:
            number = max(1, (seen - window) // size)
            pattern = PastBlocks(size, seen - window) & Padding(real[:, 0, :number, 0])
            out, lse = attend(q, keys[:, :, :number], values[:, :, :number], pattern=pattern, return_lse=True)
            return torch.cat([out.to(lse.dtype), lse[..., None]], -1)

        out, lse = by_rows(far, q, keys=tokens).split([v.shape[-1], 1], -1)
        return merge((out.to(v.dtype), lse[..., 0]), attend(q, k, v, pattern=near, return_lse=True))[0]

    def init_cache(self, batch_size: int) -> CoreCache:
        return CoreCache(self, self.local_window + self.group_size - 1)
