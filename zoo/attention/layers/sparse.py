"""Sparse attention by selection: native sparse, mixture of blocks, lightning-indexed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import KVCache, default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import softmax, wide
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.patterns import Padding, Pattern, Rule
from zoo.attention.rotary import rotary, rotary_tables
from zoo.attention.select import attend_blocks, block_means, by_rows, listed, select_up_to

Means = tuple[Tensor, Tensor]  # of keys and values, (B, Hk, ceil(N / size), D)


class PastBlocks(Pattern):
    """Keys stand for blocks of `size` tokens; a query sees the blocks that lie wholly in its past.

    A block that ends with the query's own token is past. The last query is token `tokens - 1`.
    """

    def __init__(self, size: int, tokens: int) -> None:
        self.size, self.tokens = size, tokens

    def rule(self, nq: int, nk: int) -> Rule:
        offset = self.tokens - nq
        return lambda b, h, i, j: (j + 1) * self.size - 1 <= i + offset

    def __repr__(self) -> str:
        return f"PastBlocks({self.size}, tokens={self.tokens})"


class SparseBranches(NamedTuple):
    """Outputs `(B, H, N, Dv)` of the branches of native sparse attention, and what the second selected."""

    compressed: Tensor
    selected: Tensor
    index: Tensor  # (B, Hk, N, S)


def native_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    mask: Tensor | None = None,
    means: Means | None = None,
) -> SparseBranches:
    """The compressed and the selected branch of NSA (arXiv 2502.11089, equations 7 to 12), causal.

    Compression is the mean of a block; selection takes its weights, averaged over the query heads of a
    key/value head, after the first block, the query's own and the one before it.

    Args:
        q: `(B, H, Nq, D)`; the last query stands at the last key.
        k, v: `(B, Hk, Nk, D)`.
        block_size: tokens per block.
        num_selected: blocks that a query reads.
        mask: bool `(B, Nk)`, True = a real key.
        means: of the blocks of k and v, where they are known.
    """
    keys, values = means or (block_means(k, block_size, mask), block_means(v, block_size, mask))
    blocks = _Blocks(keys, block_size, k.shape[2], mask)
    index = blocks.select(
        q,
        num_selected,
        forced=lambda block, own: (block == 0) | (block == own) | (block == own - 1),
        weigh=lambda scores: softmax(scores)[0].mean(2),
    )
    selected = attend_blocks(q, k, v, index, block_size, mask=mask)
    return SparseBranches(blocks.attend(q, values), selected, index)


def block_mixture(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    num_selected: int,
    mask: Tensor | None = None,
    means: Means | None = None,
) -> Tensor:
    """MoBA (arXiv 2502.13189, equations 2 to 6), causal: one softmax over the tokens of the selected blocks.

    Each query head selects its own block, and the past ones with the largest `q . mean(keys)`. The choice
    has no gradient. The arguments are those of `native_sparse`.
    """
    keys = block_means(k, block_size, mask) if means is None else means[0]
    index = _Blocks(keys, block_size, k.shape[2], mask).select(
        q,
        num_selected,
        forced=lambda block, own: block == own,
        weigh=lambda scores: scores.flatten(1, 2),
    )
    return attend_blocks(q, k, v, index, block_size, mask=mask)


class _Blocks:
    """Blocks of `size` keys by their means `(B, Hk, M, D)`; a block without real tokens is not seen."""

    def __init__(self, means: Tensor, size: int, tokens: int, mask: Tensor | None) -> None:
        self.means, self.size, self.tokens = means, size, tokens
        self.real = (
            None if mask is None else F.pad(mask, (0, -tokens % size)).unflatten(1, (-1, size)).any(-1)
        )

    def pattern(self, seen: int) -> Pattern:
        """What queries see of the first blocks, the last one standing at token `seen - 1`."""
        past = PastBlocks(self.size, seen)
        return past if self.real is None else past & Padding(self.real[:, : -(-seen // self.size)])

    def attend(self, q: Tensor, values: Tensor) -> Tensor:
        """Attention to the past blocks `(B, H, N, Dv)`."""

        def part(q: Tensor, seen: int) -> Tensor:
            number = -(-seen // self.size)
            return attend(q, self.means[:, :, :number], values[:, :, :number], pattern=self.pattern(seen))

        return by_rows(part, q, keys=self.tokens)

    def select(
        self,
        q: Tensor,
        number: int,
        forced: Callable[[Tensor, Tensor], Tensor],
        weigh: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Indices `(B, I, N, S)` of the past blocks that score best, after those that are forced.

        Args:
            q: `(B, H, N, D)`.
            number: S, unless there are fewer blocks.
            forced: of all blocks `(M,)` and the own of each query `(N, 1)`.
            weigh: scores `(B, Hk, H / Hk, N, M)` to what is compared, `(B, I, N, M)`.
        """
        number = min(number, self.means.shape[2])
        keys = wide(self.means)[:, :, None]

        def part(q: Tensor, seen: int) -> Tensor:
            block = torch.arange(-(-seen // self.size), device=q.device)
            own = torch.arange(seen - q.shape[2], seen, device=q.device)[:, None] // self.size
            visible = self.pattern(seen).mask(len(q), q.shape[2], len(block), q.device)
            assert visible is not None
            rows = wide(q).unflatten(1, (keys.shape[1], -1)) * q.shape[-1] ** -0.5
            scores = rows @ keys[..., : len(block), :].transpose(-2, -1)
            best = weigh(scores.masked_fill(~visible[:, :, None], -torch.inf))
            return select_up_to(best.masked_fill(~visible, -torch.inf), number, forced(block, own))

        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return by_rows(part, q, keys=self.tokens)


def index_scores(q: Tensor, k: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal scores of the lightning indexer: `I_ts = sum_h w_th relu(q_th . k_s / sqrt D)`.

    DeepSeek-V3.2 (arXiv 2512.02556), equation 1.

    Args:
        q: `(B, Hi, n, Di)`; the last query stands at the last key.
        k: `(B, 1, M, Di)`.
        weights: `(B, Hi, n)`.
        mask: bool `(B, M)`, True = a real key.

    Returns:
        `(B, 1, n, M)` in float32 or wider, -inf where a query may not look.
    """
    (n, width), keys = q.shape[2:], k.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        products = (wide(q) * width**-0.5) @ wide(k).transpose(-2, -1)
        scores = (products.relu() * wide(weights)[..., None]).sum(1, keepdim=True)
    later = torch.ones(n, keys, dtype=torch.bool, device=q.device).triu(keys - n + 1)
    hidden = later if mask is None else later | ~mask[:, None, None]
    return scores.masked_fill(hidden, -torch.inf)


@torch.no_grad()
def lightning_index(q: Tensor, k: Tensor, weights: Tensor, number: int, mask: Tensor | None = None) -> Tensor:
    """The tokens that DeepSeek sparse attention selects (equation 2): those with the largest `index_scores`.

    Returns:
        Indices `(B, 1, Nq, S)` with S = min(number, Nk).
    """
    number = min(number, k.shape[2])

    def part(q: Tensor, weights: Tensor, seen: int) -> Tensor:
        return select_up_to(index_scores(q, k[:, :, :seen], weights, _first(mask, seen)), number)

    return by_rows(part, q, weights, keys=k.shape[2])


def _first(mask: Tensor | None, seen: int) -> Tensor | None:
    return None if mask is None else mask[:, :seen]


class BlockCache(HeadCache):
    """Keys and values, and the means of the blocks that are complete."""

    def __init__(self, layer: AttentionLayer, size: int) -> None:
        super().__init__(layer)
        self.size = size
        self._finished = KVCache(layer)

    def means(self) -> Means:
        """Block means of keys and values; that of a block not yet complete is 0."""
        keys, values, real = self.tensors
        done, ready = self._finished.length * self.size, self.length // self.size * self.size
        if ready > done or not self._finished.tensors:
            mask = real[:, 0, done:ready, 0]
            self._finished.append(
                *(block_means(x[..., done:ready, :], self.size, mask) for x in (keys, values))
            )
        known, known_values = self._finished.tensors
        room = -(-self.length // self.size) - known.shape[-2]
        return F.pad(known, (0, 0, 0, room)), F.pad(known_values, (0, 0, 0, room))

    def nbytes(self) -> int:
        return super().nbytes() + self._finished.nbytes()


class Selecting(MultiHead):
    """Causal multi-head attention to keys that are selected."""

    supports = Supports(causal=True, padding=True, cache=True)

    def __init__(
        self, dim: int, num_heads: int, *, rope_theta: float | None = 10_000.0, **options: Any
    ) -> None:
        if refused := options.keys() & {"causal", "context_dim", "dropout", "window"}:
            raise AttentionError(f"{type(self).__name__} takes no {', '.join(sorted(refused))}")
        super().__init__(dim, num_heads, causal=True, rope_theta=rope_theta, **options)


class _Blockwise(Selecting):
    """Layers that select blocks. Blocks are counted from the start of a row."""

    def __init__(
        self, dim: int, num_heads: int, *, block_size: int = 64, num_selected: int = 16, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if block_size < 1 or num_selected < 1:
            raise AttentionError(
                f"blocks have at least one token, and one is selected: not {block_size}, {num_selected}"
            )
        self.block_size, self.num_selected = block_size, num_selected

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        means = cache.means() if isinstance(cache, BlockCache) else None
        return self.project(self.among(x, q, k, v, mask, means))

    def among(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, means: Means | None
    ) -> Tensor:
        """`(B, H, N, D)` of tokens x `(B, N, C)` with queries q, among keys, values and their block means."""
        raise NotImplementedError

    def init_cache(self, batch_size: int) -> BlockCache:
        return BlockCache(self, self.block_size)


class NativeSparse(_Blockwise, name="nsa"):
    """Native sparse attention: block means, selected blocks and a sliding window, added by learned gates.

    `o = sum_c sigmoid(x W_c) o_c` (equation 5), c of the three. They share keys and values, as in
    flash-linear-attention, whose parameter names these are.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        block_size: tokens per block.
        num_selected: blocks that a query reads, the first, its own and the one before it included.
        window: keys of the sliding window, the query's own included.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2502.11089"

    def __init__(self, dim: int, num_heads: int, *, window: int = 512, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if window < 1:
            raise AttentionError(f"a window holds at least one key, not {window}")
        self.window = window
        self.g_proj = nn.Linear(dim, 3 * num_heads, bias=False)

    def among(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, means: Means | None
    ) -> Tensor:
        compressed, selected, _ = native_sparse(
            q, k, v, block_size=self.block_size, num_selected=self.num_selected, mask=mask, means=means
        )
        windowed = self.read(q, k, v, mask)
        gates = split_heads(self.g_proj(x).sigmoid(), self.num_heads).split(1, -1)
        return gates[0] * compressed + gates[1] * selected + gates[2] * windowed


class BlockMixture(_Blockwise, name="moba"):
    """Mixture of block attention: each query head attends to its own block and to the past ones it prefers.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        block_size: tokens per block.
        num_selected: blocks that a query reads, its own included.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2502.13189"

    def among(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, means: Means | None
    ) -> Tensor:
        return block_mixture(
            q, k, v, block_size=self.block_size, num_selected=self.num_selected, mask=mask, means=means
        )


class Indexer(nn.Module):
    """Few narrow query heads `(B, Hi, N, Di)`, the key `(B, 1, N, Di)` that they share, and their weights."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, rope_theta: float | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rope_theta = num_heads, head_dim, rope_theta
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, head_dim, bias=False)
        self.weights_proj = nn.Linear(dim, num_heads, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = split_heads(self.q_proj(x), self.num_heads), self.k_proj(x)[:, None]
        if self.rope_theta is not None:
            cos, sin = rotary_tables(positions, self.head_dim, theta=self.rope_theta)
            tables = (cos, sin) if positions.ndim == 1 else (cos[:, None], sin[:, None])
            q, k = rotary(q, *tables), rotary(k, *tables)
        return q, k, self.weights_proj(x).transpose(1, 2)


class LightningIndexed(Selecting, name="dsa"):
    """DeepSeek sparse attention: an indexer selects the tokens that all heads of a query attend to.

    The selection passes no gradient, so the loss of a model does not reach the indexer: `indexer_loss`, which
    is `aux_loss`, trains it.

    Args:
        dim: width of the tokens.
        num_heads: of the queries.
        num_selected: tokens that a query reads.
        index_heads: of the indexer.
        index_dim: width of its heads.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2512.02556"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_selected: int = 2048,
        index_heads: int = 4,
        index_dim: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if num_selected < 1 or index_heads < 1:
            raise AttentionError(
                f"at least one token is selected, by at least one head: not {num_selected}, {index_heads}"
            )
        if self.rope_theta is not None and index_dim % 2:
            raise AttentionError(f"rotary positions need an even width of the indexer, not {index_dim}")
        self.num_selected = num_selected
        self.indexer = Indexer(dim, index_heads, index_dim, self.rope_theta)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        places = default_positions(x, cache) if positions is None else positions
        q_index, k_index, weights = self.indexer(x, places)
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v, k_index), mask = self.heads(q, x, context, mask, places, cache, k_index)
        if self.training and cache is None:
            self.aux_loss = self.indexer_loss(x, mask, positions)
        index = lightning_index(q_index, k_index, weights, self.num_selected, mask)
        return self.project(attend_blocks(q, k, v, index, mask=mask))

    def indexer_loss(self, x: Tensor, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """KL divergence of the indexer's softmax from the attention over the tokens selected (equation 4).

        The attention is the mean over the heads. Only the indexer gets a gradient. Mean over the tokens of x
        `(B, N, dim)`, where mask `(B, N)` is True.
        """
        places = default_positions(x, None) if positions is None else positions
        with torch.no_grad():
            q = split_heads(self.q_proj(x), self.num_heads)
            q, (k, _), _ = self.heads(q, x, None, None, places, None)
        q_index, k_index, weights = self.indexer(x.detach(), places)

        def part(q: Tensor, q_index: Tensor, weights: Tensor, seen: int) -> Tensor:
            scores = index_scores(q_index, k_index[:, :, :seen], weights, _first(mask, seen))
            chosen = listed(select_up_to(scores.detach(), min(self.num_selected, seen)), seen)
            scores = scores.masked_fill(~chosen, -torch.inf)
            guess = (scores - softmax(scores)[1][..., None]).masked_fill(~chosen, 0.0)
            rows = wide(q).unflatten(1, (self.num_kv_heads, -1)) * self.head_dim**-0.5
            products = rows @ wide(k)[:, :, None, :seen].transpose(-2, -1)
            target = softmax(products.masked_fill(~chosen[:, :, None], -torch.inf))[0].mean((1, 2))
            return F.kl_div(guess[:, 0], target, reduction="none").sum(-1)[:, None]

        with torch.autocast(x.device.type, enabled=False):
            loss = by_rows(part, q, q_index, weights, keys=x.shape[1])[:, 0]
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum().clamp(min=1)
