"""Sparse attention to clusters of the past: clusters of like keys, chunks of neighbouring tokens."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.kernels import wide
from zoo.attention.kmeans import cluster_means, spherical_kmeans
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.multihead import HeadCache, split_heads
from zoo.attention.layers.sparse import Selecting
from zoo.attention.patterns import Causal, Padding, Pattern
from zoo.attention.select import Standing, attend_blocks, by_rows, select_up_to


class Clusters(NamedTuple):
    """Of the first keys of a cache: C clusters by means of their keys, perhaps with coarser ones above."""

    labels: Tensor  # (B, Hk, M): the cluster of each key
    means: Tensor  # (B, Hk, C, D)
    counts: Tensor  # (B, Hk, C)
    coarse: Tensor  # (B, Hk, C): the coarse cluster of each cluster
    coarse_means: Tensor  # (B, Hk, C', D); C' = 0 without that level
    coarse_counts: Tensor  # (B, Hk, C'), in keys


class SqueezedCache(HeadCache):
    """Keys and values, and the clusters of the first of them."""

    clusters: Clusters | None = None

    def nbytes(self) -> int:
        return super().nbytes() + sum(x.nbytes for x in self.clusters or ())


class Squeezed(Selecting, name="squeezed"):
    """Squeezed attention: of a fixed context, a query reads the clusters of keys that promise some weight.

    Give the context to a cache, then `squeeze(cache)`: from then on a query keeps the clusters i with
    `exp(q.C_i) / sum_j N_j exp(q.C_j)` above the threshold, with mean keys C and sizes N, and attends to
    their keys and to all later tokens by one exact softmax. The products are scaled as scores are. Clusters
    are those of k-means on normalised keys, for each key/value head. Without a squeezed cache, and so in
    training, attention is dense; with threshold 0 it stays so.

    Args:
        dim: width of the tokens.
        num_heads: of the queries; each keeps clusters of its own.
        clusters: their number, as a share of the keys of the context.
        threshold: what a key of a cluster must promise of the whole weight.
        coarse_clusters: the same for a level above, which is looked at first; None = there is none. Clusters
            inside a coarse one that falls below `coarse_threshold` neither stay nor count in the sum.
        coarse_threshold: of that level.
        iterations: of k-means.
        seed: of its first centres.
        options: of `MultiHead`, for its projections and positions.

    Example:
        >>> layer = Squeezed(16, 2)
        >>> cache = layer.init_cache(batch_size=1)
        >>> context = layer.step(torch.randn(1, 200, 16), cache)
        >>> layer.squeeze(cache)
        >>> layer.step(torch.randn(1, 1, 16), cache).shape
        torch.Size([1, 1, 16])
    """

    paper = "https://arxiv.org/abs/2411.09688"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        clusters: float = 0.05,
        threshold: float = 1e-4,
        coarse_clusters: float | None = None,
        coarse_threshold: float = 0.0,
        iterations: int = 10,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if not 0 < clusters <= 1 or not 0 < (coarse_clusters or clusters) <= clusters:
            raise AttentionError(
                f"clusters are a share in (0, 1] of the keys, coarse ones at most as many: not {clusters}, "
                f"{coarse_clusters}"
            )
        if not (0 <= threshold < 1 and 0 <= coarse_threshold < 1) or iterations < 0:
            raise AttentionError(
                f"thresholds lie in [0, 1), and iterations are not negative: not {threshold}, "
                f"{coarse_threshold}, {iterations}"
            )
        self.clusters, self.coarse_clusters = clusters, coarse_clusters
        self.threshold, self.coarse_threshold = threshold, coarse_threshold
        self.iterations, self.seed = iterations, seed

    @torch.no_grad()
    def squeeze(self, cache: SqueezedCache) -> None:
        """Clusters the keys that a cache holds: the fixed context of what follows."""
        if cache.layer is not self or not cache.length:
            raise AttentionError("squeeze a cache of this layer that holds a context")
        keys, _, real = cache.tensors
        mask = real[:, 0, :, 0]
        labels, means, counts = self._clusters(keys, self.clusters, mask)
        coarse = torch.zeros_like(labels[..., : means.shape[2]])
        coarse_means, coarse_counts = means[:, :, :0], counts[..., :0]
        if self.coarse_clusters is not None:
            number = max(1, round(self.coarse_clusters * keys.shape[2]))
            coarse = spherical_kmeans(means, number, iterations=self.iterations, seed=self.seed)
            above = coarse.gather(-1, labels)
            coarse_means, coarse_counts = cluster_means(keys, above, number, mask)
        cache.clusters = Clusters(labels, means, counts, coarse, coarse_means, coarse_counts)

    def _clusters(self, keys: Tensor, share: float, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = max(1, round(share * keys.shape[2]))
        labels = spherical_kmeans(keys, number, mask=mask, iterations=self.iterations, seed=self.seed)
        return labels, *cluster_means(keys, labels, number, mask)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        if not isinstance(cache, SqueezedCache) or cache.clusters is None:
            return self.project(self.read(q, k, v, mask))
        found = cache.clusters

        def part(q: Tensor, seen: int) -> Tensor:
            real = None if mask is None else mask[:, :seen]
            return self._kept(q, k[:, :, :seen], v[:, :, :seen], real, found)

        return self.project(by_rows(part, q, keys=k.shape[2]))

    def _kept(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, found: Clusters) -> Tensor:
        fixed, kept = found.labels.shape[-1], self._keys(q, found)
        if q.shape[2] < 16:  # decoding: only what is kept is read
            number = max(1, int(kept.sum(-1).amax()))
            index = select_up_to(torch.where(kept, 0.0, -torch.inf), number)
            later = torch.arange(fixed, k.shape[2], device=q.device).expand(*index.shape[:3], -1)
            return attend_blocks(q, k, v, torch.cat([index, later], -1), mask=mask)
        bias = q.new_zeros(kept.shape).masked_fill(~kept, -torch.inf)
        pattern: Pattern = Causal() if mask is None else Causal() & Padding(mask)
        return attend(q, k, v, pattern=pattern, bias=F.pad(bias, (0, k.shape[2] - fixed)))

    @torch.no_grad()
    def _keys(self, q: Tensor, found: Clusters) -> Tensor:
        """Bool `(B, H, n, M)`: the keys of the context that are kept."""
        counts = found.counts[:, :, None, None]
        if found.coarse_means.shape[2]:
            coarse = _promising(
                q, found.coarse_means, found.coarse_counts[:, :, None, None], self.coarse_threshold
            )
            member = found.coarse[:, :, None, None].expand(*coarse.shape[:4], -1)
            counts = counts * coarse.gather(-1, member)
        clusters = _promising(q, found.means, counts, self.threshold)
        labels = found.labels[:, :, None, None].expand(*clusters.shape[:4], -1)
        return clusters.gather(-1, labels).flatten(1, 2)

    def init_cache(self, batch_size: int) -> SqueezedCache:
        return SqueezedCache(self)


def _promising(q: Tensor, means: Tensor, counts: Tensor, threshold: float) -> Tensor:
    """Bool `(B, Hk, G, n, C)`: clusters above the threshold; counts broadcast to that, 0 = none."""
    with torch.autocast(q.device.type, enabled=False):
        rows = wide(q).unflatten(1, (means.shape[1], -1)) * q.shape[-1] ** -0.5
        scores = rows @ wide(means)[:, :, None].transpose(-2, -1)
        total = (scores + counts.log()).logsumexp(-1, keepdim=True)
        return (scores - total > (math.log(threshold) if threshold else -torch.inf)) & (counts > 0)


class Uniform(nn.Module):
    """Chunks of `size` tokens."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise AttentionError(f"a chunk has at least one token, not {size}")
        self.size = size

    def forward(self, values: Tensor) -> Tensor:
        """Bool `(1, N)`: tokens that begin a chunk, of values `(B, N, C)`."""
        return (torch.arange(values.shape[1], device=values.device) % self.size == 0)[None]

    def most(self, tokens: int) -> int:
        """Chunks that so many tokens form at most."""
        return -(-tokens // self.size)


class Boundaries(nn.Module):
    """A small net that says where a chunk begins, from a token and the mean of those before it.

    It reads `[l, r, l - r, l * r, cos(l, r)]`, r of the token and l the mean of `window` tokens before; the
    paper's predictor has a window on the right as well, and so looks ahead. What it decides has no gradient:
    train it by `loss` against boundaries of one's own.

    Args:
        width: of the values of a token, all heads.
        window: tokens.
        hidden: width of its hidden layer.
    """

    def __init__(self, width: int, window: int = 4, hidden: int = 64) -> None:
        super().__init__()
        self.window = window
        self.net = nn.Sequential(nn.Linear(4 * width + 1, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def logits(self, values: Tensor) -> Tensor:
        """`(B, N)` of values `(B, N, C)`."""
        before = F.pad(values.transpose(1, 2), (self.window, 0))[..., :-1]
        left = F.avg_pool1d(before, self.window, 1).transpose(1, 2)
        alike = F.cosine_similarity(left, values, dim=-1)[..., None]
        return self.net(torch.cat([left, values, left - values, left * values, alike], -1))[..., 0]

    def loss(self, values: Tensor, begins: Tensor) -> Tensor:
        """Cross-entropy against bool `(B, N)`: tokens that begin a chunk."""
        logits = self.logits(values.detach())
        return F.binary_cross_entropy_with_logits(logits, begins.to(logits.dtype))

    @torch.no_grad()
    def forward(self, values: Tensor) -> Tensor:
        """Bool `(B, N)`: tokens that begin a chunk, of values `(B, N, C)`."""
        return self.logits(values) > 0

    def most(self, tokens: int) -> int:
        """Chunks that so many tokens form at most."""
        return tokens


class HierarchicalSparse(Selecting, name="dhsa"):
    """Dynamic hierarchical sparse attention (DHSA): keys are selected by the chunk that they stand in.

    A chunk is the sum of its keys over the root of its size. Its product with a query is the score of all its
    tokens; a query reads the `num_selected` best, after the first `num_global` and last `num_local` ones
    (equal scores: earlier tokens first). In one pass over a prompt, the last `num_instruction` queries see
    all. The query's own chunk is known up to the query. So the selection is causal; the published one pools
    the queries of a chunk too, and its keys to the end: later tokens then decide which keys an earlier one
    reads (`pooled_queries`).

    Args:
        dim: width of the tokens.
        num_heads: of the queries; each selects for itself.
        num_selected: keys that a query reads.
        num_global: of these, the first of the row.
        num_local: of these, the last up to the query.
        num_instruction: last queries of a row that are dense, where no cache came before; decoding equals the
            full pass with 0 only.
        chunks: "uniform", or "learned" by `Boundaries`; a module that maps values `(B, N, C)` to bool
            `(B, N)`, with `most(tokens)` chunks, may take the place of `layer.boundaries`.
        chunk_size: of uniform chunks.
        pooled_queries: the published selection; it does not decode.
        options: of `MultiHead`, for its projections and positions.
    """

    paper = "https://arxiv.org/abs/2510.24606"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_selected: int = 1024,
        num_global: int = 128,
        num_local: int = 128,
        num_instruction: int = 64,
        chunks: Literal["uniform", "learned"] = "uniform",
        chunk_size: int = 64,
        pooled_queries: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if min(num_global, num_instruction) < 0 or num_local < 1 or num_selected < num_global + num_local:
            raise AttentionError(
                "the query itself is local, and the keys selected hold the global and the local ones: not "
                f"num_selected = {num_selected}, num_global = {num_global}, num_local = {num_local}, "
                f"num_instruction = {num_instruction}"
            )
        if chunks not in ("uniform", "learned"):
            raise AttentionError(f"chunks are 'uniform' or 'learned', not {chunks!r}")
        self.num_selected, self.num_global, self.num_local = num_selected, num_global, num_local
        self.num_instruction, self.pooled_queries = num_instruction, pooled_queries
        width = self.num_kv_heads * self.head_dim
        self.boundaries = Uniform(chunk_size) if chunks == "uniform" else Boundaries(width)

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        fresh = cache is None or not cache.length
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        out = attend_blocks(q, k, v, self.select(q, k, v, mask), mask=mask)
        if fresh and self.num_instruction:
            out = self._with_instruction(out, q, k, v, mask)
        return self.project(out)

    @torch.no_grad()
    def select(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Keys `(B, H, Nq, S)` that queries `(B, H, Nq, D)` read, of keys and values `(B, Hk, Nk, D)`."""
        values = v if mask is None else v * mask[:, None, :, None]
        begins = self.boundaries(values.transpose(1, 2).flatten(2))
        chunk = F.pad(begins[:, 1:], (1, 0)).cumsum(-1).expand(len(k), -1)
        first = self._first(chunk)
        pools = _pooled(k, first, mask)  # of each token's chunk up to itself
        last = torch.zeros_like(chunk[:, :1]).expand(-1, self.boundaries.most(k.shape[2]))
        last = last.scatter_reduce(
            1, chunk, torch.arange(k.shape[2], device=k.device).expand_as(chunk), "amax"
        )
        means = _at(pools, last)
        if self.pooled_queries:
            q, pools = (_at(x, last.gather(1, chunk)) for x in (_pooled(q, first, mask), pools))
        keys, number = k.shape[2], min(self.num_selected, k.shape[2])
        heads = (k.shape[1], q.shape[1] // k.shape[1])
        own = (wide(q).unflatten(1, heads) * pools[:, :, None, -q.shape[2] :]).sum(-1).flatten(1, 2)

        def part(q: Tensor, own: Tensor, seen: int) -> Tensor:
            place, token = torch.arange(seen, device=q.device), chunk[:, :seen]
            query = place[-q.shape[2] :, None]
            scores = (wide(q).unflatten(1, heads) @ means[:, :, None].transpose(-2, -1)).flatten(1, 2)
            scores = scores.gather(-1, token[:, None, None].expand(*scores.shape[:3], -1))
            same = token[:, None, -q.shape[2] :, None] == token[:, None, None]
            scores = torch.where(same, own[..., None], scores)
            hidden = place > query
            hidden = hidden if mask is None else hidden | ~mask[:, None, None, :seen]
            forced = ((place < self.num_global) | (place > query - self.num_local)) & ~hidden
            return select_up_to(scores.masked_fill(hidden, -torch.inf), number, forced)

        with torch.autocast(q.device.type, enabled=False):
            return by_rows(part, q, own, keys=keys)

    @staticmethod
    def _first(chunk: Tensor) -> Tensor:
        """`(B, N)`: where the chunk of each token begins."""
        begins = F.pad(chunk.diff(dim=-1) > 0, (1, 0))
        place = torch.arange(chunk.shape[1], device=chunk.device)
        return torch.where(begins, place, 0).cummax(-1).values

    def _with_instruction(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Outputs `(B, H, N, D)`, those of the last real queries dense."""
        place = torch.arange(q.shape[2], device=q.device).expand(len(q), -1)
        keys = place if mask is None else place.masked_fill(~mask, -1)
        at = keys.topk(min(self.num_instruction, q.shape[2]), dim=-1)
        pattern = Standing(at.values, keys)
        rows = at.indices[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        dense = attend(q.gather(2, rows), k, v, pattern=pattern)
        return out.scatter(2, rows, dense.to(out.dtype))

    def init_cache(self, batch_size: int) -> HeadCache:
        if self.pooled_queries:
            raise AttentionError("queries pooled by chunks know later ones: decode with pooled_queries=False")
        return super().init_cache(batch_size)


def _pooled(x: Tensor, first: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, H, N, D)`: sums from `first` `(B, N)` to each token, over the root of how many are real."""
    real = first.new_ones(first.shape) if mask is None else mask.to(first.dtype)
    total = F.pad((x.double() * real[:, None, :, None]).cumsum(2), (0, 0, 1, 0))
    count = F.pad(real.cumsum(1), (1, 0))
    number = (count[:, 1:] - count.gather(1, first)).clamp(min=1)
    sums = total[:, :, 1:] - _at(total, first)
    return (sums / number.double().sqrt()[:, None, :, None]).to(wide(x).dtype)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x `(B, H, N, D)` at `index` `(B, n)`."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
