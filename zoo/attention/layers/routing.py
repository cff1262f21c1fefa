"""Routing transformer: attention inside clusters of tokens that online k-means finds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, head_width
from zoo.attention.layers.multihead import split_heads
from zoo.attention.select import gather_blocks, select

_SELF = -5e4  # a token reads itself only where it sees nothing else


class KMeans(nn.Module):
    """Running spherical k-means of each head, `means` `(H, clusters, D)`.

    In training, the first batch replaces the means by tokens of its own, and each batch moves them.
    """

    means: Tensor
    initted: Tensor

    def __init__(self, num_heads: int, num_clusters: int, head_dim: int, ema_decay: float) -> None:
        super().__init__()
        self.ema_decay = ema_decay
        means = F.normalize(torch.randn(num_heads, num_clusters, head_dim), dim=-1)
        self.register_buffer("means", means)
        self.register_buffer("initted", torch.tensor(False))

    def forward(self, x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Similarities `(B, H, N, clusters)` to the means, and the mean square distance from the nearest.

        Args:
            x: unit vectors `(B, H, N, D)`; only the distance passes a gradient to them.
            real: bool `(B, N)`: the tokens that count; None = all.
        """
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            if self.training:
                self._start(x)
            means = self.means.to(x.dtype)
            similarity = x @ means.transpose(-2, -1)
            cluster = similarity.argmax(-1)
            nearest = gather_blocks(means.expand(len(x), -1, -1, -1), cluster[..., None])[..., 0, :]
            if self.training:
                self._move(x, cluster, real)
        error = (x - nearest).square().mean((1, 3))
        weight = torch.ones_like(error) if real is None else real.to(error.dtype)
        return similarity, (error * weight).sum() / weight.sum().clamp(min=1)

    def _start(self, x: Tensor) -> None:
        tokens = x.transpose(0, 1).flatten(1, 2)
        drawn = tokens[:, torch.randint(tokens.shape[1], (self.means.shape[1],), device=x.device)]
        self.means.copy_(torch.where(self.initted, self.means, drawn.to(self.means.dtype)))
        self.initted.fill_(True)

    def _move(self, x: Tensor, cluster: Tensor, real: Tensor | None) -> None:
        member = F.one_hot(cluster, self.means.shape[1]).to(x.dtype)
        if real is not None:
            member = member * real[:, None, :, None]
        new = F.normalize(torch.einsum("bhnc,bhnd->hcd", member, x), dim=-1)
        empty = (member.sum((0, 2)) == 0)[..., None]
        self.means.lerp_(torch.where(empty, self.means, new.to(self.means.dtype)), 1 - self.ema_decay)


