"""Swin of detectors: windows of padded and shifted maps, any size of image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from domains.detection.models.backbones import create_backbone
from domains.detection.models.swin import APART, PatchMerging, Swin, WindowAttention
from zoo.errors import ConfigError

SMALL = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 2), "window_size": 3}


def by_definition(attention: WindowAttention, x: Tensor) -> Tensor:
    """One score for each pair of places of the padded map."""
    size, shift, heads = attention.window_size, attention.shift, attention.num_heads
    _, height, width, channels = x.shape
    x = torch.nn.functional.pad(x, (0, 0, 0, -width % size, 0, -height % size))
    shape = x.shape[1:3]
    q, k, v = attention.qkv(x.flatten(1, 2)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT * (channels // heads) ** -0.5
    rows, columns = (torch.arange(n) for n in shape)
    places = torch.cartesian_prod(rows, columns)
    rolled = (places - shift) % torch.tensor(shape)
    window = (rolled // size)[:, 0] * 100 + (rolled // size)[:, 1]
    end = 2 * (places[:, 0] < shift) + (places[:, 1] < shift).int()  # comes after the roll from the other end
    offsets = rolled[:, None] - rolled[None] + size - 1
    index = (offsets[..., 0] * (2 * size - 1) + offsets[..., 1]).clamp(0, (2 * size - 1) ** 2 - 1)
    scores = scores + attention.relative_position_bias_table[index].permute(2, 0, 1)
    scores = scores + APART * (end[:, None] != end[None])
    scores = scores.masked_fill(window[:, None] != window[None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return attention.proj(out).unflatten(1, shape)[:, :height, :width]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", [(6, 9), (4, 7), (3, 3), (2, 5)])
def test_windows_are_those_of_the_definition(shape: tuple[int, int], shift: int) -> None:
    attention = WindowAttention(8, 2, 3, shift)
    torch.nn.init.normal_(attention.relative_position_bias_table)
    torch.nn.init.normal_(attention.qkv.bias)
    x = torch.randn(2, *shape, 8)
    torch.testing.assert_close(attention(x), by_definition(attention, x), atol=1e-5, rtol=1e-5)


def test_four_neighbours_merge_column_by_column() -> None:
    merging = PatchMerging(1)
    seen: list[Tensor] = []
    merging.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    merging(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).view(1, 2, 3, 1))
    assert seen[0].view(2, 4).tolist() == [[1, 4, 2, 5], [3, 6, 0, 0]]


@pytest.mark.parametrize("size", [(32, 48), (37, 51), (16, 16)])
def test_images_of_any_size(size: tuple[int, int]) -> None:
    net = Swin(2, **SMALL).eval()  # pyright: ignore[reportArgumentType]
    maps = net(torch.randn(1, 3, *size))
    assert (net.channels, net.strides) == ((16, 32), (8, 16))
    for found, channels, stride in zip(maps, net.channels, net.strides, strict=True):
        assert found.shape == (1, channels, *(-(-side // stride) for side in size))


def test_a_norm_is_of_what_is_given_alone() -> None:
    net = Swin(2, **SMALL).eval()  # pyright: ignore[reportArgumentType]
    x = torch.randn(1, 3, 32, 32)
    before = net(x)
    net.norm1.weight.data.mul_(2)  # pyright: ignore
    after = net(x)
    torch.testing.assert_close(after[0], 2 * before[0])
    torch.testing.assert_close(after[1], before[1])


def test_branches_are_dropped_in_training_only() -> None:
    net, x = Swin(1, **SMALL, drop_path_rate=0.9), torch.randn(8, 3, 16, 16)  # pyright: ignore[reportArgumentType]
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


def test_is_a_backbone_by_name() -> None:
    with torch.device("meta"):
        net = create_backbone("swin_l", 3)
    assert net.channels == (384, 768, 1536)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="shared out evenly"):
        Swin(1, embed_dim=10, depths=(1,), num_heads=(3,))
    with pytest.raises(ConfigError, match="as many numbers of heads"):
        Swin(1, depths=(1, 1), num_heads=(3,))
