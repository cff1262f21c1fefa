"""What holds for every sparse layer that is known by its definition only."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo.attention.layers.spans as spans
from zoo.attention import AttentionError, backend, capture
from zoo.attention.layers.clustered import HierarchicalSparse, Squeezed
from zoo.attention.layers.core_context import CoreContext
from zoo.attention.layers.fixed import PowerAttention, Subsampled
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.layers.reused import FrozenBlocks, Recycled, freezing, thaw
from zoo.attention.layers.spans import Superlinear
from zoo.bench.memory import peak_memory

selecting = importlib.import_module("zoo.attention.select")  # the package has its function of that name
N = 24
DHSA = {"num_selected": 9, "num_global": 2, "num_local": 3, "num_instruction": 0, "chunk_size": 4}
LAYERS: dict[str, tuple[type[MultiHead], dict[str, Any]]] = {
    "core_context": (CoreContext, {"group_size": 3, "window": 4}),
    "power": (PowerAttention, {"block_size": 2, "window": 1}),
    "sparsed": (FrozenBlocks, {"block_size": 4}),
    "squeezed": (Squeezed, {"clusters": 0.3, "threshold": 0.02}),
    "recycled": (Recycled, {"num_kept": 4, "stride": 3}),
    "dhsa": (HierarchicalSparse, DHSA),
    "dhsa_learned": (HierarchicalSparse, {**DHSA, "chunks": "learned"}),
    "ssa": (Subsampled, {}),
    "superlinear": (Superlinear, {}),
}
SPARSE = ["core_context", "power", "dhsa", "dhsa_learned", "superlinear"]  # in any forward pass
DENSE: dict[str, dict[str, Any]] = {
    "core_context": {"window": N},
    "core_context_of_single_tokens": {"group_size": 1, "window": 2},
    "core_context_of_one_group": {"group_size": 2 * N, "window": 1},
    "power": {"block_size": N},
    "power_of_a_wide_window": {"block_size": 2, "window": N},
    "dhsa": {"num_selected": N},
    "dhsa_of_instruction": {"num_instruction": N},
}


def made(name: str, **options: Any) -> MultiHead:
    layer, settings = LAYERS[name]
    return layer(16, 4, **{**settings, **options})


def name_of(case: str) -> str:
    return case.partition("_of_")[0]


def tokens(batch: int = 2, length: int = N) -> Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def dense_like(layer: MultiHead) -> MultiHead:
    options = {"num_kv_heads": layer.num_kv_heads, "rope_theta": layer.rope_theta, "causal": layer.causal}
    dense = MultiHead(16, 4, **options).double()
    dense.load_state_dict(layer.state_dict(), strict=False)
    return dense


@pytest.mark.parametrize("case", DENSE)
def test_everything_selected_is_dense_causal(case: str) -> None:
    layer = made(name_of(case), num_kv_heads=2, **DENSE[case]).double().eval()
    x, mask = tokens(), torch.rand(2, N) < 0.8
    mask[:, 0] = True
    close(layer(x), dense_like(layer)(x))
    close(layer(x, mask=mask)[mask], dense_like(layer)(x, mask=mask)[mask])


@pytest.mark.parametrize("name", ["sparsed", "squeezed", "recycled", "ssa"])
def test_before_anything_is_chosen_attention_is_dense(name: str) -> None:
    layer = made(name, num_kv_heads=2).double().eval()
    close(layer(tokens()), dense_like(layer)(tokens()))


@pytest.mark.parametrize("name", SPARSE)
def test_with_these_settings_it_is_sparse(name: str) -> None:
    layer = made(name).double()
    assert not torch.allclose(layer(tokens()), dense_like(layer)(tokens()), atol=1e-3)


@pytest.mark.parametrize("name", ["core_context", "power", "sparsed", "dhsa", "superlinear"])
def test_shared_heads_are_repeated_heads(name: str) -> None:
    shared, full = made(name, num_kv_heads=2).double(), made(name).double()
    state = shared.state_dict()
    for key in ("k_proj.weight", "v_proj.weight"):
        state[key] = state[key].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(state)
    for layer in (shared, full):
        if isinstance(layer, FrozenBlocks):
            layer.freeze(tokens())
    close(shared(tokens()), full(tokens()))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_float64(name: str) -> None:
    layer = made(name, num_kv_heads=2).double().eval()
    x = tokens(1, 11).requires_grad_()
    if isinstance(layer, FrozenBlocks):
        layer.freeze(x.detach())
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


@pytest.mark.parametrize("name", SPARSE)
def test_parts_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = made(name, num_kv_heads=2).double(), tokens().requires_grad_()
    mask = torch.arange(N) < torch.tensor([[N], [17]])

    def both() -> tuple[Tensor, Tensor]:
        y = layer(x, mask=mask)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    want = both()
    monkeypatch.setattr(selecting, "ROWS", 5)
    monkeypatch.setattr(selecting, "GATHERED", 1)
    monkeypatch.setattr(spans, "GATHERED", 500)
    for got, expected in zip(both(), want, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", ["core_context", "power", "squeezed", "dhsa", "dhsa_learned", "superlinear"])
def test_padded_rows_decode(name: str) -> None:
    """A prompt with padding at its end, then further tokens: the same as in one pass."""
    layer, x = made(name, num_kv_heads=2).double(), tokens()
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[1, 7:13] = False
    cache, whole = layer.init_cache(2), layer(x, mask=mask).detach()
    with torch.no_grad():
        prompt = layer(x[:, :13], mask=mask[:, :13], cache=cache)
    parts = torch.cat([prompt, *(layer.step(t, cache) for t in x[:, 13:].split(1, 1))], 1)
    close(parts[mask], whole[mask])
    other = torch.where(mask[..., None], x, 9.0)
    close(layer(other, mask=mask)[mask], whole[mask])


@pytest.mark.parametrize("name", [*SPARSE, "squeezed", "recycled"])
def test_a_cache_that_is_sparse_does_not_depend_on_the_batch(name: str) -> None:
    layer, x = made(name, num_kv_heads=2).double().eval(), tokens(3)
    rows = []
    for part in (x, x[1:2]):
        cache = layer.init_cache(len(part))
        outs = [layer.step(part[:, :12], cache)]
        if isinstance(layer, Squeezed):
            layer.squeeze(cache)  # type: ignore[arg-type]
        rows.append(torch.cat([*outs, *(layer.step(t, cache) for t in part[:, 12:].split(1, 1))], 1))
    close(rows[0][1:2], rows[1])


@pytest.mark.parametrize("way", ["reference", "blocked", "sdpa"])
@pytest.mark.parametrize("name", [*SPARSE, "sparsed"])
def test_backends_agree(name: str, way: str) -> None:
    layer, x = made(name, num_kv_heads=2).double(), tokens()
    if isinstance(layer, FrozenBlocks):
        layer.freeze(x)
    want = layer(x)
    with backend(way):
        close(layer(x), want)


@pytest.mark.parametrize("name", SPARSE)
def test_capture_sees_the_same(name: str) -> None:
    layer, x = made(name).double().eval(), tokens()
    with capture() as maps:
        got = layer(x)
    close(got, layer(x))
    assert all(m.weights.isfinite().all() for m in maps.values())


@pytest.mark.parametrize("name", ["core_context", "power", "sparsed", "dhsa", "ssa", "superlinear"])
def test_training_compiles_without_graph_break(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(selecting, "ROWS", 16)
    layer, x = made(name), tokens().float()
    if isinstance(layer, FrozenBlocks):
        layer.freeze(x)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    got = compiled(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, layer(x))


@pytest.mark.parametrize("name", [*SPARSE, "sparsed", "squeezed"])
def test_memory_is_not_quadratic(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the tokens take about twice the memory, forward and backward."""
    monkeypatch.setattr(selecting, "ROWS", 32)
    monkeypatch.setattr(selecting, "GATHERED", 2**15)
    monkeypatch.setattr(spans, "GATHERED", 2**15)
    options = {"block_size": 16} if name in ("power", "sparsed") else {}
    layer = made(name, **options)

    def peak(length: int) -> int:
        x = torch.randn(1, length, 16, requires_grad=name != "squeezed")
        if isinstance(layer, FrozenBlocks):
            layer.freeze(x.detach())
        if isinstance(layer, Squeezed):
            cache = layer.init_cache(1)
            layer.step(x[:, : length // 2], cache)
            layer.squeeze(cache)  # type: ignore[arg-type]
            return peak_memory(lambda: layer.step(x[:, length // 2 :], cache), x.device)
        return peak_memory(lambda: layer(x).sum().backward(), x.device)

    assert peak(1024) < 2.7 * peak(512)


def test_blocks_freeze_in_all_layers_of_a_model_at_once() -> None:
    model = nn.Sequential(*(FrozenBlocks(16, 4, block_size=4) for _ in range(2))).double()
    x = tokens()
    full = model(x)
    with freezing(model):
        close(model(x), full)
    assert all(layer.frozen is not None for layer in model)
    assert not torch.allclose(model(x), full)
    with pytest.raises(AttentionError, match="frozen for 2 rows of 24, not for 2 of 23 tokens"):
        model(x[:, :-1])
    thaw(model)
    close(model(x), full)
    with pytest.raises(AttentionError, match="no 'sparsed' layer"), freezing(nn.Linear(1, 1)):
        pass


def test_all_blocks_frozen_is_full_attention() -> None:
    layer = FrozenBlocks(16, 4, num_kv_heads=2, block_size=4, share=1.0).double()
    close(layer.freeze(tokens()), layer(tokens()))


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("sparsed", "ssa")])
def test_a_sequence_shorter_than_anything(name: str) -> None:
    sizes = {
        "core_context": {"group_size": 64, "window": 128},
        "power": {"block_size": 256},
        "dhsa": {"num_selected": 999, "num_global": 99, "chunk_size": 64, "num_instruction": 64},
    }
    layer = made(name, **sizes.get(name, {})).double().eval()
    close(layer(tokens(length=2)), dense_like(layer)(tokens(length=2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CoreContext(16, 4, group_size=0), "a group has at least one token"),
        (lambda: CoreContext(16, 4, window=0), "a window the query's own"),
        (lambda: PowerAttention(16, 4, block_size=0), "blocks have at least one token"),
        (lambda: PowerAttention(16, 4, window=0), "a window its own block"),
        (lambda: Subsampled(16, 4, share=0), "a share lies in"),
        (lambda: Subsampled(16, 4, locality=-1), "locality is not negative"),
        (lambda: FrozenBlocks(16, 4, share=1.5), "a share lies in"),
        (lambda: FrozenBlocks(16, 4, causal=True), "takes no causal"),
        (lambda: Recycled(16, 4, stride=0), "at least one step"),
        (lambda: Squeezed(16, 4, clusters=0), "a share in"),
        (lambda: Squeezed(16, 4, clusters=0.1, coarse_clusters=0.2), "coarse ones at most as many"),
        (lambda: Squeezed(16, 4, threshold=1), "thresholds lie in"),
        (lambda: HierarchicalSparse(16, 4, num_selected=200), "hold the global and the local"),
        (lambda: HierarchicalSparse(16, 4, chunk_size=0), "a chunk has at least one token"),
        (lambda: HierarchicalSparse(16, 4, chunks="words"), "'uniform' or 'learned'"),  # type: ignore[arg-type]
        (lambda: HierarchicalSparse(16, 4, pooled_queries=True).init_cache(1), "pooled_queries=False"),
        (lambda: Superlinear(16, 4, num_spans=0), "at least one span"),
        (lambda: Superlinear(16, 4, window=4), "takes no window"),
        (lambda: _decoded_in_training(), "call eval()"),
        (lambda: (layer := Squeezed(16, 4)).squeeze(layer.init_cache(1)), "holds a context"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError) as error:
        make()
    assert message in str(error.value)


def _decoded_in_training() -> None:
    layer = Subsampled(16, 4, causal=True)
    cache = layer.init_cache(1)
    layer.step(tokens(1, 4).float(), cache)
    layer.step(tokens(1, 1).float(), cache)
