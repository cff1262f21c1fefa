"""LITv2: deformable merging, stages without attention, official files."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zoo
from domains.vision.models.litv2 import DeformableMerging
from zoo.attention import capture
from zoo.errors import ConfigError

SMALL = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "alpha": 0.5}


def test_merging_starts_as_a_convolution_and_follows_its_offsets() -> None:
    merging, x = DeformableMerging(4, 6).eval(), torch.randn(2, 4, 9, 11)
    assert merging.conv.bias is not None
    expected = merging.act(merging.norm(merging.conv(x)))
    torch.testing.assert_close(merging(x), expected, atol=1e-5, rtol=1e-4)
    assert merging.offset.bias is not None
    nn.init.ones_(merging.offset.bias)  # one row down and one column to the right, zeros outside
    shifted = nn.functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
    expected = merging.act(merging.norm(merging.conv(shifted)))
    torch.testing.assert_close(merging(x), expected, atol=1e-5, rtol=1e-4)


def test_attention_is_where_windows_are() -> None:
    model = zoo.create_model("litv2_s", **SMALL).eval()
    with torch.no_grad(), capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    shapes = {name: tuple(found.weights.shape) for name, found in maps.items()}
    assert shapes == {
        "stages.2.1.attn": (4, 2, 4, 4),  # windows of 2 x 2 on the map of 4 x 4
        "stages.2.1.attn#2": (1, 2, 16, 4),  # their means
        "stages.2.2.attn": (4, 2, 4, 4),
        "stages.2.2.attn#2": (1, 2, 16, 4),
        "stages.3.1.attn": (1, 8, 4, 4),
    }


@pytest.mark.parametrize("name", ["litv2_s", "litv2_m", "litv2_b"])
def test_published_shares_of_heads(name: str) -> None:
    with torch.device("meta"):
        model = zoo.create_model(name)
    third, last = (model.get_submodule(f"stages.{i}.1.attn") for i in (2, 3))
    heads = {"litv2_b": (14, 2)}.get(name, (10, 2))
    assert (third.low_heads, third.high_heads) == heads
    assert last.high_heads == 0


def test_official_files_tell_all_but_heads_and_windows() -> None:
    model = zoo.create_model("litv2_s", num_classes=7, in_chans=4, qkv_bias=False, **SMALL).eval()
    official = zoo.to_official(model)
    assert "layers.1.downsample.dconv.conv_offset.weight" in official
    assert "layers.2.blocks.0.attn.h_qkv.weight" in official
    again = zoo.from_official("litv2_s", official, num_heads=SMALL["num_heads"], alpha=0.5)
    x = torch.randn(1, 4, 64, 96)
    assert torch.equal(again(x), model(x))


def test_impossible_options_are_a_message() -> None:
    for options, message in (
        ({"local_ws": [0, 0, 2]}, "one number for each stage"),
        ({"num_heads": [1, 2, 3, 8]}, "not divisible by 3 heads"),
        ({"alpha": 2.0}, "alpha in"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("litv2_s", **(SMALL | options))
