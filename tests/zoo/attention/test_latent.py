"""Layers that attend in a narrow latent space: MLA and CCA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, Causal, Dense, Pattern, Window, attend
from zoo.attention.layers import create_attention
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.compressed import CompressedConvolutional
from zoo.attention.layers.latent import MultiHeadLatent, TensorParallelLatent, rotation_matrix, shard_latent
from zoo.attention.yarn import Yarn

DIM, TOKENS = 24, 9
YARN = Yarn(factor=4.0, original_length=8, mscale=1.0, mscale_all_dim=0.5)


def mla(**options: Any) -> MultiHeadLatent:
    torch.manual_seed(0)
    given: dict[str, Any] = {"kv_rank": 10, "q_rank": 7, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
    return MultiHeadLatent(DIM, 3, **given | options)


def cca(**options: Any) -> CompressedConvolutional:
    torch.manual_seed(0)
    given: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 4}
    return CompressedConvolutional(DIM, 4, **given | options)


def tpla(**options: Any) -> TensorParallelLatent:
    torch.manual_seed(0)
    given: dict[str, Any] = {"kv_rank": 8, "q_rank": 7, "nope_dim": 6, "rope_dim": 4, "value_dim": 5}
    return TensorParallelLatent(DIM, 3, **given | options)


LAYERS: dict[str, Callable[[], AttentionLayer]] = {
    "mla": mla,
    "mla plain": lambda: mla(q_rank=None, bias=True, query_bias=True, interleaved=False, latent_norm=False),
    "mla yarn": lambda: mla(yarn=YARN),
    "tpla": tpla,
    "tpla four": lambda: tpla(shards=4, kv_rank=12, rotation="identity", q_rank=None),
    "cca": cca,
    "cca window": lambda: cca(window=3, kernels=(3, 1), bias=True),
    "cca one head": lambda: cca(num_kv_heads=1, kernels=(1, 4)),
}


@pytest.fixture(params=LAYERS.values(), ids=list(LAYERS))
def layer(request: pytest.FixtureRequest) -> AttentionLayer:
    return request.param()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))


def test_steps_equal_the_full_pass(layer: AttentionLayer, x: Tensor) -> None:
    cache = layer.init_cache(2)
    parts = [layer.step(part, cache) for part in x.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), atol=1e-5, rtol=1e-5)
    assert cache.length == TOKENS


def test_steps_after_a_padded_prompt(layer: AttentionLayer, x: Tensor) -> None:
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, :3] = False
    whole = layer(x, mask=mask)
    cache = layer.init_cache(2)
    parts = [
        layer(x[:, :6], mask=mask[:, :6], cache=cache),
        *(layer.step(t, cache) for t in x[:, 6:].split(1, 1)),
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:], whole[:, 3:], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(whole).all()


def test_a_padded_row_equals_the_row_alone(layer: AttentionLayer, x: Tensor) -> None:
    mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [6]])
    torch.testing.assert_close(layer(x, mask=mask)[1, :6], layer(x[1:, :6])[0], atol=1e-5, rtol=1e-5)


def test_left_padding_changes_nothing_without_bias(x: Tensor) -> None:
    mask = torch.arange(TOKENS) >= torch.tensor([[0], [4]])
    for layer in (mla(), cca(), cca(kernels=(4, 3))):
        alone = layer(x[1:, 4:])[0]
        torch.testing.assert_close(layer(x, mask=mask)[1, 4:], alone, atol=1e-5, rtol=1e-5)


def test_gradients_in_double_precision(layer: AttentionLayer) -> None:
    tokens = torch.randn(1, 4, DIM, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(layer.double(), (tokens,), fast_mode=True)


@pytest.mark.parametrize("pattern", [Dense(), Causal(), Window(3, causal=True)], ids=repr)
def test_absorbed_equals_expanded(pattern: Pattern) -> None:
    layer = mla(yarn=YARN).double()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double, requires_grad=True)

    def both(form: Callable[[Tensor, Tensor, Pattern], Tensor]) -> tuple[Tensor, Tensor]:
        tables = layer.tables(torch.arange(TOKENS))
        out = form(layer.queries(x, *tables), layer.latents(x, *tables), pattern)
        return out, torch.autograd.grad(out.square().sum(), x)[0]

    torch.testing.assert_close(both(layer.absorbed), both(layer.expanded))


def test_the_cheaper_form_is_chosen() -> None:
    layer = MultiHeadLatent(64, 2, kv_rank=512)
    assert layer.absorbs(1, 4096)
    assert not layer.absorbs(4096, 4096)
    assert mla(kv_rank=3).absorbs(TOKENS, TOKENS)  # a latent narrower than the heads always pays


def test_mla_of_documents_and_of_both_directions(x: Tensor) -> None:
    layer = mla()
    ids = torch.tensor([[0] * 4 + [1] * 5] * 2)
    torch.testing.assert_close(layer(x, mask=ids)[:, 4:], layer(x[:, 4:]), atol=1e-5, rtol=1e-5)
    layer = mla(causal=False)
    order = torch.randperm(TOKENS)
    moved = layer(x[:, order], positions=order)
    torch.testing.assert_close(moved, layer(x)[:, order], atol=1e-5, rtol=1e-5)
    each = torch.stack([torch.arange(TOKENS), torch.arange(TOKENS) + 7])
    torch.testing.assert_close(layer(x, positions=each), layer(x), atol=1e-5, rtol=1e-5)


def test_cache_sizes(x: Tensor) -> None:
    latent = mla()
    cache = latent.init_cache(2)
    latent.step(x, cache)
    assert cache.nbytes() == 2 * TOKENS * (4 * (10 + 4) + 1)  # one byte says whether the token is real
    layer = cca(kernels=(3, 2))
    cache = layer.init_cache(2)
    layer.step(x, cache)
    assert cache.nbytes() == 2 * (TOKENS * (4 * 2 * 2 * 4 + 1) + 4 * (3 * 6 * 4 + 4))


def test_cca_without_convolution_is_grouped_attention(x: Tensor) -> None:
    """Zero kernels leave the means of query and key, normalised."""
    layer = cca(kernels=(1, 1))
    for conv in (layer.qkv_proj.conv_qk_depthwise, layer.qkv_proj.conv_qk_grouped):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    q, k, v = layer.qkv_proj(x, None)
    heads = layer.qkv_proj.q_proj(x).view(2, TOKENS, 4, 4).transpose(1, 2)
    keys = layer.qkv_proj.k_proj(x).view(2, TOKENS, 2, 4).transpose(1, 2)
    expected = (heads + keys.repeat_interleave(2, dim=1)) / 2
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(k, (expected[:, 0::2] + expected[:, 1::2]) / 2)
    # Two value heads: the first reads this token, the second the one before.
    torch.testing.assert_close(v[:, 0], layer.qkv_proj.v_proj_current(x))
    torch.testing.assert_close(v[:, 1, 1:], layer.qkv_proj.v_proj_delayed(x)[:, :-1])
    assert not v[:, 1, 0].any()
    unit_q, unit_k = layer.qk_norm(q, k)
    torch.testing.assert_close(unit_q.norm(dim=-1), torch.full((2, 4, TOKENS), 2.0))
    plain = CompressedConvolutional(DIM, 4, num_kv_heads=2, head_dim=4, kernels=(1, 1), rope_theta=1e30)
    plain.load_state_dict(layer.state_dict())
    # With the first pair alone turned, and undone by positions of zero, the rest is attention as it is.
    zeros = torch.zeros(TOKENS, dtype=torch.long)
    mixed = attend(unit_q, unit_k, v, pattern=Causal()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(plain(x, positions=zeros), plain.o_proj(mixed))


def test_a_wide_window_is_causal(x: Tensor) -> None:
    torch.testing.assert_close(cca(window=TOKENS)(x), cca()(x))
    assert not torch.allclose(cca(window=2)(x), cca()(x))


def test_yarn_keeps_fast_and_divides_slow_frequencies() -> None:
    width, theta = 64, 10_000.0
    own = theta ** -(torch.arange(0, width, 2) / width)
    scaled = Yarn(factor=8.0, original_length=4096).frequencies(width, theta, torch.device("cpu"))
    torch.testing.assert_close(scaled[:8], own[:8])
    torch.testing.assert_close(scaled[-4:], own[-4:] / 8)
    assert (scaled[1:] < scaled[:-1]).all()
    same = Yarn(factor=1.0, original_length=4096)
    torch.testing.assert_close(same.frequencies(width, theta, torch.device("cpu")), own)
    assert same.table_scale == same.score_scale == 1.0


@pytest.mark.parametrize("calibrated", [False, True])
def test_one_shard_is_mla(x: Tensor, calibrated: bool) -> None:
    layer, x = mla(kv_rank=8, yarn=YARN, bias=True).double(), x.double()
    sharded = shard_latent(layer, 1, x if calibrated else None)
    torch.testing.assert_close(sharded(x), layer(x), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_attend_by_themselves_and_are_summed(x: Tensor, shards: int) -> None:
    layer, x = mla(kv_rank=8).double(), x.double()
    sharded = shard_latent(layer, shards)
    cos, sin = layer.tables(torch.arange(TOKENS))
    q, latent = layer.queries(x, cos, sin), layer.latents(x, cos, sin)[:, 0]
    turn, width = rotation_matrix("hadamard", 8), 8 // shards
    turned, up = latent[..., :8] @ turn, layer.kv_b_proj.weight.unflatten(0, (3, -1)) @ turn
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    out = torch.zeros(2, 3, TOKENS, 5, dtype=torch.double)
    for shard in range(shards):
        part = slice(shard * width, (shard + 1) * width)
        for head in range(3):
            kv = turned[..., part] @ up[head][:, part].T
            scores = q[:, head, :, :6] @ kv[..., :6].mT + q[:, head, :, 6:] @ latent[..., 8:].mT
            weights = (scores * layer.scale).masked_fill(future, -torch.inf).softmax(-1)
            out[:, head] += weights @ kv[..., 6:]
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(sharded(x), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("pattern", [Dense(), Causal(), Window(3, causal=True)], ids=repr)
def test_absorbed_shards_equal_expanded_ones(pattern: Pattern) -> None:
    layer = tpla(yarn=YARN).double()
    x = torch.randn(2, TOKENS, DIM, dtype=torch.double)
    tables = layer.tables(torch.arange(TOKENS))
    given = layer.queries(x, *tables), layer.latents(x, *tables), pattern
    torch.testing.assert_close(layer.absorbed(*given), layer.expanded(*given), atol=1e-12, rtol=1e-10)
    assert TensorParallelLatent(64, 2, kv_rank=512).absorbs(1, 4096)
    assert not TensorParallelLatent(64, 2, kv_rank=512).absorbs(4096, 4096)


def test_rotations_are_orthogonal(x: Tensor) -> None:
    for turn in (rotation_matrix("hadamard", 16), shard_latent(mla(kv_rank=6), 3, x).turn.double()):
        torch.testing.assert_close(turn @ turn.T, torch.eye(len(turn)).double(), atol=1e-6, rtol=0)
    assert (rotation_matrix("hadamard", 16).abs() == 0.25).all()
    latents = mla(kv_rank=6, latent_norm=False)
    sharded = shard_latent(latents, 3, x)
    c = sharded.latents(x, *sharded.tables(torch.arange(TOKENS)))[..., :6].flatten(0, 2)
    energy = (c.T @ c).diagonal()
    torch.testing.assert_close(c.T @ c, energy.diag(), atol=1e-4, rtol=0)
    assert (energy.diff() < 0).all()  # the first shard gets the largest components


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mla(rope_dim=3), "rope_dim must be even"),
        (lambda: mla(causal=False).init_cache(1), "only causal layers"),
        (lambda: mla().step(torch.zeros(1, 1, DIM), mla().init_cache(1)), "another layer"),
        (lambda: tpla(shards=3), "rank 8 is not divisible by 3 shards"),
        (lambda: tpla(kv_rank=12), "power of two"),
        (lambda: tpla(rotation="pca"), "not 'pca'"),
        (lambda: shard_latent(tpla(), 2), "not from TensorParallelLatent"),
        (lambda: cca(num_kv_heads=3), "not divisible by 3"),
        (lambda: cca(num_kv_heads=1, head_dim=3), "no two halves"),
        (lambda: CompressedConvolutional(DIM, 5), "half the width 24 is not divisible by 5 heads"),
        (lambda: cca(kernels=(0, 2)), "at least one token"),
        (lambda: cca(rotary_factor=0.3), "not even"),
        (lambda: cca()(torch.zeros(1, 3, DIM), mask=torch.zeros(1, 3, dtype=torch.long)), "packed documents"),
        (lambda: cca()(torch.zeros(1, 3, DIM), torch.zeros(1, 3, DIM)), "takes no context"),
        (lambda: Yarn(factor=0.5, original_length=8), "YaRN needs factor"),
        (lambda: create_attention("mla", DIM, num_heads=2), "kv_rank"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises((AttentionError, TypeError), match=message):
        call()