class RoutedHeads(nn.Module):
    """Attention of heads `(B, H, N, D)` inside clusters (arXiv 2003.05997, section 4.1), parameters by the
    names of PyPI routing-transformer.

    Each cluster takes the `window_size` queries, and as many keys, that are most similar to its mean; a token
    may be in several clusters or in none. Its output is the mean over its appearances, zero without any.

    Args:
        num_heads: H.
        head_dim: D.
        num_clusters: k-means clusters of each head.
        window_size: queries of a cluster.
        context_window_size: keys of a cluster, where they come from elsewhere; `window_size` by default.
        causal: see no later token. Which tokens a cluster takes still depends on all of them.
        shared_qk: keys are the normalised queries; a token reads itself only where it sees nothing else.
        num_memory: learned keys of each cluster that all its queries see; by default 1 where a query could
            otherwise see nothing (causal without shared_qk), else 0.
        ema_decay: of the means.
        commitment: weight of the loss.
        mask_first: padded tokens do not compete for places. False: they do, and a query without a real key
            reads the mean of the values in its cluster, as in the published program.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_clusters: int,
        window_size: int,
        context_window_size: int | None = None,
        causal: bool = False,
        shared_qk: bool = False,
        num_memory: int | None = None,
        ema_decay: float = 0.999,
        commitment: float = 1e-4,
        mask_first: bool = True,
    ) -> None:
        super().__init__()
        if num_clusters < 1 or window_size < 1:
            raise AttentionError(
                f"there is at least one cluster, of at least one token: not {num_clusters}, {window_size}"
            )
        self.window_size, self.causal, self.shared_qk = window_size, causal, shared_qk
        self.context_window_size = window_size if context_window_size is None else context_window_size
        self.commitment, self.mask_first = commitment, mask_first
        memory = int(causal and not shared_qk) if num_memory is None else num_memory
        self.mem_key = nn.Parameter(torch.randn(num_heads, num_clusters, memory, head_dim))
        self.mem_value = nn.Parameter(torch.randn(num_heads, num_clusters, memory, head_dim))
        self.kmeans = KMeans(num_heads, num_clusters, head_dim, ema_decay)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs `(B, H, N, D)` and the commitment loss.

        Args:
            q: `(B, H, N, D)`.
            k: `(B, H, M, D)`; None with shared_qk.
            v: `(B, H, M, D)`.
            mask: bool `(B, N)`, True = a real query.
            context_mask: bool `(B, M)`, True = a real key; that of the queries by default, where M = N.
        """
        if k is None and not self.shared_qk:
            raise AttentionError("keys are needed unless queries and keys are shared")
        if context_mask is None and k is not None and q.shape[2] == k.shape[2]:
            context_mask = mask
        queries, keys, distance = self._clusters(q, k, mask, context_mask)
        if k is None:
            k, context_mask = F.normalize(q, dim=-1), mask
        rows = gather_blocks(_zeroed(q, mask), queries)
        columns = gather_blocks(_zeroed(k, context_mask), keys)
        columns = torch.cat([self._memory(self.mem_key, q), columns], 3)
        values = torch.cat([self._memory(self.mem_value, q), gather_blocks(v, keys)], 3)
        out = attend(
            *(x.flatten(0, 2)[:, None] for x in (rows, columns, values)),
            bias=self._bias(queries, keys, mask, context_mask, rows),
        )
        return _mean_by_token(out.view(rows.shape), queries, q.shape[2]), self.commitment * distance

    def _clusters(
        self, q: Tensor, k: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The queries and the keys `(B, H, clusters, w)` of each cluster, and the distance from the means."""
        tokens = q if k is None else torch.cat([q, k], 2)
        real = None
        if self.mask_first and (mask is not None or context_mask is not None):
            parts = [(q, mask)] if k is None else [(q, mask), (k, context_mask)]
            real = torch.cat([_or_all(given, x) for x, given in parts], 1)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        similarity, distance = self.kmeans(F.normalize(tokens, dim=-1), real)
        if real is not None:
            similarity = similarity.masked_fill(~real[:, None, :, None], torch.finfo(similarity.dtype).min)
        similarity = similarity.transpose(-2, -1)
        queries = select(similarity[..., : q.shape[2]], min(self.window_size, q.shape[2]))
        if k is None:
            return queries, queries, distance
        width = self.window_size if q.shape[2] == k.shape[2] else self.context_window_size
        return queries, select(similarity[..., q.shape[2] :], min(width, k.shape[2])), distance

    def _memory(self, x: Tensor, like: Tensor) -> Tensor:
        return x.to(like.dtype).expand(len(like), -1, -1, -1, -1)

    def _bias(
        self, queries: Tensor, keys: Tensor, mask: Tensor | None, context_mask: Tensor | None, like: Tensor
    ) -> Tensor:
        """`(B H clusters, 1, w, memory + w)`; a row that would see nothing sees its whole cluster."""
        i, j = queries[..., :, None], keys[..., None, :]
        hidden = torch.zeros_like(i == j)
        for at, real in ((i, mask), (j, context_mask)):
            if real is not None:
                hidden = hidden | ~_at(real, at)
        if self.causal:
            hidden = hidden | (i < j)
        if self.shared_qk:
            hidden = hidden & (i != j)
        if not self.mem_key.shape[2]:
            hidden = hidden & ~hidden.all(-1, keepdim=True)
        bias = like.new_zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        if self.shared_qk:
            bias = bias.masked_fill(i == j, _SELF)
        return F.pad(bias, (self.mem_key.shape[2], 0)).flatten(0, 2)[:, None]


def _or_all(mask: Tensor | None, x: Tensor) -> Tensor:
    return torch.ones(len(x), x.shape[2], dtype=torch.bool, device=x.device) if mask is None else mask


def _zeroed(x: Tensor, mask: Tensor | None) -> Tensor:
    """`(B, H, N, D)` without what padded tokens hold: they pass no gradient to others."""
    return x if mask is None else x * mask[:, None, :, None]


def _at(mask: Tensor, index: Tensor) -> Tensor:
    """Bool `(B, N)` at the tokens of `index` `(B, ...)`."""
    return mask.gather(1, index.flatten(1)).view(index.shape)


def _mean_by_token(x: Tensor, index: Tensor, tokens: int) -> Tensor:
    """Results `(B, H, clusters, w, D)` of the tokens of `index`, as `(B, H, N, D)`: mean of each token's."""
    x, at = x.flatten(2, 3), index.flatten(2)
    count = torch.zeros(*at.shape[:2], tokens, dtype=x.dtype, device=x.device)
    count = count.scatter_add(2, at, torch.ones_like(at, dtype=x.dtype))
    total = x.new_zeros(*at.shape[:2], tokens, x.shape[-1])
    total = total.scatter_add(2, at[..., None].expand(x.shape), x)
    return total / (count[..., None] + 1e-5)


class Routing(AttentionLayer, name="routing"):
    """Attention inside k-means clusters of the tokens, O(N^1.5) with about sqrt(N) clusters.

    `aux_loss` is the commitment loss. `causal=True` hides later tokens inside of a cluster; but which tokens
    a cluster takes depends on the whole row, so that this is not a strictly causal layer and cannot decode.

    Args:
        dim: width of the tokens.
        num_heads: of queries, keys and values.
        num_clusters: k-means clusters of each head.
        window_size: tokens per cluster, about N / num_clusters.
        causal: see above.
        shared_qk: one projection for queries and keys.
        bias: of the projections.
    """

    supports = Supports(bidirectional=True, cross=True, padding=True)
    paper = "https://arxiv.org/abs/2003.05997"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_clusters: int = 8,
        window_size: int = 64,
        causal: bool = False,
        shared_qk: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        width = head_width(dim, num_heads)
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = None if shared_qk else nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.heads = RoutedHeads(
            num_heads,
            width,
            num_clusters=num_clusters,
            window_size=window_size,
            causal=causal,
            shared_qk=shared_qk,
        )

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask = given.x, given.context, given.mask
        if context is not None and (self.causal or self.k_proj is None):
            raise AttentionError(
                "causal or shared queries and keys are of the layer's own tokens: no context"
            )
        source = x if context is None else context
        q, v = (split_heads(y, self.num_heads) for y in (self.q_proj(x), self.v_proj(source)))
        k = None if self.k_proj is None else split_heads(self.k_proj(source), self.num_heads)
        masks = (mask, mask) if context is None else (None, mask)
        out, commitment = self.heads(q, k, v, *masks)
        self.aux_loss = commitment if self.training else None
        return self.o_proj(out.transpose(1, 2).flatten(2))
