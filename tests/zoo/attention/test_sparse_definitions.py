"""Sparse layers without official code, against their definitions written as loops over queries and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.kmeans import cluster_means, spherical_kmeans
from zoo.attention.layers.clustered import Boundaries, HierarchicalSparse, Squeezed, SqueezedCache
from zoo.attention.layers.core_context import CoreContext
from zoo.attention.layers.fixed import PowerAttention, Subsampled, power_blocks
from zoo.attention.layers.multihead import MultiHead, split_heads
from zoo.attention.layers.reused import FrozenBlocks, Recycled
from zoo.attention.layers.spans import Superlinear

DIM, HEADS, SHARED, N = 16, 4, 2, 21
SCALE = (DIM // HEADS) ** -0.5
Seen = Callable[[int, int, int], Tensor]
"""Indices of the keys that query i of head h of batch entry b sees, from (b, h, i)."""


def tokens(length: int = N) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def heads(layer: MultiHead, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `(B, H, N, D)`, those of shared heads repeated."""
    q = split_heads(layer.q_proj(x), HEADS)
    q, (k, v), _ = layer.heads(q, x, None, None, None, None)
    k, v = (y.repeat_interleave(HEADS // SHARED, 1) for y in (k, v))
    return q, k, v


def softmax_over(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (keys @ query * SCALE).softmax(0) @ values


def for_each_query(q: Tensor, one: Callable[[int, int, int], Tensor]) -> Tensor:
    """`(B, H, N, D)` of what `one` gives for (b, h, i)."""
    batch, number, length = q.shape[:3]
    rows = [one(b, h, i) for b in range(batch) for h in range(number) for i in range(length)]
    return torch.stack(rows).view(batch, number, length, -1)


def by_definition(layer: MultiHead, x: Tensor, seen: Seen) -> Tensor:
    q, k, v = heads(layer, x)

    def one(b: int, h: int, i: int) -> Tensor:
        at = seen(b, h, i)
        return softmax_over(q[b, h, i], k[b, h, at], v[b, h, at])

    return layer.project(for_each_query(q, one))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("size", "window"), [(3, 4), (4, 1), (2, 7), (5, 5)])
def test_core_context(size: int, window: int) -> None:
    layer = CoreContext(DIM, HEADS, num_kv_heads=SHARED, group_size=size, window=window).double()
    q, k, v = heads(layer, x := tokens())

    def one(b: int, h: int, i: int) -> Tensor:
        cores = max(0, (i + 1 - window) // size)
        keys, values = [], []
        for core in range(cores):
            group = slice(core * size, (core + 1) * size)
            weights = (k[b, h, group] @ q[b, h, group.stop - 1] * SCALE).softmax(0)
            keys.append(weights @ k[b, h, group])
            values.append(weights @ v[b, h, group])
        near = slice(cores * size, i + 1)
        assert near.stop - near.start >= min(window, i + 1)
        return softmax_over(
            q[b, h, i],
            torch.cat([torch.stack(keys), k[b, h, near]]) if keys else k[b, h, near],
            torch.cat([torch.stack(values), v[b, h, near]]) if keys else v[b, h, near],
        )

    close(layer(x), layer.project(for_each_query(q, one)))


def test_core_context_keeps_few_tokens_in_its_cache() -> None:
    layer, x = CoreContext(DIM, HEADS, num_kv_heads=SHARED, group_size=4, window=6), tokens(64).float()
    cache = layer.init_cache(2)
    layer.step(x, cache)
    near, cores, width = 6 + 4 - 2, 64 // 4, DIM // HEADS
    assert cache.nbytes() == 2 * (near * ((2 * SHARED + HEADS) * width * 4 + 1) + cores * (2 * DIM * 4 + 1))


@pytest.mark.parametrize(("size", "window"), [(1, 1), (2, 2), (3, 1), (2, 3)])
def test_power_attention(size: int, window: int) -> None:
    layer = PowerAttention(DIM, HEADS, num_kv_heads=SHARED, block_size=size, window=window).double()

    def seen(b: int, h: int, i: int) -> Tensor:
        def block(j: int) -> bool:
            apart = i // size - j // size
            return apart < window or apart.bit_count() == 1 or j // size == 0

        return torch.tensor([j for j in range(i + 1) if block(j)])

    close(layer(tokens()), by_definition(layer, tokens(), seen))


@pytest.mark.parametrize("blocks", [1, 2, 5, 64, 100, 300])
def test_power_blocks_reach_all_in_logarithmically_many_layers(blocks: int) -> None:
    """Without the first block's help, and with few blocks seen by each."""
    index = power_blocks(blocks, 2)
    assert index.shape[1] <= 3 + math.log2(blocks)
    assert all(len(set(row) - {-1}) == sum(j >= 0 for j in row) for row in index.tolist())
    sees = torch.zeros(blocks, blocks + 1, dtype=torch.float64).scatter(1, index % (blocks + 1), 1)[:, :-1]
    sees[2:, 0] = torch.tensor([i.bit_count() == 1 for i in range(2, blocks)]).double()
    reached = torch.eye(blocks, dtype=torch.float64)
    for _ in range(max(1, math.ceil(math.log2(blocks)))):
        reached = (sees @ reached).clamp(max=1)
    assert reached.equal(torch.ones(blocks, blocks, dtype=torch.float64).tril())


def test_power_layers_pass_information_between_all_tokens() -> None:
    layers = [PowerAttention(DIM, HEADS, block_size=2).double() for _ in range(4)]
    x = y = tokens(32)[:1].requires_grad_()
    for layer in layers:
        y = y + layer(y)
    (gradient,) = torch.autograd.grad(y[0, -1].sum(), x)
    assert (gradient[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("locality", [1.0, 0.3, None])
@pytest.mark.parametrize("causal", [True, False])
def test_subsampled_in_training(locality: float | None, causal: bool) -> None:
    layer = Subsampled(DIM, HEADS, num_kv_heads=SHARED, share=0.24, locality=locality, causal=causal).double()
    torch.manual_seed(5)
    got = layer(tokens())
    torch.manual_seed(5)
    size = 5  # 0.24 of 21
    noise = torch.randperm(N) if locality is None else torch.arange(N) + torch.randn(N) * locality * size
    order = (noise if locality is None else noise.argsort()).tolist()

    def seen(b: int, h: int, i: int) -> Tensor:
        group = order.index(i) // size
        members = order[group * size : (group + 1) * size]
        return torch.tensor([j for j in members if j <= i or not causal])

    close(got, by_definition(layer, tokens(), seen))
    full = MultiHead(DIM, HEADS, num_kv_heads=SHARED, causal=causal).double()
    full.load_state_dict(layer.state_dict())
    close(layer.eval()(tokens()), full(tokens()))


def test_subsets_are_local_and_change() -> None:
    layer = Subsampled(DIM, HEADS, share=1 / 8)
    orders = torch.stack([layer._order(800, 100, torch.device("cpu")) for _ in range(8)])
    assert (orders.diff(dim=0) != 0).any(-1).all()
    away = (orders - torch.arange(800)).abs().double().mean()
    assert 60 < away < 120  # mean of |noise| is 80 tokens; 267 for any order


@pytest.mark.parametrize("prompt", [0, 7])
def test_frozen_blocks(prompt: int) -> None:
    size, share = 4, 0.4
    layer = FrozenBlocks(DIM, HEADS, num_kv_heads=SHARED, block_size=size, share=share).double()
    first, x = tokens(), tokens() * 0.7 + 0.1
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 18:] = False
    full = layer(first, mask=mask)
    close(layer.freeze(first, mask=mask, prompt=prompt), full)
    q, k, _ = heads(layer, first)
    weights = (q @ k.mT * SCALE).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1)
    starts = range(0, N, size)

    def chosen(b: int, h: int, i: int) -> list[int]:
        """Blocks for query i: the mean weight of its block of queries, over real pairs."""
        rows = [r for r in range(i // size * size, min(i // size * size + size, N)) if mask[b, r]]
        mean = {}
        for start in starts:
            columns = [j for j in range(start, min(start + size, N)) if mask[b, j]]
            if columns:
                mean[start] = sum(float(weights[b, h, r, j]) for r in rows for j in columns) / len(columns)
        parts = [[s for s in starts if s < prompt], [s for s in starts if s >= prompt]]
        kept = []
        for part in parts:
            ranked = sorted((s for s in part if s in mean), key=lambda s: (-mean[s], s))
            kept += ranked[: math.ceil(share * len(part))]
        return kept

    def seen(b: int, h: int, i: int) -> Tensor:
        kept = chosen(b, h, i) if mask[b, i] else [0]
        return torch.tensor([j for s in kept for j in range(s, min(s + size, N)) if mask[b, j]])

    got, want = layer(x, mask=mask), by_definition(layer, x, seen)
    close(got[mask], want[mask])
    layer.thaw()
    assert not torch.allclose(layer(x, mask=mask), got)


@pytest.mark.parametrize(("kept", "stride"), [(3, 4), (1, 2), (6, 1), (50, 5)])
def test_recycled_decoding(kept: int, stride: int) -> None:
    layer = Recycled(DIM, HEADS, num_kv_heads=SHARED, num_kept=kept, stride=stride).double()
    x, prompt = tokens(), 8
    cache = layer.init_cache(2)
    parts = [layer.step(x[:, :prompt], cache), *(layer.step(t, cache) for t in x[:, prompt:].split(1, 1))]
    q, k, _ = heads(layer, x)
    group = HEADS // SHARED

    def best(b: int, h: int, i: int) -> list[int]:
        """The keys that a full step at i keeps: by mean weight over the heads that share them."""
        together = range(h // group * group, h // group * group + group)
        mean = sum((k[b, g, : i + 1] @ q[b, g, i] * SCALE).softmax(0) for g in together)
        assert isinstance(mean, Tensor)
        return mean.topk(min(kept, i + 1)).indices.tolist()

    def seen(b: int, h: int, i: int) -> Tensor:
        since = 0 if i < prompt else (i - prompt + 1) % stride  # steps after the last full one
        if i < prompt or since == 0:
            return torch.arange(i + 1)
        return torch.tensor([*best(b, h, i - since), *range(i - since + 1, i + 1)])

    close(torch.cat(parts, 1), by_definition(layer, x, seen))


CONTEXT = 15


def squeezed(**options: Any) -> tuple[Squeezed, SqueezedCache, Tensor]:
    layer = Squeezed(DIM, HEADS, num_kv_heads=SHARED, clusters=0.4, **options).double()
    x = 2 * tokens(CONTEXT + 20)
    cache = layer.init_cache(2)
    layer.step(x[:, :CONTEXT], cache)
    layer.squeeze(cache)
    return layer, cache, x


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("chunk", [1, 20])
def test_squeezed(coarse: bool, chunk: int) -> None:
    options = {"coarse_clusters": 0.2, "coarse_threshold": 0.05} if coarse else {}
    layer, cache, x = squeezed(threshold=0.04, **options)
    found = cache.clusters
    assert found is not None
    q, k, _ = heads(layer, x)
    read = []

    def promise(b: int, h: int, i: int, groups: list[list[int]]) -> list[float]:
        means = [k[b, h, group].mean(0) for group in groups]
        scores = [float((mean @ q[b, h, i] * SCALE).exp()) for mean in means]
        total = sum(len(group) * score for group, score in zip(groups, scores, strict=True))
        return [score / total for score in scores]

    def above(b: int, h: int, i: int, groups: list[list[int]], threshold: float) -> list[list[int]]:
        groups = [group for group in groups if group]
        shares = promise(b, h, i, groups)
        return [group for group, share in zip(groups, shares, strict=True) if share > threshold]

    def seen(b: int, h: int, i: int) -> Tensor:
        if i < CONTEXT:
            return torch.arange(i + 1)
        labels = found.labels[b, h // 2].tolist()
        groups = [[j for j, label in enumerate(labels) if label == c] for c in range(6)]
        if coarse:
            upper = found.coarse[b, h // 2].tolist()
            above_all = [[j for j, label in enumerate(labels) if upper[label] == c] for c in range(3)]
            kept = above(b, h, i, above_all, 0.05)
            groups = [group for group in groups if group and any(group[0] in parent for parent in kept)]
        kept = above(b, h, i, groups, 0.04)
        read.append(sum(map(len, kept)))
        return torch.tensor([*(j for group in kept for j in group), *range(CONTEXT, i + 1)])

    got = torch.cat([layer.step(part, cache) for part in x[:, CONTEXT:].split(chunk, 1)], 1)
    close(got, by_definition(layer, x, seen)[:, CONTEXT:])
    assert 0 < sum(read) < 0.9 * CONTEXT * len(read)


def test_squeezed_with_threshold_zero_is_dense() -> None:
    layer, cache, x = squeezed(threshold=0.0)
    got = torch.cat([layer.step(part, cache) for part in x[:, CONTEXT:].split([1, 1, 18], 1)], 1)
    close(got, layer(x)[:, CONTEXT:])


def test_kmeans_finds_directions_and_counts_real_vectors_only() -> None:
    centres = torch.eye(4, dtype=torch.float64)
    member = torch.arange(40) % 4
    x = (centres[member] + 0.05 * torch.randn(40, 4)) * (1 + torch.arange(40)[:, None])  # of any length
    mask = torch.arange(40) < torch.tensor([[40], [24]])
    labels = spherical_kmeans(x.expand(2, 3, 40, 4), 4, mask=mask)
    for row in labels[0].tolist():
        assert len({(a, b) for a, b in zip(row, member.tolist(), strict=True)}) == 4
    alone = spherical_kmeans(x[None, None, :24], 4)
    assert labels[1, 0, :24].equal(alone[0, 0])
    means, counts = cluster_means(x.expand(2, 3, 40, 4), labels, 4, mask)
    assert counts.sum(-1).tolist() == [[40] * 3, [24] * 3]
    close(means[1, 0], torch.stack([x[:24][labels[1, 0, :24] == c].mean(0) for c in range(4)]))


def test_kmeans_of_fewer_vectors_than_clusters() -> None:
    labels = spherical_kmeans(torch.ones(1, 1, 3, 2), 5)
    assert ((labels >= 0) & (labels < 5)).all()


DHSA: dict[str, Any] = {"num_selected": 8, "num_global": 2, "num_local": 3, "num_instruction": 0}


def hierarchical(**options: Any) -> HierarchicalSparse:
    torch.manual_seed(1)
    return HierarchicalSparse(DIM, HEADS, num_kv_heads=SHARED, **{**DHSA, **options}).double()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("chunks", ["uniform", "learned"])
def test_hierarchical(pooled: bool, chunks: str) -> None:
    layer = hierarchical(chunks=chunks, chunk_size=4, pooled_queries=pooled)
    x = tokens()
    q, k, _ = heads(layer, x)
    values = layer.v_proj(x)
    if isinstance(net := layer.boundaries, Boundaries):
        with torch.no_grad():
            net.get_parameter("net.2.bias").sub_(net.logits(values).median())
    begins = layer.boundaries(values).expand(2, -1).tolist()
    chunk = [[sum(row[1 : i + 1]) for i in range(N)] for row in begins]
    assert 3 < chunk[0][-1] < N - 3

    def pool(y: Tensor, members: list[int]) -> Tensor:
        return y[members].sum(0) / math.sqrt(len(members))

    def seen(b: int, h: int, i: int) -> Tensor:
        members = [[j for j in range(N) if chunk[b][j] == c] for c in range(chunk[b][-1] + 1)]
        query = pool(q[b, h], members[chunk[b][i]]) if pooled else q[b, h, i]
        scores = []
        for j in range(i + 1):
            known = members[chunk[b][j]] if pooled else [m for m in members[chunk[b][j]] if m <= i]
            forced = j < 2 or j > i - 3
            scores.append(math.inf if forced else round(float(pool(k[b, h], known) @ query), 12))
        return torch.tensor(sorted(range(i + 1), key=lambda j: (-scores[j], j))[:8])

    close(layer(x), by_definition(layer, x, seen))


def test_last_queries_of_a_prompt_are_dense() -> None:
    layer, dense = hierarchical(num_instruction=5), hierarchical(num_selected=N)
    x, sparse = tokens(), hierarchical()
    dense.load_state_dict(layer.state_dict())
    sparse.load_state_dict(layer.state_dict())
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 17:] = False
    got, full, few = layer(x, mask=mask), dense(x, mask=mask), sparse(x, mask=mask)
    for row, stop in ((0, N), (1, 17)):
        close(got[row, stop - 5 : stop], full[row, stop - 5 : stop])
        close(got[row, : stop - 5], few[row, : stop - 5])
    assert not torch.allclose(few, full)


def test_published_selection_lets_later_tokens_choose() -> None:
    """What the default avoids: a later token of the chunk changes which keys an earlier query reads."""
    for pooled in (False, True):
        layer = hierarchical(chunk_size=8, pooled_queries=pooled)
        x = tokens()
        changed = x.clone()
        changed[:, 15] = -9
        assert torch.allclose(layer(x)[:, 8:15], layer(changed)[:, 8:15]) == (not pooled)


def test_boundaries_are_learned() -> None:
    torch.manual_seed(0)
    begins = torch.rand(8, 60) < 0.2
    topic = torch.randn(8, 60, 6).gather(1, begins.cumsum(1)[..., None].expand(-1, -1, 6))
    values = topic + 0.1 * torch.randn(8, 60, 6)
    net = Boundaries(6, window=2, hidden=32)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        net.loss(values, begins).backward()
        optimiser.step()
    assert (net(values) == begins).double().mean() > 0.97  # always "no" is right on 0.8
    assert values.grad is None


@pytest.mark.parametrize(("spans", "factor"), [(1, 2.0), (2, 2.0), (3, 0.7), (9, 1.0)])
def test_superlinear(spans: int, factor: float) -> None:
    layer = Superlinear(DIM, HEADS, num_kv_heads=SHARED, num_spans=spans, span_factor=factor).double()
    q, k, v = heads(layer, x := tokens())
    search = split_heads(layer.search_proj(x), HEADS)
    search = layer.heads(search, x, None, None, None, None)[0].detach()

    def one(b: int, h: int, i: int) -> Tensor:
        t = i + 1
        ends = [t - n * n for n in range(1, t + 1) if n * n <= t]  # places from 0
        scores = [float(k[b, h, end] @ search[b, h, i] * SCALE) for end in ends]
        best = sorted(range(len(ends)), key=lambda c: -scores[c])[:spans]
        weights = torch.tensor([scores[c] for c in best], dtype=torch.float64).softmax(0)
        out = torch.zeros(DIM // HEADS, dtype=torch.float64)
        for weight, c in zip(weights, best, strict=True):
            span = slice(max(0, ends[c] - math.ceil(factor * math.sqrt(t))), ends[c] + 1)
            out = out + weight * softmax_over(q[b, h, i], k[b, h, span], v[b, h, span])
        return out

    close(layer(x), layer.project(for_each_query(q, one)))


@pytest.mark.parametrize("length", [1, 2, 3, 10, 99, 100, 1000])
def test_any_token_is_in_a_candidate_span(length: int) -> None:
    covered = torch.zeros(length, dtype=torch.bool)
    for step in range(1, math.isqrt(length) + 1):
        end = length - step * step
        covered[max(0, end - math.ceil(2 * math.sqrt(length))) : end + 1] = True
    assert covered.all()


@pytest.mark.parametrize("place", range(0, 30, 3))
def test_superlinear_finds_any_token(place: int) -> None:
    """With all five candidates read, each place reaches the last query."""
    layer, x = Superlinear(DIM, HEADS, num_spans=9, rope_theta=None).double(), tokens(30)
    changed = x.clone()
    changed[:, place] += 1
    assert not torch.allclose(layer(changed)[:, -1], layer(x)[:, -1], atol=1e-6)


def test_superlinear_of_three_tokens_is_causal() -> None:
    layer = Superlinear(DIM, HEADS, num_kv_heads=SHARED, num_spans=1).double()
    close(layer(tokens(3)), by_definition(layer, tokens(3), lambda b, h, i: torch.arange(i + 1)))


def test_superlinear_that_looks_at_its_own_long_span_is_causal() -> None:
    """Equal scores: the first candidate, the query's own span, here as long as the row."""
    layer = Superlinear(DIM, HEADS, num_kv_heads=SHARED, num_spans=1, span_factor=N).double()
    torch.nn.init.zeros_(layer.search_proj.weight)
    close(layer(tokens()), by_definition(layer, tokens(), lambda b, h, i: torch.arange(i + 1)))


def test_the_search_learns() -> None:
    """The weights of the spans pass a gradient to the search query, though the choice does not."""
    layer = Superlinear(DIM, HEADS, num_spans=2)
    layer(tokens().float()).square().sum().backward()
    gradient = layer.search_proj.weight.grad
    assert gradient is not None
    assert gradient.norm() > 0
    assert F.cosine_similarity(gradient.flatten(), layer.q_proj.weight.grad.flatten(), dim=0).abs() < 0.99  # type: ignore[union-attr]
