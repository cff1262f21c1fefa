"""Winograd's algorithm computes the convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.layers.winograd import winograd_conv, winograd_weight


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 14), (3, 2), (1, 23)])
def test_it_is_the_convolution(height: int, width: int) -> None:
    x = torch.randn(2, 5, height, width, dtype=torch.float64)
    weight, bias = torch.randn(7, 5, 3, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    y = winograd_conv(x, winograd_weight(weight), bias)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=1))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_it_is_as_exact_in_float32_as_stated() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 256, 30, 40).relu(), torch.randn(256, 256, 3, 3), torch.randn(256)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    y = winograd_conv(x, winograd_weight(weight), bias)
    assert (y - expected).abs().max() < 2e-5 * expected.abs().max()
