"""Sparse attention that looks once and reuses what it found: over diffusion steps, over decoding steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax, wide
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.layers.sparse import Selecting
from zoo.attention.select import attend_blocks, attend_shared, by_rows, select_up_to


class FrozenBlocks(MultiHead, name="sparsed"):
    """SparseD, for diffusion language models: full attention first, then blocks chosen once and kept.

    Attention is full until `freeze`, which looks at the weights of its tokens: for each head and block of
    queries, the `share` of the key blocks with the largest mean weight stay. From then on, tokens of as many
    rows attend to those, until `thaw`. In a model, `freezing` does it for all layers: run the first fifth of
    the steps in full (the paper's `skip`), the last of them in `freezing`.

    Args:
        dim: width of the tokens.
        num_heads: of the queries, each with blocks of its own.
        block_size: tokens per block.
        share: of the key blocks, rounded up.
        options: of `MultiHead`, for its projections and positions.
    """

    supports = Supports(bidirectional=True, padding=True)
    paper = "https://arxiv.org/abs/2509.24014"
    frozen: Tensor | None
    """`(B, H, R, S)`: the key blocks of each block of queries, -1 = none; None = attention is full."""

    def __init__(
        self, dim: int, num_heads: int, *, block_size: int = 128, share: float = 0.3, **options: Any
    ) -> None:
        if refused := options.keys() & {"causal", "context_dim", "dropout", "window"}:
            raise AttentionError(f"{type(self).__name__} takes no {', '.join(sorted(refused))}")
        super().__init__(dim, num_heads, **options)
        if block_size < 1 or not 0 < share <= 1:
            raise AttentionError(
                f"blocks have at least one token, a share lies in (0, 1]: not {block_size}, {share}"
            )
        self.block_size, self.share = block_size, share
        self.prompt: int | None = None  # while freezing
        self.tokens = 0  # of the rows that were frozen
        self.register_buffer("frozen", None, persistent=False)

    def freeze(
        self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, *, prompt: int = 0
    ) -> Tensor:
        """The full pass over tokens `(B, N, dim)`, after which their blocks are kept.

        Args:
            prompt: the first tokens of a row, which do not change: blocks that begin among them and the
                others are chosen apart, the same share of each ("isolated selection").
        """
        with freezing(self, prompt=prompt):
            return self(x, mask=mask, positions=positions)

    def thaw(self) -> None:
        """Back to full attention."""
        self.frozen = None

    def init_cache(self, batch_size: int) -> HeadCache:
        raise AttentionError(
            "all tokens of a diffusion model change at once: there is no cache; see `freeze`"
        )

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if self.prompt is not None:
            weights = block_weights(q, k, self.block_size, mask)
            self.frozen, self.tokens = self._chosen(weights, self.prompt), k.shape[2]
        elif self.frozen is not None:
            if (len(self.frozen), self.tokens) != (len(k), k.shape[2]):
                raise AttentionError(
                    f"blocks were frozen for {len(self.frozen)} rows of {self.tokens}, not for {len(k)} "
                    f"of {k.shape[2]} tokens: call thaw(), or freeze again"
                )
            size = self.block_size
            return attend_shared(q, k, v, self.frozen, rows=size, size=size, causal=False, mask=mask)
        return super().read(q, k, v, mask)

    def _chosen(self, weights: Tensor, prompt: int) -> Tensor:
        blocks = weights.shape[-1]
        first = min(-(-prompt // self.block_size), blocks)
        index = []
        for start, stop in ((0, first), (first, blocks)):
            if start < stop:
                best = select_up_to(weights[..., start:stop], math.ceil(self.share * (stop - start)))
                index.append(torch.where(best < 0, -1, best + start))
        return torch.cat(index, -1)


@contextmanager
def freezing(model: nn.Module, *, prompt: int = 0) -> Iterator[None]:
    """Inside, each `sparsed` layer of a model attends in full, and freezes the blocks that it finds.

    Args:
        prompt: as for `FrozenBlocks.freeze`.

    Example:
        >>> from contextlib import nullcontext
        >>> model, x = nn.Sequential(FrozenBlocks(16, 2, block_size=4)), torch.randn(1, 32, 16)
        >>> for step in range(10):
        ...     with freezing(model) if step == 1 else nullcontext():
        ...         x = x + 0.1 * model(x)  # steps 0 and 1 in full, the others in 3 of 8 blocks
        >>> model[0].frozen.shape
        torch.Size([1, 2, 8, 3])
    """
    layers = [module for module in model.modules() if isinstance(module, FrozenBlocks)]
    if not layers or prompt < 0:
        raise AttentionError("the model has no 'sparsed' layer" if not layers else f"a prompt of {prompt}")
    for layer in layers:
        layer.prompt = prompt
    try:
        yield
    finally:
        for layer in layers:
            layer.prompt = None


def thaw(model: nn.Module) -> None:
    """Back to full attention in each `sparsed` layer of a model."""
    for module in model.modules():
        if isinstance(module, FrozenBlocks):
            module.thaw()


@torch.no_grad()
def block_weights(q: Tensor, k: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """Mean softmax weights `(B, H, R, M)` between blocks of queries and of keys; -inf without a real key.

    Args:
        q: `(B, H, N, D)`.
        k: `(B, Hk, N, D)`.
        size: tokens per block.
        mask: bool `(B, N)`, True = a real token.
    """
    tokens, room = k.shape[2], -k.shape[2] % size
    real = q.new_ones(len(q), tokens, dtype=torch.bool) if mask is None else mask
    blocks = nn.functional.pad(real, (0, room)).unflatten(1, (-1, size))
    counts = blocks.sum(-1)

    def part(q: Tensor, real: Tensor, _seen: int) -> Tensor:
        rows = wide(q).unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
        scores = (rows @ wide(k)[:, :, None].transpose(-2, -1)).flatten(1, 2)
        weights = softmax(scores.masked_fill(~blocks.flatten(1)[:, None, None, :tokens], -torch.inf))[0]
        weights = nn.functional.pad(weights * real, (0, room, 0, -q.shape[2] % size))
        return weights.unflatten(-1, (-1, size)).sum(-1).unflatten(2, (-1, size)).sum(3)

    with torch.autocast(q.device.type, enabled=False):
        step = max(1, 512 // size) * size
        total = by_rows(part, q, real[:, None, :, None], keys=tokens, rows=step, causal=False)
    pairs = (counts[:, :, None] * counts[:, None]).clamp(min=1)
    return (total / pairs[:, None]).masked_fill((counts == 0)[:, None, None], -torch.inf)


class RecycleCache(HeadCache):
    """Keys and values, and the keys that the last full step found `(B, Hk, 1, K)`."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__(layer)
        self.kept: Tensor | None = None
        self.until = 0
        """Tokens that the last full step saw; later ones are all read."""

    def nbytes(self) -> int:
        return super().nbytes() + (0 if self.kept is None else self.kept.nbytes)


class Recycled(Selecting, name="recycled"):
    """Recycled attention: every few decoding steps look at all keys, the others at the best of these.

    A full step keeps, for each key/value head, the keys with the largest weights of its last query, averaged
    over the heads that share them; the following steps read those and the tokens since. A pass over several
    tokens is a full step. Without a cache, and so in training, attention is dense: decoding equals it only
    where `num_kept` is at least the number of tokens, or `stride` is 1.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        num_kept: keys that a full step keeps.
        stride: every so many steps one is full.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2411.05787"

    def __init__(
        self, dim: int, num_heads: int, *, num_kept: int = 1024, stride: int = 16, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if num_kept < 1 or stride < 1:
            raise AttentionError(f"at least one key is kept, for at least one step: not {num_kept}, {stride}")
        self.num_kept, self.stride = num_kept, stride

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        if not isinstance(cache, RecycleCache):
            return self.project(self.read(q, k, v, mask))
        if cache.kept is None or q.shape[2] > 1 or k.shape[2] - cache.until >= self.stride:
            out = self.read(q, k, v, mask)
            cache.kept, cache.until = self._best(q, k, mask), k.shape[2]
            return self.project(out)
        new = torch.arange(cache.until, k.shape[2], device=q.device)
        index = torch.cat([cache.kept, new.expand(*cache.kept.shape[:3], -1)], -1)
        return self.project(attend_blocks(q, k, v, index, mask=mask))

    @torch.no_grad()
    def _best(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Indices `(B, Hk, 1, K)` by the weights of each row's last real query."""
        last = q[:, :, -1:]
        if mask is not None:
            place = torch.arange(q.shape[2], device=q.device)
            at = torch.where(mask[:, -q.shape[2] :], place, -1).amax(-1).clamp(min=0)
            last = q.gather(2, at.view(-1, 1, 1, 1).expand(-1, q.shape[1], -1, q.shape[3]))
        with torch.autocast(q.device.type, enabled=False):
            rows = wide(last[:, :, 0]).unflatten(1, (k.shape[1], -1)) * q.shape[-1] ** -0.5
            scores = rows @ wide(k).transpose(-2, -1)
        hidden = torch.zeros_like(scores, dtype=torch.bool) if mask is None else ~mask[:, None, None]
        weights = softmax(scores.masked_fill(hidden, -torch.inf))[0].mean(2, keepdim=True)
        return select_up_to(weights.masked_fill(hidden[:, :1, :1], -torch.inf), self.num_kept)

    def init_cache(self, batch_size: int) -> RecycleCache:
        return RecycleCache(self)
