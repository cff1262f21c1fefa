"""TransMLA: grouped-query layers as latent ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, rotary, rotary_tables
from zoo.attention.layers.multihead import MultiHead
from zoo.attention.transmla import components, key_turn, transmla

DIM, HEADS, GROUPS, WIDTH = 24, 4, 2, 8


def grouped(**options: Any) -> MultiHead:
    torch.manual_seed(0)
    given: dict[str, Any] = {"num_kv_heads": GROUPS, "head_dim": WIDTH, "causal": True, "rope_theta": 100.0}
    return MultiHead(DIM, HEADS, **given | options).eval()


@pytest.fixture
def calibration() -> Tensor:
    return torch.randn(4, 30, DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def error(layer: MultiHead, x: Tensor, calibration: Tensor, **options: Any) -> float:
    """Relative to the output of the layer."""
    expected = layer(x)
    return float((transmla(layer, calibration, **options)(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [None, "undone"])
def test_one_head_of_full_rank_is_exact(bias: bool, norm: str | None, x: Tensor, calibration: Tensor) -> None:
    """With one key/value head all of its channels stay rotary; a norm alone then costs something."""
    layer = grouped(num_kv_heads=1, qkv_bias=bias, out_bias=bias)
    found = error(layer, x, calibration, kv_rank=WIDTH, norm=norm)
    assert found < 1e-5 if norm is None else 1e-2 < found < 0.5


def test_full_ranks_are_partial_rotation(x: Tensor, calibration: Tensor) -> None:
    """Whatever the balance and the bottleneck of the queries."""
    layer = grouped(qkv_bias=True).double()
    x, calibration, full = x.double(), calibration.double(), 2 * GROUPS * WIDTH - WIDTH
    plain = transmla(layer, calibration, kv_rank=full)(x)
    assert not torch.allclose(plain, layer(x), atol=1e-3)
    torch.testing.assert_close(transmla(layer, calibration, kv_rank=full, balance=None)(x), plain)
    torch.testing.assert_close(transmla(layer, calibration, kv_rank=full, balance=3.0)(x), plain)
    torch.testing.assert_close(transmla(layer, calibration, kv_rank=full, q_rank=HEADS * WIDTH)(x), plain)


@pytest.mark.parametrize("causal", [False, True])
def test_without_rotation_full_rank_is_exact(causal: bool, x: Tensor, calibration: Tensor) -> None:
    layer = grouped(rope_theta=None, causal=causal, qkv_bias=True)
    assert error(layer, x, calibration, kv_rank=2 * GROUPS * WIDTH) < 1e-5
    assert 1e-2 < error(layer, x, calibration, kv_rank=8) < 1


def test_direction_stays(x: Tensor, calibration: Tensor) -> None:
    layer = grouped(causal=False, num_kv_heads=1)
    assert error(layer, x, calibration, kv_rank=WIDTH) < 1e-5


def test_at_position_zero_nothing_is_lost(x: Tensor, calibration: Tensor) -> None:
    """Without rotation only the rank counts: the turn and its inverse cancel, folded frequencies too."""
    layer, zeros = grouped(), torch.zeros(9, dtype=torch.long)
    made = transmla(layer, calibration, kv_rank=28, rope_dim=4, freqfold=2)
    torch.testing.assert_close(made(x, positions=zeros), layer(x, positions=zeros), atol=1e-5, rtol=1e-5)


def test_error_falls_with_the_rank(x: Tensor, calibration: Tensor) -> None:
    layer = grouped(qkv_bias=True)
    errors = [error(layer, x, calibration, kv_rank=rank) for rank in (2, 8, 24)]
    assert errors[0] > errors[1] > errors[2] > 0
    undone, official = (
        error(layer, x, calibration, kv_rank=24, q_rank=24, norm=norm) for norm in ("undone", "official")
    )
    assert undone < official


def test_the_latent_layer_decodes(x: Tensor, calibration: Tensor) -> None:
    made = transmla(grouped(), calibration, kv_rank=10, q_rank=12, norm="undone")
    cache = made.init_cache(2)
    steps = torch.cat([made.step(token, cache) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, made(x), atol=1e-5, rtol=1e-5)


def test_turn_gathers_energy_and_commutes_with_rotation() -> None:
    keys = torch.randn(50, GROUPS * WIDTH, dtype=torch.double) * torch.rand(GROUPS * WIDTH)
    turn = key_turn(keys, WIDTH, WIDTH)
    torch.testing.assert_close(turn @ turn.T, torch.eye(GROUPS * WIDTH, dtype=torch.double))
    first, second = (keys @ turn).square().sum(0).unflatten(0, (GROUPS, 2, WIDTH // 2)).sum(1)
    assert (first >= second).all()

    tables = rotary_tables(torch.arange(50), WIDTH)

    def rotated(x: Tensor) -> Tensor:
        return rotary(x.unflatten(-1, (GROUPS, WIDTH)).transpose(0, 1), *tables).transpose(0, 1).flatten(1)

    torch.testing.assert_close(rotated(keys @ turn), rotated(keys) @ turn)


def test_components_are_those_of_the_singular_values() -> None:
    x = torch.randn(30, 6, dtype=torch.double)
    expected = torch.linalg.svd(x).Vh.T
    torch.testing.assert_close((components(x).T @ expected).abs(), torch.eye(6, dtype=torch.double))


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda x: transmla(grouped(window=4), x, kv_rank=8), "no norms, window, YaRN"),
        (lambda x: transmla(grouped(qk_norm=True), x, kv_rank=8), "no norms, window, YaRN"),
        (lambda x: transmla(grouped(rotary_dim=4), x, kv_rank=8), "on whole heads"),
        (lambda x: transmla(grouped(rope_theta=None), x, kv_rank=8, rope_dim=8), "keeps none"),
        (lambda x: transmla(grouped(rope_theta=None), x, kv_rank=33), "kv_rank is 1 .. 32, not 33"),
        (lambda x: transmla(grouped(), x, kv_rank=25), "kv_rank is 1 .. 24, not 25"),
        (lambda x: transmla(grouped(), x, kv_rank=8, q_rank=33), "q_rank is 1 .. 32, not 33"),
        (lambda x: transmla(grouped(), x, kv_rank=8, rope_dim=4), "not 4 and 1"),
        (lambda x: transmla(grouped(), x, kv_rank=8, freqfold=3), "not 8 and 3"),
    ],
)
def test_mistakes_are_explained(
    convert: Callable[[Tensor], object], message: str, calibration: Tensor
) -> None:
    with pytest.raises(AttentionError, match=message):
        convert(calibration)
