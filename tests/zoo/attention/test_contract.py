"""Every attention layer is held to what it says of itself (`Supports`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError, capture
from zoo.attention.layers import LAYERS, AttentionLayer, auxiliary_loss, create_attention

B, N, DIM, HEADS = 3, 12, 32, 4
SMALL: dict[str, dict[str, Any]] = {
    "abc": {"slots": 4},
    "affine_scaled": {},
    "agent": {"agents": 4},
    "based": {"feature_dim": 4},
    "bias_kv": {},
    "bilevel": {"regions": 3, "topk": 2},
    "cascaded": {"key_dim": 8},
    "cca": {"num_kv_heads": 2, "head_dim": 8},
    "channel_groups": {},
    "core_context": {"group_size": 2, "window": 3},
    "cosformer": {"max_length": 16},
    "deltanet": {},
    "dgqa": {"num_kv_heads": 2},
    "dha": {"key_heads": 2, "value_heads": 1},
    "dhsa": {"num_selected": 6, "num_global": 1, "num_local": 2, "num_instruction": 0, "chunk_size": 3},
    "dsa": {},
    "fit": {"group_size": 4, "latents": 2},
    "forgetting": {},
    "gam": {"slots": 8},
    "gated": {},
    "gated_deltanet": {},
    "gla": {},
    "gsa": {},
    "halo": {"block": 4, "halo": 2},
    "hedgehog": {},
    "hcam": {"chunk_size": 4, "k": 2},
    "head_tokens": {},
    "hilo": {},
    "injective": {},
    "kda": {},
    "kdgqa": {"num_kv_heads": 2},
    "kronecker": {},
    "landmark": {},
    "lightning": {},
    "linear": {},
    "local": {"window": 5},
    "lolcats": {"window": 4},
    "magnitude": {},
    "mla": {"kv_rank": 8},
    "mlstm": {},
    "moba": {},
    "moh": {"shared_heads": 1, "routed_heads": 2},
    "moh_aggregated": {"shared_heads": 1, "routed_heads": 2, "sr_ratio": 4},
    "moh_cosine": {"shared_heads": 2, "routed_heads": 1},
    "moh_llama": {},
    "multihead": {},
    "neighbourhood": {"kernel": 3},
    "nsa": {},
    "nystrom": {"landmarks": 4},
    "pgqa": {"num_kv_heads": 2},
    "power": {"block_size": 2},
    "qwen3_next": {},
    "rcmha": {"max_length": 16},
    "rebased": {},
    "recycled": {"num_kept": N},
    "retention": {},
    "routing": {"num_clusters": 3},
    "s2": {"num_groups": 2},
    "shifted_window": {"window": 4},
    "simple_gla": {},
    "simplicial": {"num_kv_heads": 2},
    "sinks": {},
    "sparsed": {"block_size": 4},
    "squeezed": {},
    "ssa": {},
    "stick_breaking": {},
    "superlinear": {},
    "still": {"num_salient": 3, "window": 4},
    "titans": {"chunk_size": 4},
    "titans_mac": {"segment": 5, "memory": {"chunk_size": 3}},
    "titans_mag": {"window": 4, "memory": {"chunk_size": 4}},
    "titans_mal": {"window": 4, "memory": {"chunk_size": 4}},
    "tpla": {"kv_rank": 8},
}


def build(name: str, causal: bool | None = None) -> AttentionLayer:
    torch.manual_seed(0)
    can = LAYERS[name].supports
    direction = {} if causal is None or not (can.causal and can.bidirectional) else {"causal": causal}
    return create_attention(name, DIM, num_heads=HEADS, **SMALL[name], **direction).eval()


def layers(**wanted: bool) -> pytest.MarkDecorator:
    """One case for each layer whose `supports` has these values."""
    names = [n for n in sorted(SMALL) if all(getattr(LAYERS[n].supports, k) == v for k, v in wanted.items())]
    return pytest.mark.parametrize("name", names)


def tokens(batch: int = B, length: int = N) -> Tensor:
    return torch.randn(batch, length, DIM, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=10 * tolerance)


def test_all_layers_are_tested_here() -> None:
    assert sorted(SMALL) == sorted(LAYERS)


@layers()
def test_maps_tokens_to_tokens_and_every_parameter_gets_a_gradient(name: str) -> None:
    layer = build(name).train()
    x = tokens().requires_grad_()
    y = layer(x)
    assert y.shape == x.shape
    (y.square().sum() + auxiliary_loss(layer)).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert [n for n, p in layer.named_parameters() if p.requires_grad and p.grad is None] == []


@layers()
def test_names_its_paper_and_a_direction(name: str) -> None:
    cls = LAYERS[name]
    assert cls.paper
    assert cls.supports.causal or cls.supports.bidirectional


@layers(causal=True)
def test_causal_layer_does_not_look_ahead(name: str) -> None:
    layer, x = build(name, causal=True), tokens()
    changed = x.clone()
    changed[:, -1] += 1
    before, after = layer(x), layer(changed)
    close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1], atol=1e-4)


@layers(bidirectional=True)
def test_bidirectional_layer_looks_ahead(name: str) -> None:
    layer, x = build(name, causal=False), tokens()
    changed = x.clone()
    changed[:, -1] += 1
    assert not torch.allclose(layer(changed)[:, -2], layer(x)[:, -2], atol=1e-6)


@layers(batch_invariant=True)
def test_a_row_alone_gives_what_it_gives_in_a_batch(name: str) -> None:
    layer, x = build(name), tokens()
    close(layer(x[1:2]), layer(x)[1:2])


@layers(any_length=True)
@pytest.mark.parametrize("length", [1, 7, 13])
def test_takes_any_number_of_tokens(name: str, length: int) -> None:
    y = build(name)(tokens(length=length))
    assert y.shape == (B, length, DIM)
    assert y.isfinite().all()


@layers(padding=True)
def test_padded_row_gives_what_the_row_alone_gives(name: str) -> None:
    layer, x = build(name), tokens()
    real = N if not LAYERS[name].supports.any_length else 8
    mask = torch.arange(N).expand(B, N) < real
    padded = x.masked_fill(~mask[..., None], 7.0)
    y = layer(padded, mask=mask)
    assert y.isfinite().all()
    close(y[:, :real], layer(x[:, :real]))


@layers(padding=True)
def test_row_of_padding_only_gives_no_nan(name: str) -> None:
    x = tokens().requires_grad_()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0] = False
    y = build(name)(x, mask=mask)
    y.sum().backward()
    assert x.grad is not None
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@layers(packed=True, any_length=True)
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    layer, x = build(name), tokens(1)
    ids = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.cat([torch.arange(5), torch.arange(7)])
    y = layer(x, mask=ids, positions=positions)
    close(y[:, :5], layer(x[:, :5]))
    close(y[:, 5:], layer(x[:, 5:]))


@layers(cross=True)
def test_cross_attention_reads_the_context(name: str) -> None:
    layer, x, context = build(name, causal=False), tokens(), tokens(length=8)
    y = layer(x, context)
    assert y.shape == x.shape
    assert not torch.allclose(layer(x, 2 * context), y, atol=1e-5)
    mask = (torch.arange(8) < 4).expand(B, 8)
    if layer.supports.padding:
        close(layer(x, context, mask=mask), layer(x, context[:, :4]))


@layers(cache=True)
def test_steps_equal_the_full_pass(name: str) -> None:
    layer, x = build(name, causal=True), tokens()
    full = layer(x)
    cache = layer.init_cache(B)
    steps = torch.cat([layer.step(x[:, i : i + 1], cache) for i in range(N)], 1)
    close(steps, full, 2e-5)
    assert cache.length == N


@layers(cache=True)
def test_prefill_and_then_steps_equal_the_full_pass(name: str) -> None:
    layer, x = build(name, causal=True), tokens()
    cache = layer.init_cache(B)
    parts = [layer.step(x[:, :7], cache), *(layer.step(x[:, i : i + 1], cache) for i in range(7, N))]
    close(torch.cat(parts, 1), layer(x), 2e-5)


@layers(cache=True)
def test_cache_of_another_layer_is_refused(name: str) -> None:
    with pytest.raises(AttentionError, match="another layer"):
        build(name, causal=True)(tokens(), cache=build(name, causal=True).init_cache(B))


@layers()
def test_what_is_not_supported_is_refused(name: str) -> None:
    layer, x, can = build(name), tokens(), LAYERS[name].supports
    if not can.cross:
        with pytest.raises(AttentionError, match="context"):
            layer(x, context=tokens(length=9))
    if not can.padding:
        with pytest.raises(AttentionError, match="padded"):
            layer(x, mask=torch.ones(B, N, dtype=torch.bool))
    if not can.packed:
        with pytest.raises(AttentionError, match="packed"):
            layer(x, mask=torch.zeros(B, N, dtype=torch.long))
    if not can.cache:
        with pytest.raises(AttentionError, match="cache"):
            layer.init_cache(B)


@layers()
def test_wrong_shapes_are_told(name: str) -> None:
    layer, x = build(name), tokens()
    with pytest.raises(AttentionError, match=str(DIM)):
        layer(x[..., :-1])
    with pytest.raises(AttentionError, match="mask"):
        layer(x, mask=torch.ones(B, N + 1, dtype=torch.bool))
    with pytest.raises(AttentionError, match="mask"):
        layer(x, mask=torch.ones(B, N))
    with pytest.raises(AttentionError, match="positions"):
        layer(x, positions=torch.arange(N + 1))


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"mla", "tpla"}))  # MLA is told all its widths
def test_heads_that_do_not_divide_are_told(name: str) -> None:
    options = {key: value for key, value in SMALL[name].items() if key != "head_dim"}
    with pytest.raises(AttentionError):
        create_attention(name, DIM + 1, num_heads=HEADS, **options)


@layers()
def test_bfloat16_autocast_is_close(name: str) -> None:
    layer, x = build(name), tokens()
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


@layers()
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    layer, x = build(name), tokens()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    close(compiled(x), layer(x))


@pytest.mark.parametrize("name", sorted(SMALL.keys() - {"hcam"}))  # its memory is constant to the gradient
def test_gradients_reach_the_input_as_finite_differences_say(name: str) -> None:
    layer = build(name).double()
    x = tokens(1, 4).double().requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    step = 1e-6
    with torch.no_grad():
        up, down = (layer(x + sign * step * direction).square().sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (up - down) / (2 * step), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["dsa", "moh", "moh_aggregated", "moh_cosine", "routing"])
def test_an_auxiliary_loss_is_collected_once_and_only_in_training(name: str) -> None:
    layer, x = build(name).train(), tokens()
    layer(x)
    loss = auxiliary_loss(nn.Sequential(layer))
    assert isinstance(loss, Tensor)
    assert loss > 0
    assert auxiliary_loss(layer) == 0
    layer.eval()(x)
    assert auxiliary_loss(layer) == 0


@layers(maps=True)
def test_capture_finds_the_maps(name: str) -> None:
    layer, x = build(name), tokens()
    expected = layer(x)
    with capture(layer) as maps:
        close(layer(x), expected)
    keys = N + {"head_tokens": HEADS, "kronecker": 1}.get(name, 0)
    for recorded in maps.values():
        assert recorded.weights.shape[-1] <= keys
        assert (recorded.weights >= 0).all()


@layers(maps=False)
def test_a_recurrence_says_that_it_has_no_maps(name: str) -> None:
    layer = build(name)
    with pytest.raises(AttentionError, match="no attention captured"), capture(layer):
        layer(tokens())


@layers()
@pytest.mark.parametrize("heads", [0, -2])
def test_numbers_of_heads_that_make_no_sense_are_told(name: str, heads: int) -> None:
    with pytest.raises(AttentionError):
        LAYERS[name](DIM, heads, **SMALL[name])


@layers(cross=True)
def test_context_of_another_width_is_told(name: str) -> None:
    with pytest.raises(AttentionError, match="context is"):
        build(name, causal=False)(tokens(), torch.randn(B, 8, DIM + 1))
