"""DaViT: equal to timm's, and the layouts of its three programs."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

import zoo
from zoo.attention import backend, capture
from zoo.errors import CheckpointError, ConfigError

SMALL = {"depths": [1, 1, 2, 1], "embed_dims": [16, 16, 32, 48], "num_heads": [1, 2, 4, 3]}


def pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """timm's model, and ours with its weights."""
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=5, **(SMALL | options)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    ours = zoo.create_model(f"vision/{name}", num_classes=5, **(SMALL | options)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("name", ["davit_tiny", "davit_base_fl"])
@pytest.mark.parametrize("size", [(64, 64), (75, 130)])
def test_equals_timm_s(name: str, size: tuple[int, int]) -> None:
    theirs, ours = (model.double() for model in pair(name))
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    maps = theirs.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
    torch.testing.assert_close(ours.forward_intermediates(x, intermediates_only=True), maps)  # type: ignore[operator]
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.fuse()(x), theirs(x))  # type: ignore[operator]
    assert zoo.to_official(ours).keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    "name",
    [
        "davit_tiny",
        "davit_small",
        "davit_base",
        "davit_large",
        "davit_huge",
        "davit_base_fl",
        "davit_huge_fl",
    ],
)
def test_published_variants_are_those_of_timm(name: str) -> None:
    with torch.device("meta"):
        theirs, ours = timm.create_model(name), zoo.create_model(f"vision/{name}", num_classes=0)
    shapes = {key: tensor.shape for key, tensor in theirs.state_dict().items() if not key.startswith("head")}
    assert {key: tensor.shape for key, tensor in zoo.to_official(ours).items()} == shapes


def test_official_files_have_other_names() -> None:
    theirs, ours = pair("davit_tiny")
    rules = (
        (r"^stem\.conv", "patch_embeds.0.proj"),
        (r"^stem\.norm", "patch_embeds.0.norm"),
        (r"^stages\.(\d)\.downsample\.conv", r"patch_embeds.\1.proj"),
        (r"^stages\.(\d)\.downsample\.norm", r"patch_embeds.\1.norm"),
        (r"^stages\.(\d)\.blocks", r"main_blocks.\1"),
        (r"\.cpe1\.", ".cpe.0."),
        (r"\.cpe2\.", ".cpe.1."),
        (r"^head\.norm", "norms"),
        (r"^head\.fc", "head"),
    )
    official = renamed(theirs, rules)
    assert "main_blocks.2.1.0.cpe.1.proj.weight" in official
    again = zoo.from_official("davit_tiny", official, num_heads=SMALL["num_heads"])
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(x), ours(x))


def test_towers_of_florence_have_other_names() -> None:
    theirs, ours = pair("davit_base_fl")
    rules = (
        (r"^stem\.conv", "stages.0.downsample.conv"),
        (r"^stem\.norm", "stages.0.downsample.norm"),
        (r"^stages\.(\d)\.downsample\.conv", r"vision_tower.convs.\1.proj"),
        (r"^stages\.(\d)\.downsample\.norm", r"vision_tower.convs.\1.norm"),
        (r"^stages\.(\d)\.blocks", r"vision_tower.blocks.\1"),
        (r"spatial_block\.norm1", "spatial_block.window_attn.norm"),
        (r"channel_block\.norm1", "channel_block.channel_attn.norm"),
        (r"spatial_block\.attn", "spatial_block.window_attn.fn"),
        (r"channel_block\.attn", "channel_block.channel_attn.fn"),
        (r"\.norm2", ".ffn.norm"),
        (r"\.mlp\.", ".ffn.fn.net."),
        (r"\.cpe([12])\.proj", r".conv\1.fn.dw"),
    )
    official = renamed(theirs, rules)
    official = {key: value for key, value in official.items() if not key.startswith("head")}
    official["language_model.embed.weight"] = torch.zeros(2)
    again = zoo.from_official("davit_base_fl", official, num_heads=SMALL["num_heads"])
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(x), ours.forward_features(x).mean((2, 3)))  # type: ignore[operator]


def renamed(model: nn.Module, rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = tensor
    return out


def test_capture_finds_windows_and_channels() -> None:
    _, ours = pair("davit_tiny")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), capture(ours) as maps:
        out = ours(x)
    assert maps["stages.0.0.attn"].weights.shape == (
        9,
        1,
        49,
        49,
    )  # 3 x 3 windows of 16 x 16 pixels, filled up
    assert maps["stages.0.1.attn"].weights.shape == (1, 1, 16, 16)
    with torch.no_grad(), backend("reference"):
        torch.testing.assert_close(ours(x), out, atol=1e-5, rtol=1e-4)


def test_impossible_options_are_a_message() -> None:
    for options, message in (
        ({"num_heads": [1, 2]}, "one number for each stage"),
        ({"num_heads": [1, 2, 3, 4]}, "not divisible by 3 heads"),
        ({"down_kernel_size": 4}, "2 or 3, not 4"),
        ({"affinity": "vk"}, "'kv' or 'qk'"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("davit_tiny", **(SMALL | options))
    official = zoo.to_official(zoo.create_model("davit_tiny", **SMALL))
    with pytest.raises(ConfigError, match="No published DaViT uses cpe_act"):
        zoo.from_official("davit_tiny", official, cpe_act=True)
    with pytest.raises(ConfigError, match="go together"):
        zoo.from_official("davit_tiny", official, channel_attn_v2=True)
    with pytest.raises(CheckpointError, match="no official checkpoint of 'davit_tiny'"):
        zoo.from_official("davit_tiny", {"stages.0.blocks.0.0.norm1.bias": torch.zeros(3)})
