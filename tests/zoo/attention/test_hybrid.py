"""LoLCATs and STILL: softmax for some keys and linear attention for the rest, against loops over pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError
from zoo.attention.layers.hybrid import LoLCATs, Still, most_salient
from zoo.attention.layers.multihead import MultiHead
from zoo.bench.memory import peak_memory

DIM, HEADS, KV_HEADS, TOKENS = 16, 4, 2, 13
SHARED: dict[str, Any] = {"num_kv_heads": KV_HEADS, "rope_theta": 100.0, "qkv_bias": True}


def lolcats(**options: Any) -> LoLCATs:
    torch.manual_seed(0)
    given: dict[str, Any] = {"window": 4}
    return _drawn(LoLCATs(DIM, HEADS, **SHARED | given | options))


def still(**options: Any) -> Still:
    torch.manual_seed(0)
    return _drawn(Still(DIM, HEADS, **SHARED | {"window": 4, "num_salient": 3} | options))


def _drawn(layer: Any) -> Any:
    nn.init.normal_(layer.window_factors)
    return layer.double()


LAYERS: dict[str, Callable[..., LoLCATs]] = {"lolcats": lolcats, "still": still}


@pytest.fixture(params=LAYERS.values(), ids=list(LAYERS))
def build(request: pytest.FixtureRequest) -> Callable[..., LoLCATs]:
    return request.param


def tokens(length: int = TOKENS) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def heads_of(layer: LoLCATs, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `(B, H, N, D)`, those of shared heads repeated."""
    q = layer.q_proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    q, (k, v), _ = layer.heads(q, x, None, None, None, None)
    return q, k.repeat_interleave(HEADS // KV_HEADS, 1), v.repeat_interleave(HEADS // KV_HEADS, 1)


def one_denominator(layer: LoLCATs, x: Tensor, near: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
    """Pair by pair; near: bool `(B, H, N, N)`, which of the earlier keys are read by softmax."""
    q, k, v = heads_of(layer, x)
    phi_q, phi_k = features
    out = torch.zeros_like(q)
    soft, rest = layer.factors()
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        scores = [float((q[b, h, i] @ k[b, h, j]).detach()) * q.shape[-1] ** -0.5 for j in range(i + 1)]
        peak = max([s for j, s in enumerate(scores) if near[b, h, i, j]], default=0.0)
        far_factor = rest[0, h, 0, 0] if isinstance(rest, Tensor) else rest
        total = torch.zeros((), dtype=x.dtype)
        for j, score in enumerate(scores):
            if near[b, h, i, j]:
                weight = soft[0, h, 0, 0] * torch.tensor(score - peak, dtype=x.dtype).exp()
            else:
                weight = far_factor * (phi_q[b, h, i] @ phi_k[b, h, j])
            out[b, h, i] += weight * v[b, h, j]
            total = total + weight
        out[b, h, i] /= total
    return layer.project(out)


@pytest.mark.parametrize("affine", [False, True])
def test_lolcats_is_its_definition(affine: bool) -> None:
    layer, x = lolcats(affine=affine, feature_dim=3), tokens()
    q, k, _ = heads_of(layer, x)

    def features(x: Tensor, maps: Any) -> Tensor:
        y = torch.einsum("bhnd,hdf->bhnf", x, maps.mlp.layer)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)

    ago = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    near = (ago < 4).expand(2, HEADS, -1, -1)
    maps = features(q, layer.feature_map_q), features(k, layer.feature_map_k)
    torch.testing.assert_close(layer(x), one_denominator(layer, x, near, maps), atol=1e-10, rtol=1e-10)


def still_parts(layer: Still, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Who is salient to whom, by loops; and the features."""
    q, k, _ = heads_of(layer, x)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    saliency = torch.zeros(2, HEADS, TOKENS, dtype=x.dtype)
    for j in range(TOKENS):
        saliency[..., j] = scores[..., j, max(0, j - 3) : j + 1].softmax(-1)[..., -1]
    saliency = saliency.unflatten(1, (KV_HEADS, -1)).mean(2, keepdim=True).expand(-1, -1, 2, -1).flatten(1, 2)
    near = torch.zeros(2, HEADS, TOKENS, TOKENS, dtype=torch.bool)
    for i in range(TOKENS):
        best = saliency[..., : i + 1].argsort(dim=-1, descending=True, stable=True)[..., : layer.num_salient]
        near[..., i, :].scatter_(-1, best, True)

    def features(x: Tensor, maps: Any) -> Tensor:
        direction = maps(x)
        return direction / direction.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)

    return near, (features(q, layer.feature_map_q), features(k, layer.feature_map_k))


@pytest.mark.parametrize("num_salient", [0, 1, 3])
@pytest.mark.parametrize("affine", [False, True])
def test_still_is_its_definition(num_salient: int, affine: bool) -> None:
    layer, x = still(num_salient=num_salient, affine=affine), tokens()
    expected = one_denominator(layer, x, *still_parts(layer, x))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "layer", [lolcats(window=TOKENS), still(num_salient=TOKENS)], ids=["lolcats", "still"]
)
def test_with_all_keys_near_it_is_causal_softmax_of_the_same_weights(layer: LoLCATs) -> None:
    plain = MultiHead(DIM, HEADS, causal=True, **SHARED).double()
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.partition(".")[0] for name in missing.missing_keys} == {
        "window_factors",
        "feature_map_q",
        "feature_map_k",
    }
    x = tokens()
    torch.testing.assert_close(layer(x), plain(x), atol=1e-10, rtol=1e-10)
    assert layer.transfer_loss(x) < 1e-20


def test_still_by_recency_would_be_lolcats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later the more salient: the last three tokens are held, and fall in their order."""
    layer, x = still(), tokens()
    plain = lolcats(window=3)
    plain.load_state_dict(layer.state_dict())
    monkeypatch.setattr("zoo.attention.layers.hybrid.norm_preserving", lambda features, x: features)
    recency = torch.arange(TOKENS, dtype=x.dtype).expand(2, KV_HEADS, -1)[..., None]
    monkeypatch.setattr(Still, "saliency", lambda *_: recency)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 5, 200])
