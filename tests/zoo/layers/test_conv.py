"""Folding of batch norms, and norms over channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.layers.conv import ChannelNorm, ConvNorm, folded, scale_and_shift


def settled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.running_mean, norm.running_var = torch.randn(norm.num_features), torch.rand(norm.num_features) + 0.5
    if norm.affine:
        norm.weight.data, norm.bias.data = torch.randn(norm.num_features), torch.randn(norm.num_features)
    return norm.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_one_convolution_equals_convolution_and_norm(bias: bool, affine: bool) -> None:
    conv, norm = nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=bias), settled(nn.BatchNorm2d(4, affine=affine))
    x = torch.randn(2, 6, 5, 7)
    fused = folded(conv, norm)
    torch.testing.assert_close(fused(x), norm(conv(x)), atol=1e-5, rtol=1e-4)
    assert (conv.bias is None) != bias
    scale, shift = scale_and_shift(norm)
    y = conv(x)
    torch.testing.assert_close(y * scale[:, None, None] + shift[:, None, None], norm(y), atol=1e-5, rtol=1e-4)


def test_conv_norm_keeps_the_size_and_folds_itself_once() -> None:
    layer = ConvNorm(3, 5, 3, gain=0.0)
    x = torch.randn(1, 3, 6, 7)
    assert torch.equal(layer(x), torch.zeros(1, 5, 6, 7))
    settled(layer.norm)
    expected = layer(x)
    for _ in range(2):
        layer.fuse_()
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    assert isinstance(layer.norm, nn.Identity)
    assert ConvNorm(3, 5, 4, 4, 0)(torch.randn(1, 3, 9, 8)).shape == (1, 5, 2, 2)
    assert isinstance(ConvNorm(3, 5, norm=nn.Identity()).norm, nn.Identity)


def test_channel_norm_is_a_layer_norm_of_every_pixel() -> None:
    norm, x = ChannelNorm(4), torch.randn(2, 4, 3, 5)
    nn.init.normal_(norm.weight)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + norm.eps).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight[:, None, None] + norm.bias[:, None, None])
