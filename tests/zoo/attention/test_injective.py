"""Injective linear attention: weights by subtraction, and a convolution predicted from the mean token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.injective import InjectiveLinear, _convolved_by_shifts, injective
from zoo.bench.memory import peak_memory

B, H, N, D = 2, 3, 10, 4


def dense_weights(q: Tensor, k: Tensor) -> Tensor:
    """`(B, H, N, M)` by the definition."""
    scores = D**-0.5 * q @ k.mT
    return (scores - scores.mean(-1, keepdim=True) + 1) / k.shape[2]


def test_equals_its_dense_weights_which_sum_to_one() -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    weights = dense_weights(q, k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, N))
    torch.testing.assert_close(injective(q, k, v), weights @ v, atol=1e-5, rtol=1e-4)
    real = (torch.arange(N) < 6).view(1, 1, N, 1).expand(B, 1, N, 1).float()
    expected = dense_weights(q, k[:, :, :6]) @ v[:, :, :6]
    torch.testing.assert_close(injective(q, k, v, real), expected, atol=1e-5, rtol=1e-4)


def test_queries_that_differ_in_length_only_have_different_weights() -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    assert not torch.allclose(injective(2 * q, k, v), injective(q, k, v), atol=1e-3)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 3)])
def test_convolution_by_shifts_is_the_grouped_one(kernel: tuple[int, int]) -> None:
    v, taps = torch.randn(B, 5, 6, D), torch.randn(B, D, *kernel)
    expected = [
        torch.nn.functional.conv2d(
            one.permute(2, 0, 1)[None], weight[:, None], padding=(kernel[0] // 2, 1), groups=D
        )
        for one, weight in zip(v, taps, strict=True)
    ]
    found = _convolved_by_shifts(v, taps).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)


def test_class_token_attends_and_is_not_convolved() -> None:
    torch.manual_seed(0)
    layer, x = InjectiveLinear(12, H, shape=(3, 3), class_token=True), torch.randn(B, 10, 12)
    q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    out = (dense_weights(q, k) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x)[:, 0], layer.proj(out[:, 0]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(layer(x)[:, 1:], layer.proj(out[:, 1:]), atol=1e-3)


def test_padding_on_a_map_is_zero_to_the_convolution() -> None:
    torch.manual_seed(0)
    layer, x = InjectiveLinear(12, H, shape=(4, 5)), torch.randn(B, 4, 5, 12)
    mask = torch.zeros(B, 4, 5, dtype=torch.bool)
    mask[:, :2, :3] = True
    out = layer(x.flatten(1, 2), mask=mask.flatten(1)).unflatten(1, (4, 5))[:, :2, :3]
    layer.shape = (2, 3)
    expected = layer(x[:, :2, :3].flatten(1, 2)).unflatten(1, (2, 3))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("features", ["relu", "leaky_relu", "exp"])
def test_features_of_queries_and_keys(features: str) -> None:
    torch.manual_seed(0)
    plain, x = InjectiveLinear(12, H), torch.randn(B, N, 12)
    layer = InjectiveLinear(12, H, features=features)  # type: ignore[arg-type]
    layer.load_state_dict(plain.state_dict())
    assert not torch.allclose(layer(x), plain(x), atol=1e-3)


def test_half_precision_holds_sums_over_many_tokens() -> None:
    q, k, v = 30 * torch.randn(3, 1, 1, 4096, 8)
    half = injective(q.half() / 100, k.half(), v.half()).float()
    torch.testing.assert_close(half, injective(q / 100, k, v), atol=2.0, rtol=0.05)


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = InjectiveLinear(12, H, shape=(128, 128)), torch.randn(1, 128 * 128, 12)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 60 * 2**20  # all pairs: 3 GiB


def test_unknown_features_are_told() -> None:
    with pytest.raises(AttentionError, match="identity, relu, leaky_relu, exp, not 'cos'"):
        InjectiveLinear(12, H, features="cos")  # type: ignore[arg-type]
