"""Softmax for some of the keys and linear attention for the rest, in one denominator: LoLCATs, STILL."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.capture import recorder
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, masked
from zoo.attention.layers.linear import wide
from zoo.attention.layers.multihead import MultiHead, WindowCache, split_heads
from zoo.attention.linear import (
    hedgehog_features,
    norm_preserving,
    softmax_above_peak,
    softmax_and_rest,
    window_and_features,
)
from zoo.attention.patterns import Causal, Padding, Pattern, Window
from zoo.attention.scan import scan
from zoo.attention.select import GATHERED, ROWS, by_rows, gather_blocks, listed, select_up_to

_CHOSEN = 64  # queries whose salient keys are chosen together


class HybridCache(WindowCache):
    """Keys and values of the window, and the state of those that have left it."""

    state: Tensor | None = None

    def nbytes(self) -> int:
        """Bytes in use; the same after any number of tokens that fill the window."""
        state = 0 if self.state is None else self.state.numel() * self.state.element_size()
        return super().nbytes() + state


class _HeadMatrices(nn.Module):
    """One matrix per head, `(H, D, F)`."""

    def __init__(self, num_heads: int, width: int, features: int) -> None:
        super().__init__()
        self.layer = nn.Parameter(torch.empty(num_heads, width, features))
        nn.init.uniform_(self.layer, -(width**-0.5), width**-0.5)


class LearnedFeatures(nn.Module):
    """`[softmax(x W), softmax(-x W)]` with a trained W per head, by its official name `mlp.layer`."""

    def __init__(self, num_heads: int, width: int, features: int) -> None:
        super().__init__()
        self.mlp = _HeadMatrices(num_heads, width, features)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, H, N, D)` to `(B, H, N, 2 F)`; heads that share a key, `(B, Hk, N, D)`, each map it."""
        shared = self.mlp.layer.shape[0] // x.shape[1]
        return hedgehog_features(x.repeat_interleave(shared, dim=1), self.mlp.layer)


