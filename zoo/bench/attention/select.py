"""Selected blocks and tokens, clusters and chunks, against the same mathematics written out plainly.

The peers of the selecting forms take the selection as given, so that both read the same keys where scores
are equal to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.layers.hcam import HierarchicalMemory
from zoo.attention.layers.routing import RoutedHeads
from zoo.attention.layers.sparse import block_mixture, lightning_index, native_sparse
from zoo.attention.select import attend_blocks, select
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call

Program = Callable[[Tensor, Tensor, Tensor], Tensor]


def _qkv(heads: int, shared: int, n: int, width: int, device: torch.device) -> list[Tensor]:
    """q `(1, heads, n, width)` and k, v `(1, shared, n, width)`."""
    g = torch.Generator().manual_seed(0)
    sizes = ((1, count, n, width) for count in (heads, shared, shared))
    return [torch.randn(size, generator=g).to(device).requires_grad_() for size in sizes]


def _trained(program: Program, qkv: list[Tensor]) -> Tensor:
    """Output and gradients of one training call, flat."""
    out = program(*qkv)
    grads = torch.autograd.grad(out, qkv, torch.ones_like(out))
    return torch.cat([x.flatten() for x in (out, *grads)])


def _query_by_query(q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int) -> Tensor:
    """Selected keys `(B, I, N, S)` of each query by a loop over queries, all heads with keys of their own."""
    k, v, index = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v, index))
    rows = []
    for t in range(q.shape[2]):
        keys = (index[:, :, t, :, None] * size + torch.arange(size, device=q.device)).flatten(2)
        at = keys.clamp(min=0)[..., None].expand(-1, -1, -1, q.shape[-1])
        scores = (k.gather(2, at) @ q[:, :, t, :, None])[..., 0] * q.shape[-1] ** -0.5
        weights = scores.masked_fill((keys < 0) | (keys > t), -torch.inf).softmax(-1)
        rows.append((weights[..., None, :] @ v.gather(2, at))[:, :, 0])
    return torch.stack(rows, 2)


def _masked(q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int) -> Tensor:
    """Selected keys by an N x N mask for each selection, and explicit softmax."""
    n = k.shape[2]
    blocks = torch.arange(n, device=q.device) // size
    chosen = (index[..., None] == blocks).any(-2).tril()
    heads = q.shape[1]
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~chosen, -torch.inf).softmax(-1) @ v


def _selected(
    name: str,
    peer: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor],
    *,
    heads: int,
    shared: int,
    n: int,
    size: int,
    slots: int,
    width: int = 64,
    target: float | None = None,
) -> Case:
    """`attend_blocks` to blocks that native sparse attention selects, or to tokens (size 1) of an indexer."""

    def build(device: torch.device) -> Job:
        qkv = _qkv(heads, shared, n, width, device)
        with torch.no_grad():
            index = _index(*qkv, size=size, slots=slots)

        def ours() -> Tensor:
            return _trained(lambda q, k, v: attend_blocks(q, k, v, index, size), qkv)

        def theirs() -> Tensor:
            return _trained(lambda q, k, v: peer(q, k, v, index, size), qkv)

        return Job(name, ours, theirs, ours, theirs)

    return Case(name, build, target)


def _index(q: Tensor, k: Tensor, v: Tensor, *, size: int, slots: int) -> Tensor:
    if size > 1:
        return native_sparse(q, k, v, block_size=size, num_selected=slots).index
    return lightning_index(q, k[:, :1], torch.ones_like(q[..., 0]), slots)


def _routed(n: int, clusters: int, device: torch.device) -> tuple[RoutedHeads, list[Tensor]]:
    torch.manual_seed(0)
    heads = RoutedHeads(8, 64, num_clusters=clusters, window_size=n // clusters).to(device).eval()
    return heads, _qkv(8, 8, n, 64, device)


def _routing(device: torch.device) -> Job:
    routed, qkv = _routed(1024, 16, device)
    means = routed.kmeans.means

    def by_cluster(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A loop over the clusters."""
        total, count = torch.zeros_like(q), torch.zeros_like(q[..., :1])
        for c in range(means.shape[1]):
            rows, columns = (
                select(torch.einsum("bhnd,hd->bhn", F.normalize(x, dim=-1), means[:, c]), routed.window_size)
                for x in (q.detach(), k.detach())
            )
            at, of = (x[..., None].expand(-1, -1, -1, q.shape[-1]) for x in (rows, columns))
            weights = (q.gather(2, at) @ k.gather(2, of).mT * q.shape[-1] ** -0.5).softmax(-1)
            total = total.scatter_add(2, at, weights @ v.gather(2, of))
            count = count.scatter_add(2, rows[..., None], torch.ones_like(count).gather(2, rows[..., None]))
        return total / (count + 1e-5)

    def ours() -> Tensor:
        return _trained(lambda q, k, v: routed(q, k, v)[0], qkv)

    def theirs() -> Tensor:
        return _trained(by_cluster, qkv)

    return Job("clusters", ours, theirs, ours, theirs)