def test_most_salient_holds_the_best_so_far(size: int) -> None:
    scores = torch.randint(0, 12, (1, 2, 150), generator=torch.Generator().manual_seed(0)).double()
    scores[:, :, ::7] = -torch.inf
    index, fallen = most_salient(scores, size, 150)
    for head in range(2):
        held: set[int] = set()
        for i in range(150):
            score = scores[0, head].tolist()
            members = held | ({i} if score[i] > -torch.inf else set())
            held = set(sorted(members, key=lambda j: (-score[j], j))[:size])
            out = members - held
            assert {j for j in index[0, head, i].tolist() if j >= 0} == held
            assert int(fallen[0, head, i]) == (out.pop() if out else -1)


def test_gathered_salient_keys_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows are read among all keys, long ones gathered, some queries at a time."""
    layer = still(num_salient=1)
    x = tokens(230)
    long = layer(x)
    monkeypatch.setattr("zoo.attention.layers.hybrid.recorder", lambda: True)
    torch.testing.assert_close(long, layer(x), atol=1e-10, rtol=1e-10)


def test_gradients_in_double_precision(build: Callable[..., LoLCATs]) -> None:
    layer, x = build(), tokens(7).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)


@pytest.mark.parametrize("sizes", [[13], [1] * 13, [2, 1, 7, 3]], ids=str)
@pytest.mark.parametrize("window", [2, 4, 40])
def test_parts_of_any_length_equal_the_whole(
    build: Callable[..., LoLCATs], sizes: list[int], window: int
) -> None:
    layer, x = build(window=window), tokens()
    cache = layer.init_cache(2)
    parts = [layer.step(part, cache) for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), atol=1e-10, rtol=1e-10)


def test_steps_after_a_padded_prompt(build: Callable[..., LoLCATs]) -> None:
    layer, x = build(rope_theta=None), tokens()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[1, :5] = False
    cache = layer.init_cache(2)
    parts = [layer(x[:, :8], mask=mask[:, :8], cache=cache)]
    parts += [layer.step(token, cache) for token in x[:, 8:].split(1, dim=1)]
    out = torch.cat(parts, dim=1)
    torch.testing.assert_close(out[0], layer(x[:1])[0], atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(out[1, 5:], layer(x[1:, 5:])[0], atol=1e-10, rtol=1e-10)


def test_cache_does_not_grow(build: Callable[..., LoLCATs]) -> None:
    layer = build()
    cache = layer.init_cache(2)
    sizes = []
    for token in tokens(20).split(1, dim=1):
        layer.step(token, cache)
        sizes.append(cache.nbytes())
    assert sizes[9] == sizes[19]


def test_transfer_trains_features_and_factors_alone(build: Callable[..., LoLCATs]) -> None:
    layer, x = build(), tokens(40)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = layer.transfer_loss(x)
        loss.backward()
        losses.append(float(loss.detach()))
        trained = {name.partition(".")[0] for name, p in layer.named_parameters() if p.grad is not None}
        assert trained == {"window_factors", "feature_map_q", "feature_map_k"}
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_transfer_loss_leaves_padding_out(build: Callable[..., LoLCATs]) -> None:
    layer, x = build(), tokens()
    mask = torch.arange(TOKENS).expand(2, -1) < 9
    torch.testing.assert_close(layer.transfer_loss(x, mask), layer.transfer_loss(x[:, :9]))
    with pytest.raises(AttentionError, match="mask"):
        layer.transfer_loss(x, mask[:, :-1])


def test_transfer_loss_of_packed_documents() -> None:
    layer, x = lolcats(rope_theta=None), tokens()
    ids = torch.tensor([[3] * 6 + [1] * 7] * 2)
    parts = layer.transfer_loss(x[:, :6]) * 6 + layer.transfer_loss(x[:, 6:]) * 7
    torch.testing.assert_close(layer.transfer_loss(x, ids), parts / 13)


def test_dropout_acts_in_training_only(build: Callable[..., LoLCATs]) -> None:
    layer, x = build(dropout=0.5), tokens()
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))


def test_memory_is_linear_in_the_tokens(build: Callable[..., LoLCATs]) -> None:
    layer = build(window=16, num_kv_heads=1).float()
    x = torch.randn(1, 2**12, DIM)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 40 * 2**20  # all pairs of four heads: 256 MiB


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lolcats(window=0), "window"),
        (lambda: lolcats(feature_dim=0), "one feature"),
        (lambda: lolcats(causal=False), "'linear' attends in both directions"),
        (lambda: still(num_salient=-1), "not negative"),
        (lambda: still(window=1), "at least two"),
        (lambda: still(causal=False), "both directions"),
        (lambda: still()(tokens(), mask=torch.zeros(2, TOKENS, dtype=torch.long)), "packed"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        call()
