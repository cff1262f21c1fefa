"""Titans: a memory that learns at test time, alone, as context of attention, as its gate, and before it.

Shapes: B batch, H heads of the memory, N tokens, C width of the tokens, D width of a head; T chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.attend import attend
from zoo.attention.cache import Cache, default_positions
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs, Supports, check_options, head_width
from zoo.attention.layers.linear import join, split, wide
from zoo.attention.layers.multihead import HeadCache, MultiHead, split_heads
from zoo.attention.layers.window import LocalAttention
from zoo.attention.memory import MemoryNet, MemoryState, Weights, detached, nbytes, running
from zoo.attention.merge import merge
from zoo.attention.patterns import Causal
from zoo.attention.scan import CHUNK


class MemoryCache(Cache):
    """The state of a memory; of one size, whatever the length."""

    def __init__(self, layer: AttentionLayer, state: MemoryState) -> None:
        super().__init__(layer)
        self.state = state

    def nbytes(self) -> int:
        """Bytes in use."""
        return nbytes(self.state)


class RealFirst(AttentionLayer):
    """A causal layer that needs no mask: the real tokens of a padded row are moved to its front, in their
    order, and what comes after them is not seen. A subclass defines `flow`."""

    supports = Supports(causal=True, padding=True, cache=True)
    paper = "https://arxiv.org/abs/2501.00663"
    causal = True

    def mix(self, given: Inputs) -> Tensor:
        x, _, mask, positions, cache = given
        if mask is None:
            return self.flow(x, positions, cache)
        if cache is not None:
            raise AttentionError(
                f"the rows of a {type(self).__name__} cache fill their chunks together: it takes no mask; "
                "decode rows of one length, or each by itself"
            )
        order = (~mask).byte().argsort(dim=1, stable=True)
        if positions is not None:
            positions = positions.expand(mask.shape).gather(1, order)
        out = self.flow(_rows(x, order), positions, None)
        return _rows(out, order.argsort(dim=1))

    def flow(self, x: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        """`mix`, of full rows."""
        raise NotImplementedError


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Tokens `(B, N, C)` in the order `(B, N)`."""
    return x.gather(1, order[..., None].expand(x.shape))


