"""Selection (P4) and the layers on it: native sparse, MoBA, lightning-indexed, landmark, routing, HCAM."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention import AttentionError, Causal, attend, backend, capture
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.hcam import HierarchicalMemory
from zoo.attention.layers.landmark import GroupedSoftmax, Landmark
from zoo.attention.layers.routing import RoutedHeads, Routing
from zoo.attention.layers.sparse import (
    BlockMixture,
    LightningIndexed,
    NativeSparse,
    block_mixture,
    native_sparse,
)
from zoo.attention.select import attend_blocks, attend_shared, block_means, by_rows, gather_blocks, select

selecting = importlib.import_module("zoo.attention.select")  # the package has its function of that name
CAUSAL: dict[str, Callable[[], AttentionLayer]] = {
    "nsa": lambda: NativeSparse(16, 4, num_kv_heads=2, block_size=4, num_selected=4, window=5),
    "moba": lambda: BlockMixture(16, 4, num_kv_heads=2, block_size=4, num_selected=3),
    "dsa": lambda: LightningIndexed(16, 4, num_kv_heads=2, num_selected=6, index_heads=2, index_dim=4),
    "landmark": lambda: Landmark(16, 4, num_kv_heads=2, block_size=4),
}
OTHERS: dict[str, Callable[[], AttentionLayer]] = {
    "routing": lambda: Routing(16, 2, num_clusters=3, window_size=6),
    "hcam": lambda: HierarchicalMemory(16, 2, chunk_size=4, k=2),
}
ALL = CAUSAL | OTHERS
N = 24


def test_select_takes_the_largest_and_the_lower_of_equals() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0, 1.0, 1.0], [-torch.inf, -torch.inf, 2.0, -torch.inf, -torch.inf]])
    assert select(scores, 3).tolist() == [[1, 2, 3], [2, -1, -1]]


def test_select_forced_come_first_even_where_invisible() -> None:
    scores = torch.tensor([[-torch.inf, 5.0, 4.0, 3.0]])
    forced = torch.tensor([True, False, False, True])
    assert select(scores, 3, forced).tolist() == [[0, 1, 3]]


def test_select_more_than_there_are() -> None:
    with pytest.warns(UserWarning, match="5 of 2 candidates"):
        assert select(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[0, 1, -1, -1, -1]]
    with pytest.raises(AttentionError, match="k >= 1"):
        select(torch.zeros(1, 2), 0)


def test_block_means_of_a_short_block_and_of_padding() -> None:
    x = torch.arange(7.0).view(1, 1, 7, 1)
    assert block_means(x, 3).flatten().tolist() == [1.0, 4.0, 6.0]
    mask = torch.tensor([[True, False, False, False, False, False, True]])
    assert block_means(x, 3, mask).flatten().tolist() == [0.0, 0.0, 6.0]


def test_gather_blocks() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1)
    index = torch.tensor([[[[0, 2], [1, -1]]]])
    assert gather_blocks(x, index, 2)[0, 0, :, :, 0].tolist() == [[0.0, 1.0, 4.0, 0.0], [2.0, 3.0, 0.0, 1.0]]


def _qkv(heads: int, shared: int, nq: int, nk: int) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (2, heads, nq, 8), (2, shared, nk, 8), (2, shared, nk, 6)
    q, k, v = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return q, k, v


def _dense(q: Tensor, k: Tensor, v: Tensor, index: Tensor, size: int, allowed: Tensor) -> Tensor:
    """The definition: softmax over the selected tokens that are allowed `(B, 1, Nq, Nk)`."""
    number = -(-k.shape[2] // size)
    chosen = F.one_hot(torch.where(index < 0, number, index), number + 1).sum(-2)[..., :number] > 0
    seen = chosen.repeat_interleave(size, -1)[..., : k.shape[2]]
    seen = seen.repeat_interleave(q.shape[1] // index.shape[1], 1) & allowed
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -1e30).softmax(-1)
    return (weights * seen) @ v


def _assert_same(got: Tensor, want: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Of values and of gradients."""
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    ours, theirs = (torch.autograd.grad(out, inputs, cotangent, retain_graph=True) for out in (got, want))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("selected_by", [1, 2, 4])
@pytest.mark.parametrize("gathered", [1, 2**22])
@pytest.mark.parametrize(
    ("nq", "nk", "rows", "size", "causal"),
    [(37, 37, 8, 4, True), (20, 37, 5, 5, False), (21, 29, 6, 1, True), (2, 29, 8, 8, True)],
)
def test_queries_of_a_block_share_what_they_selected(
    monkeypatch: pytest.MonkeyPatch,
    selected_by: int,
    gathered: int,
    nq: int,
    nk: int,
    rows: int,
    size: int,
    causal: bool,
) -> None:
    monkeypatch.setattr(selecting, "GATHERED", gathered)
    q, k, v = _qkv(4, 2, nq, nk)
    before = (nk - nq) % rows
    blocks = -(-(before + nq) // rows)
    scores = torch.randn(2, selected_by, blocks, -(-nk // size))
    index = select(scores.masked_fill(scores < -0.5, -torch.inf), 3)
    mask = torch.rand(2, nk) > 0.3
    allowed = mask[:, None, None].expand(2, 1, nq, nk)
    allowed = allowed.tril(nk - nq) if causal else allowed
    each = index.repeat_interleave(rows, 2)[:, :, before : before + nq]
    want = _dense(q, k, v, each, size, allowed)
    got = attend_shared(q, k, v, index, rows=rows, size=size, causal=causal, mask=mask)
    _assert_same(got, want, (q, k, v))


def test_blocks_of_queries_that_do_not_fit_are_told() -> None:
    q, k, v = _qkv(2, 2, 20, 20)
    with pytest.raises(AttentionError, match="20 queries lie in 3 blocks of 8, not 2"):
        attend_shared(q, k, v, torch.zeros(1, 1, 2, 1, dtype=torch.long), rows=8, size=8)


FORMS = ["_dense", "_gathered", "_by_block"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("selected_by", [1, 2, 4])
@pytest.mark.parametrize(
    ("nq", "nk", "size", "causal"), [(37, 37, 4, True), (20, 37, 5, False), (5, 11, 3, True)]
)
def test_attend_blocks_is_the_definition(
    monkeypatch: pytest.MonkeyPatch, form: str, selected_by: int, nq: int, nk: int, size: int, causal: bool
) -> None:
    monkeypatch.setattr(selecting, "_form", lambda *_: getattr(selecting, form))
    q, k, v = _qkv(4, 2, nq, nk)
    scores = torch.randn(2, selected_by, nq, -(-nk // size))
    index = select(scores.masked_fill(scores < -0.5, -torch.inf), 3)
    mask = torch.rand(2, nk) > 0.3
    allowed = mask[:, None, None].expand(2, 1, nq, nk)
    allowed = allowed.tril(nk - nq) if causal else allowed
    want = _dense(q, k, v, index, size, allowed)
    got = attend_blocks(q, k, v, index, size, causal=causal, mask=mask)
    _assert_same(got, want, (q, k, v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("selected_by", [1, 2, 4])
def test_queries_that_say_what_they_reach(
    monkeypatch: pytest.MonkeyPatch, form: str, selected_by: int
) -> None:
    """From a first to a last key of their own, more queries than keys, and some that see none."""
    monkeypatch.setattr(selecting, "_form", lambda *_: getattr(selecting, form))
    q, k, v = _qkv(4, 2, 40, 22)
    index = select(torch.randn(2, selected_by, 40, 6), 4)
    first, last = (torch.randint(start, 22, (2, selected_by, 40)) for start in (0, -1))
    reach = torch.stack([first, last], -1)
    mask, place = torch.rand(2, 22) > 0.3, torch.arange(22)
    within = (place >= reach[..., :1]) & (place <= reach[..., 1:])
    allowed = within.repeat_interleave(4 // selected_by, 1) & mask[:, None, None]
    want = _dense(q, k, v, index, 4, allowed)
    got = attend_blocks(q, k, v, index, 4, reach=reach, mask=mask)
    _assert_same(got, want, (q, k, v))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["reference", "blocked", "sdpa"])
def test_forms_on_every_backend(monkeypatch: pytest.MonkeyPatch, name: str, form: str) -> None:
    q, k, v = _qkv(4, 2, 9, 13)
    index = select(torch.randn(2, 1, 9, 5), 2)
    want = _dense(q, k, v, index, 3, torch.ones(2, 1, 9, 13, dtype=torch.bool).tril(4))
    monkeypatch.setattr(selecting, "_form", lambda *_: getattr(selecting, form))
    with backend(name):
        torch.testing.assert_close(attend_blocks(q, k, v, index, 3), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_query_that_selects_nothing_gets_zeros(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(selecting, "_form", lambda *_: getattr(selecting, form))
    q, k, v = (x.to(dtype) for x in _qkv(2, 2, 20, 20))
    out = attend_blocks(q, k, v, torch.full((2, 1, 20, 2), -1), 4)
    assert out.shape == (2, 2, 20, 6)
    assert not out.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("form", FORMS)
def test_forms_compile_without_breaks(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """With so many queries that those forms that work in parts do."""
    monkeypatch.setattr(selecting, "_form", lambda *_: getattr(selecting, form))
    torch.compiler.reset()
    q, k, v = _qkv(2, 1, 600, 600)
    index = select(torch.randn(2, 1, 600, 75).masked_fill(torch.rand(2, 1, 600, 75) < 0.1, -torch.inf), 40)
    compiled = torch.compile(attend_blocks, fullgraph=True, backend="eager")
    got, want = compiled(q, k, v, index, 8), attend_blocks(q, k, v, index, 8)
    _assert_same(got, want, (q, k, v))


def test_rows_in_parts_are_the_whole() -> None:
    """And the gradient, although the parts are computed again for it."""
    q, k = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (9, 13))

    def part(q: Tensor, seen: int) -> Tensor:
        return attend(q, k[:, :, :seen], k[:, :, :seen], pattern=Causal())

    whole = part(q, 13)
    for rows in (1, 4, 9):
        _assert_same(by_rows(part, q, keys=13, rows=rows), whole, (q, k))


def test_bad_selections() -> None:
    q, k, v = _qkv(4, 2, 8, 8)
    with pytest.raises(AttentionError, match="fit neither 4 query nor 2 key heads"):
        attend_blocks(q, k, v, torch.zeros(2, 3, 8, 1, dtype=torch.long))
    with pytest.raises(AttentionError, match=r"\(B, I, Nq, S\)"):
        attend_blocks(q, k, v, torch.zeros(2, 8, 1, dtype=torch.long))
    index = torch.zeros(2, 1, 8, 1, dtype=torch.long)
    with pytest.raises(AttentionError, match="int64"):
        attend_blocks(q, k, v, index.int())
    with pytest.raises(AttentionError, match="reach is int64"):
        attend_blocks(q, k, v, index, reach=index)
    with pytest.raises(AttentionError, match="key mask"):
        attend_blocks(q, k, v, index, mask=torch.ones(2, 7, dtype=torch.bool))


@pytest.mark.parametrize("group", [1, 3])
def test_native_sparse_of_all_blocks_is_causal(group: int) -> None:
    q, k, v = _qkv(2 * group, 2, 21, 21)
    found = native_sparse(q, k, v, block_size=4, num_selected=6)
    torch.testing.assert_close(found.selected, attend(q, k, v, pattern=Causal()))
    assert not found.compressed[:, :, :3].any()
    assert found.compressed[:, :, 3].all()


def test_moba_of_all_blocks_is_causal() -> None:
    q, k, v = _qkv(4, 2, 21, 21)
    out = block_mixture(q, k, v, block_size=4, num_selected=6)
    torch.testing.assert_close(out, attend(q, k, v, pattern=Causal()))


def test_dsa_of_all_tokens_is_causal() -> None:
    layer = LightningIndexed(16, 4, num_selected=N)
    dense = LightningIndexed(16, 4, num_selected=10 * N, index_heads=1)
    dense.load_state_dict(
        layer.state_dict() | {f"indexer.{k}": v for k, v in dense.indexer.state_dict().items()}
    )
    x = torch.randn(2, N, 16)
    with capture() as maps:
        torch.testing.assert_close(layer(x), dense(x))
    assert (maps["LightningIndexed"].weights > 0).equal(torch.ones(2, 4, N, N).tril() > 0)


def test_landmark_weights_sum_to_one_and_none_falls_on_landmarks() -> None:
    q, k, v = _qkv(2, 2, 23, 23)
    landmarks = torch.rand(2, 23) < 0.3
    landmarks[:, 0] = False
    landmarks &= ~landmarks.roll(1, 1)  # no two beside each other: every block holds a token
    with capture() as maps:
        attend(q, k, v, pattern=Causal(), kernel=GroupedSoftmax(landmarks))
    weights = maps["attend"].weights
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert not weights.masked_select(landmarks[:, None, None]).any()


def test_landmark_without_landmarks_is_causal() -> None:
    q, k, v = _qkv(2, 2, 9, 9)
    out = attend(q, k, v, pattern=Causal(), kernel=GroupedSoftmax(torch.zeros(1, 9, dtype=torch.bool)))
    torch.testing.assert_close(out, attend(q, k, v, pattern=Causal()))


def test_landmark_kernel_checks_its_tokens() -> None:
    q, k, v = _qkv(2, 2, 9, 9)
    with pytest.raises(AttentionError, match="8 tokens do not fit 9 keys"):
        attend(q, k, v, kernel=GroupedSoftmax(torch.zeros(1, 8, dtype=torch.bool)))
    with pytest.raises(AttentionError, match="landmarks are bool"):
        GroupedSoftmax(torch.zeros(1, 8))


def test_routing_of_one_cluster_is_dense() -> None:
    q, k, v = (torch.randn(2, 3, 10, 4, dtype=torch.float64) for _ in range(3))
    heads = RoutedHeads(3, 4, num_clusters=1, window_size=99).double().eval()
    out, _ = heads(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v) / (1 + 1e-5))


def test_routing_trains_its_means() -> None:
    heads = RoutedHeads(2, 4, num_clusters=3, window_size=4)
    q = torch.randn(2, 2, 9, 4)
    before = heads.kmeans.means.clone()
    heads(q, q, q)
    started = heads.kmeans.means.clone()
    assert heads.kmeans.initted
    assert not started.equal(before)
    heads(q, q, q)
    assert (heads.kmeans.means - started).norm() < 0.05 * started.norm()
    after = heads.kmeans.means.clone()
    heads.eval()(q, q, q)
    assert heads.kmeans.means.equal(after)


def test_routing_keeps_padded_tokens_out_of_clusters() -> None:
    """With the published order, padded tokens take places; here the result is that of the bare row."""
    q, k, v = (torch.randn(1, 2, 9, 4) for _ in range(3))
    padded = [F.pad(x, (0, 0, 0, 5), value=3.0) for x in (q, k, v)]
    mask = torch.arange(14)[None] < 9
    heads = RoutedHeads(2, 4, num_clusters=3, window_size=4).eval()
    published = RoutedHeads(2, 4, num_clusters=3, window_size=4, mask_first=False).eval()
    published.load_state_dict(heads.state_dict())
    want = heads(q, k, v)
    got = heads(*padded, mask, mask)
    torch.testing.assert_close(got[0][:, :, :9], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert not torch.allclose(published(*padded, mask, mask)[0][:, :, :9], want[0])


def test_routing_loss_and_context() -> None:
    layer = Routing(16, 2, num_clusters=3, window_size=6, shared_qk=True)
    layer(torch.randn(2, N, 16))
    assert layer.aux_loss.requires_grad
    assert 0 < layer.aux_loss < 1e-3
    with pytest.raises(AttentionError, match="no context"):
        layer(torch.randn(2, N, 16), context=torch.randn(2, 8, 16))


def test_memory_gets_no_gradient() -> None:
    layer = HierarchicalMemory(16, 2, chunk_size=4, k=2)
    x, memory = torch.randn(2, 3, 16), torch.randn(2, 12, 16, requires_grad=True)
    layer(x, context=memory).sum().backward()
    assert memory.grad is None
    assert layer.query.weight.grad is not None


def test_memory_reads_the_chunk_that_it_asks_for() -> None:
    """With one chunk per token and no projections to hide it, a token reads its own copy in the memory."""
    layer = HierarchicalMemory(16, 2, chunk_size=1, k=1, position_encoding=False)
    within = layer.within_mem_attn
    with torch.no_grad():
        for linear in (layer.query, layer.key, within.value, within.linear):
            linear.weight.copy_(torch.eye(16))
        for linear in (within.value, within.linear):
            linear.bias.zero_()
    memory = F.normalize(torch.randn(2, 12, 16), dim=-1)
    torch.testing.assert_close(layer(memory[:, 4:7], context=memory), memory[:, 4:7])


def test_indexer_learns_what_attention_looks_at() -> None:
    layer = LightningIndexed(16, 2, num_selected=8, index_heads=4, index_dim=8)
    x = torch.randn(2, N, 16) * 3
    optimiser = torch.optim.Adam(layer.indexer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = layer.indexer_loss(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad is None for name, p in layer.named_parameters() if not name.startswith("indexer."))


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
@pytest.mark.parametrize("chunk", [1, 7, N])
def test_steps_equal_the_full_forward(make: Callable[[], AttentionLayer], chunk: int) -> None:
    layer, x = make(), torch.randn(2, N, 16)
    cache = layer.init_cache(2)
    steps = [layer.step(part, cache) for part in x.split(chunk, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x).detach(), atol=2e-6, rtol=1e-5)


def test_block_cache_keeps_the_means_of_whole_blocks() -> None:
    layer = NativeSparse(16, 4, num_kv_heads=2, block_size=4)
    cache = layer.init_cache(2)
    layer.step(torch.randn(2, 10, 16), cache)
    # B Hk D floats, k and v, of tokens and blocks; and which tokens are real.
    assert cache.nbytes() == 2 * 2 * 4 * 4 * 2 * (10 + 2) + 2 * 10


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_gradients_in_float64(make: Callable[[], AttentionLayer]) -> None:
    layer = make().double().eval()
    x = torch.randn(1, 8, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_capture_finds_the_layers(make: Callable[[], AttentionLayer]) -> None:
    layer, x = make().eval(), torch.randn(2, N, 16)
    with capture(scores=True) as maps:
        out = layer(x)
    torch.testing.assert_close(out, layer(x), atol=2e-6, rtol=1e-5)
    assert all(m.weights.isfinite().all() for m in maps.values())
    if layer.causal:  # whole maps of all heads, whatever the form that runs otherwise
        assert all(m.weights.shape[:3] == (2, 4, N) for m in maps.values())


def test_many_keys_cost_linear_memory() -> None:
    """Only the blocks selected are read: no tensor has N x N entries, or copies the keys of each query."""
    tokens, size, slots = 4096, 64, 4
    q, k, v = torch.randn(1, 4, tokens, 8), torch.randn(1, 1, tokens, 8), torch.randn(1, 1, tokens, 8)
    index = torch.randint(tokens // size // slots, (1, 1, tokens, slots)) + torch.arange(slots) * (
        tokens // size // slots
    )
    with torch.profiler.profile(profile_memory=True) as profile:
        attend_blocks(q, k, v, index, size, causal=False)
    largest = max(event.cpu_memory_usage for event in profile.events() or ())
    assert largest < 4 * tokens * size * slots * 8 * 4 / 2  # half of the keys of all queries, in bytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NativeSparse(16, 4, num_kv_heads=3), "not divisible by 3"),
        (lambda: NativeSparse(15, 4), "width 15 is not divisible"),
        (lambda: NativeSparse(12, 4), "rotary_dim is even"),
        (lambda: NativeSparse(16, 4, window=0), "at least one key"),
        (lambda: BlockMixture(16, 4, block_size=0), "at least one token"),
        (lambda: LightningIndexed(16, 4, num_selected=0), "at least one token"),
        (lambda: LightningIndexed(16, 4, index_dim=5), "even width of the indexer"),
        (lambda: Landmark(16, 4, block_size=1), "a token and its landmark"),
        (lambda: Routing(16, 3), "not divisible by 3 heads"),
        (lambda: Routing(16, 2, num_clusters=0), "at least one cluster"),
        (lambda: HierarchicalMemory(16, 2, k=0), "at least one token"),
    ],
)
def test_bad_settings(make: Callable[[], AttentionLayer], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        make()


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
def test_padded_rows_decode(make: Callable[[], AttentionLayer]) -> None:
    """A prompt with padding at its end, then further tokens: the same as in one pass."""
    layer, x = make(), torch.randn(2, N, 16)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 7:13] = False
    cache, whole = layer.init_cache(2), layer(x, mask=mask).detach()
    with torch.no_grad():
        prompt = layer(x[:, :13], mask=mask[:, :13], cache=cache)
    parts = torch.cat([prompt, *(layer.step(t, cache) for t in x[:, 13:].split(1, 1))], 1)
    torch.testing.assert_close(parts[mask], whole[mask], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
def test_parts_of_rows_change_nothing(
    make: Callable[[], AttentionLayer], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = make(), torch.randn(2, N, 16)
    whole = layer(x)
    loss = layer.indexer_loss(x) if isinstance(layer, LightningIndexed) else None
    monkeypatch.setattr(selecting, "ROWS", 5)
    torch.testing.assert_close(layer(x), whole)
    if isinstance(layer, LightningIndexed):
        torch.testing.assert_close(layer.indexer_loss(x), loss)


@pytest.mark.parametrize("option", ["causal", "dropout", "context_dim", "window"])
def test_options_that_selection_does_not_have(option: str) -> None:
    with pytest.raises(AttentionError, match=f"takes no {option}"):
        LightningIndexed(16, 4, **{option: 1})