class LoLCATs(MultiHead, name="lolcats"):
    """Softmax in a causal window, linear attention with learned features before it (Zhang et al. 2024).

    Queries, keys, values and output have the names of `MultiHead`, whose weights load as they are
    (`load_state_dict(..., strict=False)` names the feature maps as missing): `transfer_loss` then trains the
    features and the window factors to do what softmax did. Captured maps show the window.

    Args:
        window: keys seen by softmax, the query's own included.
        feature_dim: F, columns of the matrix of each feature map; by default half of a head.
        affine: the far part has the weight 1 - factor, where factor is that of the window; else 1.
        options: of `MultiHead`, which is causal here.
    """

    supports = Supports(causal=True, padding=True, packed=True, cache=True)
    paper = "https://arxiv.org/abs/2410.10254"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 64,
        feature_dim: int | None = None,
        affine: bool = False,
        causal: bool = True,
        **options: Any,
    ) -> None:
        if not causal:
            raise AttentionError("LoLCATs looks back only; 'linear' attends in both directions")
        super().__init__(dim, num_heads, causal=True, window=window, **options)
        features = max(self.head_dim // 2, 1) if feature_dim is None else feature_dim
        if features < 1:
            raise AttentionError(f"a feature map has at least one feature, not {features}")
        self.affine = affine
        self.window_factors = nn.Parameter(torch.zeros(1, num_heads, 1, 1))
        self.feature_map_q, self.feature_map_k = (
            LearnedFeatures(num_heads, self.head_dim, features) for _ in range(2)
        )

    def mix(self, given: Inputs) -> Tensor:
        x, context, mask, positions, cache = given
        q = split_heads(self.q_proj(x), self.num_heads)
        q, (k, v), mask = self.heads(q, x, context, mask, positions, cache)
        return self.project(self.mixed(q, k, v, mask, cache if isinstance(cache, HybridCache) else None))

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: HybridCache | None = None
    ) -> Tensor:
        """What the heads see, `(B, H, N, D)`; q, k, v and mask are those of `heads`."""
        assert self.window is not None
        near, far = self.factors()
        documents = mask is not None and mask.dtype != torch.bool
        out, state = window_and_features(
            q,
            k,
            v,
            self.feature_map_q(q),
            self.feature_map_k(k),
            window=self.window,
            window_factor=near,
            rest_factor=far,
            mask=None if documents else mask,
            documents=mask if documents else None,
            state=None if cache is None else cache.state,
            dropout=self.dropout if self.training else 0.0,
        )
        if cache is not None:
            cache.state = state.detach()
        return out

    def factors(self) -> tuple[Tensor, Tensor | float]:
        """Weights of the two parts."""
        near = self.window_factors.sigmoid()
        return near, 1 - near if self.affine else 1.0

    def transfer_loss(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean squared error of what the heads see, against full causal softmax of the same projections: the
        attention transfer of Zhang et al. 2024. Its gradient reaches feature maps and factors only.

        Args:
            x: `(B, N, dim)`.
            mask: as in `forward`; padded tokens do not count.
        """
        self._check(Inputs(x, None, mask, None, None))
        with torch.no_grad():
            q = split_heads(self.q_proj(x), self.num_heads)
            q, (k, v), _ = self.heads(q, x, None, mask, None, None)
            taught = attend(q, k, v, pattern=masked(Causal(), mask))
        error = (self.mixed(q, k, v, mask) - taught).square().mean((1, 3))
        if mask is None or mask.dtype != torch.bool:
            return error.mean()
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def init_cache(self, batch_size: int) -> HybridCache:
        """Holds the window, with the token that leaves it next, and one state per head."""
        assert self.window is not None
        return HybridCache(self, self.window + 1)


class SalientCache(HybridCache):
    """Keys of the window, the salient keys and values with their scores, and the state of the others."""

    def __init__(self, layer: AttentionLayer, size: int) -> None:
        super().__init__(layer, size)
        self.salient: tuple[Tensor, ...] = ()

    def keep(self, rows: tuple[Tensor, ...], index: Tensor) -> None:
        """Of keys, values and scores `(B, Hk, M, ?)`, those at `(B, Hk, 1, S)`."""
        k, v, scores = (gather_blocks(x, index).squeeze(2).detach() for x in rows)
        self.salient = (k, v, scores.masked_fill(index.transpose(2, 3) < 0, -torch.inf))

    def nbytes(self) -> int:
        """Bytes in use; the same after any number of tokens that fill window and salient places."""
        return super().nbytes() + sum(x.numel() * x.element_size() for x in self.salient)


class Still(LoLCATs, name="still"):
    """STILL (Meng et al. 2026): softmax for salient keys wherever they stand, linear attention for the rest.

    The paper gives the parts, and no program of it was found; what is not said there is chosen so:

    - The self-saliency of a token is the weight that it gives itself in softmax over its causal window, the
      mean of the query heads that share its key; it does not change later, and has no gradient.
    - Each key/value head holds the `num_salient` most salient tokens up to the query (of equals the earlier).
      A token that a more salient one displaces falls into the state of linear attention, for good: memory
      does not grow with the sequence, and decoding equals the full pass.
    - NP-Map: the learned features of LoLCATs give the direction, the norm of the query or key the length.
    - One denominator and a weight per head for the softmax part, as in LoLCATs.

    With `num_salient` >= N this is causal softmax. Recency in place of saliency would make it LoLCATs.

    Args:
        num_salient: tokens read by softmax; 0 = none.
        window: keys among which saliency is measured.
        options: of `LoLCATs`.
    """

    supports = Supports(causal=True, padding=True, cache=True)
    paper = "https://arxiv.org/abs/2602.02180"

    def __init__(self, dim: int, num_heads: int, *, num_salient: int = 64, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        if num_salient < 0:
            raise AttentionError(f"the number of salient tokens is not negative, as {num_salient} is")
        assert self.window is not None
        if self.window < 2:  # alone in its window, every token is as salient
            raise AttentionError(f"saliency is measured in a window of at least two keys, not {self.window}")
        self.num_salient = num_salient

    def mixed(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: HybridCache | None = None
    ) -> Tensor:
        tokens = q.shape[2]
        rows: tuple[Tensor, ...] = (k[:, :, -tokens:], v[:, :, -tokens:], self.saliency(q, k, mask))
        if isinstance(cache, SalientCache) and cache.salient:
            rows = tuple(torch.cat(pair, dim=2) for pair in zip(cache.salient, rows, strict=True))
        k, v, scores = rows
        index, fallen = most_salient(scores[..., 0], self.num_salient, tokens)
        far, state = self._rest(q, k, v, fallen, None if cache is None else cache.state)
        if isinstance(cache, SalientCache):
            cache.state = state.detach()
            cache.keep(rows, index[:, :, -1:])
        return softmax_and_rest(self._salient(q, k, v, index), far, *self.factors())

    def saliency(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """`(B, Hk, N, 1)`, of the tokens of q `(B, H, N, D)`, the last ones of k; -inf for padding."""
        assert self.window is not None
        seen: Pattern = Window(min(self.window, k.shape[2]), causal=True)
        with torch.no_grad():
            _, mass = attend(q, k, k[..., :1], pattern=masked(seen, mask), return_lse=True)
            own = (wide(q) * wide(self._shared(k[:, :, -q.shape[2] :]))).sum(-1) * q.shape[-1] ** -0.5
            score = (own - mass).exp().unflatten(1, (k.shape[1], -1)).mean(2)
            if mask is not None:
                score = score.masked_fill(~mask[:, None, -q.shape[2] :], -torch.inf)
        return score[..., None]

    def _shared(self, x: Tensor) -> Tensor:
        """`(B, Hk, N, ?)`, once for each query head that shares it."""
        return x.repeat_interleave(self.num_heads // x.shape[1], dim=1)

    def _rest(
        self, q: Tensor, k: Tensor, v: Tensor, fallen: Tensor, state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Linear attention to the keys that fell, by the time that they did; see `softmax_and_rest`."""
        k, v = (gather_blocks(x, fallen[..., None]).squeeze(3) for x in (k, v))
        features = norm_preserving(self.feature_map_k(k), self._shared(k))
        features = features.masked_fill(self._shared(fallen[..., None]) < 0, 0.0)
        ones = self._shared(F.pad(v, (0, 1), value=1.0))
        return scan(norm_preserving(self.feature_map_q(q), q), features, ones, state=state, scale=1.0)

    def _salient(self, q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax of the queries to the keys at `(B, Hk, N, S)`, and the second of `softmax_above_peak`."""
        if not index.shape[-1]:
            return torch.zeros_like(q), torch.full_like(wide(q[..., 0]), -torch.inf)
        dropout, kv_heads, slots = self.dropout if self.training else 0.0, k.shape[1], index.shape[-1]

        def softmax(q: Tensor, k: Tensor, v: Tensor, **seen: Any) -> Tensor:
            out, mass = attend(q, k, v, kernel=softmax_above_peak, dropout=dropout, return_lse=True, **seen)
            return torch.cat([wide(out), mass[..., None]], dim=-1)

        def among_all(q: Tensor, index: Tensor, seen: int) -> Tensor:
            chosen = self._shared(listed(index, seen))
            bias = q.new_zeros(chosen.shape).masked_fill(~chosen, -torch.inf)
            return softmax(q, k[:, :, :seen], v[:, :, :seen], bias=bias)

        def gathered(q: Tensor, index: Tensor, _seen: int) -> Tensor:
            rows = q.unflatten(1, (kv_heads, -1)).transpose(2, 3)  # (B, Hk, n, H / Hk, D)
            tiles = (x.flatten(0, 2)[:, None] for x in (rows, *(gather_blocks(x, index) for x in (k, v))))
            both = softmax(*tiles, pattern=Padding((index >= 0).flatten(0, 2)))
            return both.view(*rows.shape[:-1], -1).transpose(2, 3).flatten(1, 2)

        # To gather a key costs 16 products (CPU, float32, forward and backward, 512 to 2,048 tokens).
        dense = k.shape[2] * (self.num_heads // kv_heads) <= 16 * slots or recorder() is not None
        rows = ROWS if dense else max(32, GATHERED // (kv_heads * slots * k.shape[-1]))
        both = by_rows(among_all if dense else gathered, q, index, keys=k.shape[2], rows=rows)
        return both[..., :-1].to(v.dtype), both[..., -1]

    def init_cache(self, batch_size: int) -> SalientCache:
        """Holds the window, the salient tokens, and one state per head."""
        assert self.window is not None
        return SalientCache(self, self.window)


@torch.no_grad()
def most_salient(scores: Tensor, size: int, tokens: int) -> tuple[Tensor, Tensor]:
    """The highest scores up to each token, and the token that they displace.

    Args:
        scores: `(B, H, M)`; -inf = never held. Those before the last `tokens` are what is held at first.
        size: S, how many are held.
        tokens: N.

    Returns:
        Indices `(B, H, N, S)`, ascending, -1 last in free places; and `(B, H, N)`, which token of those held
        and the new one is held no longer, -1 = none.
    """
    first, end = scores.shape[2] - tokens, scores.shape[2]
    places = torch.arange(end, device=scores.device).masked_fill(scores == -torch.inf, -1)
    held, new = places[..., :first], places[..., first:]
    if size == 0:
        return new[..., None][..., :0], new
    found = []
    for begin in range(first, end, _CHOSEN):
        at = torch.cat([held, places[..., begin : begin + _CHOSEN]], dim=-1)
        rows = min(_CHOSEN, end - begin)
        later = torch.ones(rows, at.shape[-1], dtype=torch.bool, device=at.device).triu(held.shape[-1] + 1)
        level = scores.gather(-1, at.clamp(min=0)).masked_fill(at < 0, -torch.inf)
        chosen = select_up_to(level[..., None, :].masked_fill(later, -torch.inf), size)
        index = at[..., None, :].expand(*chosen.shape[:-1], -1).gather(-1, chosen.clamp(min=0))
        found.append(index.masked_fill(chosen < 0, -1))
        held = found[-1][..., -1, :]
    index = torch.cat(found, dim=2)
    # Two sets that differ by one member differ by its number, counted from 1.
    total = (index + 1).sum(-1)
    before = torch.cat([(places[..., :first] + 1).sum(-1, keepdim=True), total[..., :-1]], dim=-1)
    return index, before + new + 1 - total - 1