def _growth(name: str, program: Program, heads: int, shared: int) -> Growth:
    def build(n: int, device: torch.device) -> Call:
        qkv = _qkv(heads, shared, n, 32, device)
        return lambda: _trained(program, qkv)

    return Growth(name, build)


def _native(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    compressed, selected, _ = native_sparse(q, k, v, block_size=16, num_selected=4)
    return compressed + selected


def _lightning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_blocks(q, k, v, lightning_index(q, k, torch.ones_like(q[..., 0]), 16))


def _routed_call(n: int, device: torch.device) -> Call:
    routed, qkv = _routed(n, int(n**0.5), device)
    return lambda: _trained(lambda q, k, v: routed(q, k, v)[0], qkv)


def _memory_call(n: int, device: torch.device) -> Call:
    """256 tokens that read 4 chunks of a memory of n tokens."""
    torch.manual_seed(0)
    layer = HierarchicalMemory(64, 2, chunk_size=16, k=4).to(device)
    x, memory = (torch.randn(1, size, 64, device=device) for size in (256, n))
    x.requires_grad_()
    return lambda: torch.autograd.grad(layer(x, context=memory).sum(), x)


SUITE = Suite(
    cases=(
        _selected(
            "native sparse selection, N = 256, 16 heads on 1, 4 blocks of 16, beside a loop",
            _query_by_query,
            heads=16,
            shared=1,
            n=256,
            size=16,
            slots=4,
            target=20,
        ),
        _selected(
            "native sparse selection, N = 256, 4 heads on 4, 4 blocks of 16, beside a loop",
            _query_by_query,
            heads=4,
            shared=4,
            n=256,
            size=16,
            slots=4,
            target=20,
        ),
        _selected(
            "native sparse selection, N = 2,048, 8 heads on 2, 8 blocks of 16, beside a mask",
            _masked,
            heads=8,
            shared=2,
            n=2048,
            size=16,
            slots=8,
        ),
        _selected(
            "64 of N = 2,048 tokens, 8 heads on 1, beside a mask",
            _masked,
            heads=8,
            shared=1,
            n=2048,
            size=1,
            slots=64,
        ),
        Case("routing, N = 1,024, 16 clusters of 64, beside a loop over clusters", _routing),
    ),
    growth=(
        _growth("native sparse attention, 4 blocks of 16", _native, 4, 1),
        _growth(
            "mixture of blocks, 4 of 16",
            lambda q, k, v: block_mixture(q, k, v, block_size=16, num_selected=4),
            2,
            2,
        ),
        _growth("lightning index and 16 tokens", _lightning, 4, 1),
        Growth("routing, sqrt(N) clusters", _routed_call),
        Growth("hierarchical memory, 4 chunks of 16 of N tokens", _memory_call),
    ),
)