class NeuralMemory(RealFirst, name="titans"):
    """The neural memory of Titans (Behrouz et al. 2025, section 3): a net that learns each chunk by gradient.

    `S_c = a_c S_{c-1} + u_c`, `W_c = (1 - d_c) W_{c-1} + S_c`; u_c is the negative gradient of the
    error `sum_t eta_t mean_d (f(k_t) - v_t)^2` over the tokens of the chunk, taken at the weights of the last
    refresh for all chunks at once; momentum a and decay d come from the mean token of the chunk, the rate eta
    from the token. A token reads `f(q)` by the weights of the last chunk that ended with it or before: chunks
    that are not full store nothing, and shorter sequences read what was trained.

    Parameter names are those of titans-pytorch, except for its unused template `memory_model`. The order of
    `memory_model_parameters` is gamma, matrices.

    Args:
        dim: C.
        num_heads: H, memories that read and write by themselves, behind a gate per head where H > 1.
        head_dim: D; by default C / H.
        chunk_size: tokens of a chunk.
        batch_size: tokens between refreshes, a multiple of `chunk_size`; None = gradients are always taken at
            the trained weights.
        depth, expansion, norm_residual: of the memory, see `MemoryNet`.
        momentum: with a; else S_c = u_c.
        max_lr: the largest rate.
    """

    supports = Supports(causal=True, padding=True, cache=True, maps=False)

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        head_dim: int | None = None,
        chunk_size: int = 64,
        batch_size: int | None = None,
        depth: int = 2,
        expansion: float = 2.0,
        norm_residual: bool = True,
        momentum: bool = True,
        max_lr: float = 1.0,
    ) -> None:
        super().__init__()
        if chunk_size < 1 or (batch_size is not None and (batch_size < 1 or batch_size % chunk_size)):
            raise AttentionError(
                f"chunks have at least one token, and batch_size is a multiple of them: not {chunk_size}, "
                f"{batch_size}"
            )
        width = head_width(dim, num_heads) if head_dim is None else head_dim
        self.dim, self.num_heads, self.chunk_size, self.max_lr = dim, num_heads, chunk_size, max_lr
        self.refresh = None if batch_size is None else batch_size // chunk_size
        self.retrieve_norm, self.store_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.net = MemoryNet(width, depth, expansion, residual=norm_residual)
        self.memory_model_parameters = nn.ParameterList(
            torch.zeros(num_heads, *shape) for shape in self.net.shapes
        )
        for weight in self.memory_model_parameters:
            if weight.ndim == 3:
                bound = (6 / (weight.shape[1] + weight.shape[2])) ** 0.5
                nn.init.uniform_(weight, -bound, bound)
        inner = num_heads * width
        self.to_queries, self.to_keys, self.to_values = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_adaptive_step = nn.Sequential(nn.Linear(dim, num_heads))
        self.to_momentum = nn.Sequential(nn.Linear(dim, num_heads)) if momentum else None
        self.to_decay_factor = nn.Sequential(nn.Linear(dim, num_heads))
        many = num_heads > 1
        self.retrieve_gate = nn.Sequential(nn.Linear(dim, num_heads, bias=False)) if many else None
        self.combine_heads = nn.Linear(inner, dim, bias=False) if many or inner != dim else nn.Identity()

    def flow(self, x: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        known = cache.state if isinstance(cache, MemoryCache) else self.initial(x)
        out, state = self.run(x, known)
        if isinstance(cache, MemoryCache):
            cache.state, cache.length = detached(state), state.length
        return out

    def init_cache(self, batch_size: int) -> MemoryCache:
        """Holds the weights, their momentum, and the tokens of the chunk that is not full."""
        like = self.to_keys.weight
        return MemoryCache(self, detached(self.initial(like.new_zeros(batch_size, 0, self.dim))))

    def initial(self, x: Tensor) -> MemoryState:
        """The state before the first of the tokens `(B, N, C)`."""
        weights = [wide(w).expand(len(x), *w.shape) for w in self.memory_model_parameters]
        return MemoryState(weights, [torch.zeros_like(w) for w in weights], weights, x[:, :0], 0)

    def run(self, x: Tensor, state: MemoryState) -> tuple[Tensor, MemoryState]:
        """What the tokens `(B, N, C)` read, `(B, N, C)`, and the state after them."""
        held = state.rest.shape[1]
        tokens = torch.cat([state.rest.to(x.dtype), x], dim=1)
        chunks = tokens.shape[1] // self.chunk_size
        full, rest = tokens.tensor_split([chunks * self.chunk_size], dim=1)
        normed = self.retrieve_norm(x)
        # The last token of a chunk reads what the chunk has stored: reading begins one token later.
        lead = held + 1 if chunks else 0
        q = F.pad(self._queries(normed), (0, 0, lead, 0))
        early, late = q.tensor_split([chunks * self.chunk_size], dim=2)
        outs, state = self._through(full, early, state) if chunks else ([], state)
        outs.append(self._read(state.weights, late))
        state = state._replace(rest=rest, length=state.length + x.shape[1])
        return self._joined(torch.cat(outs, dim=2)[:, :, lead:], normed), state

    def recall(self, x: Tensor, weights: Weights) -> Tensor:
        """What the tokens `(B, N, C)` read by given weights; nothing is stored."""
        normed = self.retrieve_norm(x)
        return self._joined(self._read(weights, self._queries(normed)), normed)

    def _queries(self, normed: Tensor) -> Tensor:
        return wide(split(self.to_queries(normed), self.num_heads))

    def _joined(self, out: Tensor, normed: Tensor) -> Tensor:
        """Of all heads `(B, H, N, D)`, each behind its gate, tokens `(B, N, C)`."""
        out = out.to(normed.dtype)
        if self.retrieve_gate is not None:
            out = out * split(self.retrieve_gate(normed), self.num_heads).sigmoid()
        return self.combine_heads(join(out))

    def _through(self, x: Tensor, q: Tensor, state: MemoryState) -> tuple[list[Tensor], MemoryState]:
        """Full chunks of tokens `(B, T chunk, C)`; what queries `(B, H, T chunk, D)` read, each group of them
        before the chunk is stored; few chunks at a time, so that few weights are in memory at once."""
        k, v, rate, keep, carry = self._chunks(x)
        q = q.unflatten(2, (-1, self.chunk_size))
        weights, momentum, anchor = state.weights, state.momentum, state.anchor
        first = (state.length - state.rest.shape[1]) // self.chunk_size
        outs = []
        for begin, end in self._parts(first, q.shape[2]):
            if self.refresh is not None and (first + begin) % self.refresh == 0:
                anchor = weights
            here = slice(begin, end)
            with torch.autocast(x.device.type, enabled=False):
                updates = self.net.surprise(anchor, k[:, :, here], v[:, :, here], rate[:, :, here])
            if carry is not None:
                updates = running(updates, carry[:, :, here], momentum)
                momentum = [u[:, :, -1] for u in updates]
            after = running(updates, keep[:, :, here], weights)
            before = [
                torch.cat([w[:, :, None], a[:, :, :-1]], dim=2) for w, a in zip(weights, after, strict=True)
            ]
            outs.append(self._read(before, q[:, :, here]).flatten(2, 3))
            weights = [a[:, :, -1] for a in after]
        return outs, state._replace(weights=weights, momentum=momentum, anchor=anchor)

    def _chunks(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Of tokens `(B, T chunk, C)`: keys and values `(B, H, T, chunk, D)`, rates `(B, H, T, chunk)`, and
        the logarithms of what weights and momentum keep `(B, H, T)`, in float32 or wider."""
        x, cut = self.store_norm(x), (-1, self.chunk_size)
        k, v = (wide(split(f(x), self.num_heads)).unflatten(2, cut) for f in (self.to_keys, self.to_values))
        rate = wide(self.to_adaptive_step(x)).mT.sigmoid().unflatten(2, cut) * self.max_lr
        mean = x.unflatten(1, cut).mean(2)
        keep = F.logsigmoid(-wide(self.to_decay_factor(mean)).mT)
        carry = None if self.to_momentum is None else F.logsigmoid(wide(self.to_momentum(mean)).mT)
        return k, v, rate, keep, carry

    def _parts(self, first: int, chunks: int) -> Iterator[tuple[int, int]]:
        """Runs of so many chunks, the first of which is number `first` of its row; a refresh begins one."""
        begin = 0
        while begin < chunks:
            end = begin + CHUNK
            if self.refresh is not None:
                end = min(end, begin + self.refresh - (first + begin) % self.refresh)
            yield begin, min(end, chunks)
            begin = end

    def _read(self, weights: Weights, q: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            return self.net(weights, q)


class PersistentTokens(nn.Module):
    """Trained tokens that every query sees (Behrouz et al. 2025, section 3.3)."""

    def __init__(self, number: int, dim: int) -> None:
        super().__init__()
        if number < 0:
            raise AttentionError(f"the number of persistent tokens is not negative, as {number} is")
        self.tokens = nn.Parameter(torch.randn(number, dim) * dim**-0.5)

    def read(self, layer: MultiHead, q: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What queries `(B, H, N, D)` find in them, to be merged; nothing where there are none."""
        if not len(self.tokens):
            return []
        k, v = (
            split_heads(proj(self.tokens[None]), layer.num_kv_heads).expand(len(q), -1, -1, -1)
            for proj in (layer.k_proj, layer.v_proj)
        )
        return [attend(q, layer.k_norm(k), v, dropout=_dropout(layer), return_lse=True)]


def _dropout(layer: MultiHead) -> float:
    return layer.dropout if layer.training else 0.0


def _checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an inner layer, if it has such."""
    check_options(name, options)
    if not options.get("causal", True):
        raise AttentionError("the attention beside a Titans memory is causal: it takes no causal=False")
    return {key: value for key, value in options.items() if key != "causal"}


class PersistentWindow(LocalAttention):
    """Causal attention to a sliding window, and to persistent tokens.

    Args:
        persistent: their number.
        options: of `LocalAttention`.
    """

    def __init__(self, dim: int, num_heads: int, *, persistent: int, **options: Any) -> None:
        super().__init__(dim, num_heads, causal=True, **options)
        self.persistent = PersistentTokens(persistent, dim)

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        pattern = self.pattern(k.shape[2], mask)
        near = attend(q, k, v, pattern=pattern, dropout=_dropout(self), return_lse=True)
        return merge(near, *self.persistent.read(self, q))[0]


class BranchCache(Cache):
    """The caches of the attention and of the memory."""

    def __init__(self, layer: AttentionLayer, attention: HeadCache, memory: MemoryCache) -> None:
        super().__init__(layer)
        self.attention, self.memory = attention, memory

    def nbytes(self) -> int:
        """Bytes in use; the same after any number of tokens that fill the window."""
        return self.attention.nbytes() + self.memory.nbytes()


class _BesideMemory(RealFirst):
    """Attention to the tokens nearby and to persistent ones, beside a memory.

    Args:
        dim: C.
        num_heads: of the attention; the memory has one.
        persistent: number of persistent tokens.
        memory: options of `NeuralMemory`.
        attention: options of `MultiHead`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        persistent: int = 4,
        memory: Mapping[str, Any] | None = None,
        attention: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self._build_attention(persistent, {"num_heads": num_heads} | dict(attention or {}))
        self.memory = NeuralMemory(dim, **_checked("titans", memory or {}))

    def _build_attention(self, persistent: int, options: Mapping[str, Any]) -> None:
        """Sets `attention`, which has these options."""
        raise NotImplementedError


class _WithWindow(_BesideMemory):
    """A memory, and attention to a sliding window and to persistent tokens.

    Args:
        window: keys that a query sees, itself included.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 64,
        attention: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, attention={"window": window} | dict(attention or {}), **options)

    def _build_attention(self, persistent: int, options: Mapping[str, Any]) -> None:
        self.attention = PersistentWindow(self.dim, persistent=persistent, **_checked("local", options))

    def flow(self, x: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        attention, memory = (
            (cache.attention, cache.memory) if isinstance(cache, BranchCache) else (None, None)
        )
        out = self.joined(x, positions, attention, memory)
        if cache is not None:
            cache.length += x.shape[1]
        return out

    def joined(
        self, x: Tensor, positions: Tensor | None, attention: HeadCache | None, memory: MemoryCache | None
    ) -> Tensor:
        """Both, `(B, N, C)` to `(B, N, C)`, each with its cache."""
        raise NotImplementedError

    def init_cache(self, batch_size: int) -> BranchCache:
        """Holds the keys and values of the window, and the state of the memory."""
        return BranchCache(self, self.attention.init_cache(batch_size), self.memory.init_cache(batch_size))


class MemoryGate(nn.Module):
    """`norm(y) * sigmoid(norm(m))`: attention y gated by what the memory gives (section 4.2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention_norm, self.memory_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)

    def forward(self, attended: Tensor, recalled: Tensor) -> Tensor:
        return self.attention_norm(attended) * self.memory_norm(recalled).sigmoid()


class MemoryAsGate(_WithWindow, name="titans_mag"):
    """MAG (Behrouz et al. 2025, section 4.2): attention to a sliding window, gated by the memory.

    The persistent tokens are keys of the attention. The memory does not store them: they are the same for
    every sequence, as its trained weights are.
    """

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        self.gate = MemoryGate(dim)

    def joined(
        self, x: Tensor, positions: Tensor | None, attention: HeadCache | None, memory: MemoryCache | None
    ) -> Tensor:
        attended = self.attention(x, positions=positions, cache=attention)
        return self.gate(attended, self.memory(x, cache=memory))


class MemoryAsLayer(_WithWindow, name="titans_mal"):
    """MAL (Behrouz et al. 2025, section 4.3): the memory, then attention to a window of its output."""

    def joined(
        self, x: Tensor, positions: Tensor | None, attention: HeadCache | None, memory: MemoryCache | None
    ) -> Tensor:
        return self.attention(self.memory(x, cache=memory), positions=positions, cache=attention)


class ContextCache(Cache):
    """The state of the memory, its weights at the start of the segment, and the keys and values of the
    segment: of its tokens, and of what the memory answered to them."""

    def __init__(self, layer: MemoryAsContext, state: MemoryState) -> None:
        super().__init__(layer)
        self.state = state
        self.begin(layer.attention)

    def begin(self, attention: MultiHead) -> None:
        """Starts a segment."""
        self.weights: Weights = self.state.weights
        self.own, self.recalled = HeadCache(attention), HeadCache(attention)

    def nbytes(self) -> int:
        """Bytes in use; the same at the end of every segment."""
        return nbytes(self.state) + self.own.nbytes() + self.recalled.nbytes()


class MemoryAsContext(_BesideMemory, name="titans_mac"):
    """MAC (Behrouz et al. 2025, section 4.1): attention inside segments, with the memory as further context.

    In each segment, the memory as it was before answers the tokens, `h_t = f(q_t)`. A token attends to the
    persistent tokens, and to the answers and the tokens of its segment up to its own place. The memory learns
    the outcome, and gates it. In the paper a query sees the answers to later tokens of its segment, and the
    gate comes from the memory after the whole segment: here both look back only.

    There is a loop over segments, since what one stores comes out of its attention, and none over tokens.

    Args:
        segment: tokens of a segment.
    """

    def __init__(self, dim: int, num_heads: int, *, segment: int = 64, **options: Any) -> None:
        if segment < 1:
            raise AttentionError(f"a segment has at least one token, not {segment}")
        super().__init__(dim, num_heads, **options)
        self.segment = segment
        self.gate = MemoryGate(dim)

    def _build_attention(self, persistent: int, options: Mapping[str, Any]) -> None:
        self.attention = MultiHead(self.dim, causal=True, **_checked("multihead", options))
        self.persistent = PersistentTokens(persistent, self.dim)

    def flow(self, x: Tensor, positions: Tensor | None, cache: Cache | None) -> Tensor:
        kept = cache if isinstance(cache, ContextCache) else None
        state, begun = (
            (self.memory.initial(x), 0) if kept is None else (kept.state, kept.length % self.segment)
        )
        places = default_positions(x, cache) if positions is None else positions
        outs = []
        for part, at in self._segments(x, places, begun):
            if kept is not None and kept.length % self.segment == 0:
                kept.begin(self.attention)
            recalled = self.memory.recall(part, state.weights if kept is None else kept.weights)
            attended = self._attended(part, recalled, at, kept)
            recalled, state = self.memory.run(attended, state)
            outs.append(self.gate(attended, recalled))
            if kept is not None:
                kept.state = detached(state)
                kept.length += part.shape[1]
        return torch.cat(outs, dim=1)

    def _segments(self, x: Tensor, places: Tensor, begun: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens and their positions, in segments; `begun` tokens of the first have passed."""
        first = self.segment - begun
        sizes = [min(first, x.shape[1])]
        sizes += [min(self.segment, x.shape[1] - i) for i in range(first, x.shape[1], self.segment)]
        yield from zip(x.split(sizes, 1), places.split(sizes, -1), strict=True)

    def _attended(self, x: Tensor, recalled: Tensor, places: Tensor, kept: ContextCache | None) -> Tensor:
        """Of tokens `(B, n, C)` of one segment, and what the memory answered to them."""
        layer = self.attention
        queries = split_heads(layer.q_proj(x), layer.num_heads)
        sources = zip((x, recalled), (None, None) if kept is None else (kept.own, kept.recalled), strict=True)
        parts, q = [], queries
        for source, cache in sources:
            q, (k, v), _ = layer.heads(queries, source, None, None, places, cache)
            parts.append(attend(q, k, v, pattern=Causal(), dropout=_dropout(layer), return_lse=True))
        return layer.project(merge(*parts, *self.persistent.read(layer, q))[0])

    def init_cache(self, batch_size: int) -> ContextCache:
        """Holds the memory, and the keys and values of one segment."""
        return ContextCache(self, self.memory.init_cache(batch_size).state)
