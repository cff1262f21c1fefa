"""Agent attention and injective linear attention in the layouts of PVT and DeiT."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zoo
from zoo.attention import backend, capture
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.exchange import load_weights

PVT = {"embed_dims": [8, 8, 16], "depths": [1, 2, 1], "num_heads": [1, 2, 2], "mlp_ratios": [2, 2, 2]}
AGENT = PVT | {"agent_num": [4, 9, 4], "agent_sr_ratios": [2, 1, 1]}
MODELS = {
    "agent_pvt_tiny": AGENT,
    "inline_pvt_tiny": PVT,
    "agent_deit_tiny": {"embed_dim": 12, "depth": 2, "num_heads": 3, "agent_num": 4},
    "inline_deit_tiny": {"embed_dim": 12, "depth": 2, "num_heads": 3},
}
ALL = pytest.mark.parametrize("name", MODELS)


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    model = zoo.create_model(f"vision/{name}", **({"num_classes": 5} | MODELS[name] | options)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("agent_pvt_tiny", 11.6),
        ("agent_pvt_small", 20.6),
        ("agent_pvt_medium", 35.9),
        ("agent_pvt_large", 48.7),
        ("agent_deit_tiny", 6.0),
        ("agent_deit_small", 22.6),
        ("inline_pvt_tiny", 12.0),
        ("inline_pvt_small", 21.6),
        ("inline_pvt_medium", 37.6),
        ("inline_deit_tiny", 6.5),
        ("inline_deit_small", 16.7),
        ("inline_deit_base", 23.8),
    ],
)
def test_parameters_of_published_variants(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = zoo.create_model(f"vision/{name}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


@ALL
def test_official_files_tell_the_configuration(name: str) -> None:
    model = build(name, img_size=64, num_classes=7, in_chans=2, qkv_bias=False)
    official = zoo.to_official(model)
    assert ("patch_embed1.proj.weight" in official) == ("pvt" in name)
    assert ("block2.1.attn.kv.weight" in official) == ("pvt" in name)
    assert ("blocks.1.attn.qkv.weight" in official) == ("deit" in name)
    again = zoo.from_official(name, official)
    x = torch.randn(1, 2, 64, 64)
    assert torch.equal(again(x), model(x))


@ALL
def test_tables_are_resized_when_a_file_is_loaded_for_another_size(name: str) -> None:
    """Loaded for the size of the images, the model computes what it does with the tables of the file."""
    model = build(name, img_size=64)
    larger = build(name, img_size=(64, 96))
    load_weights(larger, zoo.to_official(model))
    x = torch.randn(1, 3, 64, 96)
    tolerance = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(larger(x), model(x), **tolerance)
    load_weights(model, zoo.to_official(model))
    if "pvt" in name:
        with pytest.raises(CheckpointError, match="no square"):
            load_weights(build(name, img_size=128), zoo.to_official(larger))


@ALL
def test_capture_and_the_reference_agree(name: str) -> None:
    model, x = build(name), torch.randn(2, 3, 64, 64)
    expected = model(x)
    with torch.no_grad(), backend("reference"):
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
    if name.startswith("agent"):
        with torch.no_grad(), capture(model) as maps:
            torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        agents = next(iter(maps.values())).weights
        torch.testing.assert_close(agents.sum(-1), torch.ones(agents.shape[:-1]))


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "inline_pvt_tiny"])
def test_attention_of_pvt_itself(name: str) -> None:
    model = build(name, attn_types="BBB", sr_ratios=[4, 2, 1])
    attn = model.get_submodule("stages.0.0.attn")
    x = torch.randn(2, 6, 9, 8)
    source = attn.norm(attn.sr(x.permute(0, 3, 1, 2)).flatten(2).mT)  # type: ignore[operator]
    k, v = attn.kv(source).chunk(2, -1)  # type: ignore[operator]
    q = attn.q(x.flatten(1, 2))  # type: ignore[operator]
    expected = attn.proj(F.scaled_dot_product_attention(q, k, v)).view(x.shape)  # type: ignore[operator]
    torch.testing.assert_close(attn(x), expected, atol=1e-5, rtol=1e-4)
    again = zoo.from_official(name, zoo.to_official(model), num_heads=PVT["num_heads"])
    image = torch.randn(1, 3, 224, 224)
    assert torch.equal(again(image), model(image))


def test_a_class_token_and_any_layer() -> None:
    for attention in ("hilo", "injective", {"name": "agent", "agents": 4}):
        model = build("agent_deit_tiny", attention=attention)
        assert model(torch.randn(2, 3, 70, 50)).shape == (2, 5)


def test_impossible_options_are_a_message() -> None:
    for options, message in (
        ({"agent_num": [4, 9]}, "one number for each stage"),
        ({"agent_num": [4, 9, 5]}, "square number"),
        ({"attn_types": "AAX"}, "letters A and B, not 'AAX'"),
        ({"depths": [1, 1], "agent_num": [4, 9], "agent_sr_ratios": [1, 1]}, "one entry for each stage"),
        ({"num_heads": [1, 3, 2]}, "not divisible by 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            zoo.create_model("agent_pvt_tiny", **(AGENT | options))
    with pytest.raises(CheckpointError, match="itself fails unless 1"):
        zoo.from_official("inline_pvt_tiny", zoo.to_official(build("inline_pvt_tiny")), la_sr_ratios="2111")
