"""HaloNet against timm's, with the same weights; what timm refuses; other attention in its place."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn

import zoo
from domains.vision.models.halonet import HaloAttention
from zoo.attention import capture
from zoo.errors import CheckpointError, ConfigError

NAMES = ["eca_halonext26ts", "halonet26t", "halonet50ts", "sehalonet33ts"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "block_size": 7},
        {"stride": 2, "avg_down": True, "qkv_bias": True},
        {"dim_out": 48, "dim_head": 4, "scale_pos_embed": True},
        {"qk_ratio": 0.5, "halo_size": 1, "num_heads": 2},
    ],
    ids=str,
)
def test_attention_equals_timms(options: dict[str, Any]) -> None:
    options = {"num_heads": 4} | options
    theirs, ours = HaloAttn(32, **options), HaloAttention(32, **options)
    own = ours.state_dict()
    state = {name.removeprefix("pos_embed."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor.reshape(own[name].shape) for name, tensor in state.items()})
    side = options.get("block_size", 8)
    x = torch.randn(2, 32, 2 * side, 4 * side)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_maps_equal_timms(name: str) -> None:
    torch.manual_seed(0)
    theirs: Any = timm.create_model(name, num_classes=7).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
    model: Any = zoo.from_official(name, theirs.state_dict()).eval()
    x = torch.randn(1, 3, 256, 512)
    torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.fuse()(x), theirs(x), atol=1e-5, rtol=1e-4)
    maps = theirs.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    found = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(found, maps, atol=1e-4, rtol=1e-4)
    for key in ("input_size", "pool_size", "crop_pct", "interpolation", "mean", "license"):
        assert model.pretrained_cfg[key] == theirs.pretrained_cfg[key], key


@pytest.mark.parametrize("size", [(256, 256), (200, 312)])
def test_attention_of_the_zoo_in_its_place(size: tuple[int, int]) -> None:
    small = {"dims": [16, 16, 32, 32], "num_heads": [1, 1, 2, 2], "stem_dim": 16, "num_classes": 3}
    model: Any = zoo.create_model(
        "halonet26t", attention={"name": "shifted_window", "window": 4}, **small
    ).eval()
    x = torch.randn(1, 3, *size)
    expected = model(x)
    torch.testing.assert_close(model.fuse()(x), expected, atol=1e-5, rtol=1e-4)
    with capture(model) as maps:
        model(x)
    assert list(maps) == [
        "stages.2.1.middle.attn.layer",
        "stages.3.0.middle.attn.layer",
        "stages.3.1.middle.attn.layer",
    ]
    with pytest.raises(CheckpointError, match="attention="):
        zoo.to_official(model)


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match="act is one of relu, silu, not 'gelu'"):
        zoo.create_model("halonet26t", act="gelu")
    with pytest.raises(ConfigError, match="one of se, eca, not 'cbam'"):
        zoo.create_model("halonet26t", gate="cbam")
    with pytest.raises(ConfigError, match="four entries, one a stage"):
        zoo.create_model("halonet26t", depths=[1, 1])
