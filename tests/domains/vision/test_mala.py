"""MALA: what is its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from domains.vision.models.mala import MALA, RotarySoftmax
from zoo.attention import backend, capture
from zoo.attention.layers.magnitude import MagnitudeAware
from zoo.errors import CheckpointError, ConfigError

TINY: dict[str, Any] = {
    "embed_dims": [8, 16, 16, 32],
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "projection": 24,
    "num_classes": 5,
}


def build(**options: Any) -> MALA:
    torch.manual_seed(0)
    model = zoo.create_model("mala_tiny", **(TINY | options))
    assert isinstance(model, MALA)
    return model.eval()


def test_published_sizes() -> None:
    assert zoo.model_card("mala_tiny").parameters == 16_449_128


def test_stages_have_the_attention_of_their_letter() -> None:
    model = build(block_types="vlvl")
    kinds = [type(stage[-1].attn) for stage in model.stages]  # type: ignore[index]
    assert kinds == [RotarySoftmax, MagnitudeAware, RotarySoftmax, MagnitudeAware]
    with pytest.raises(ConfigError, match=r"'l' .linear. and 'v' .softmax., not 'x'"):
        build(block_types="llvx")
    with pytest.raises(ConfigError, match="one entry for each stage"):
        build(depths=[1, 1])


def test_maps_of_the_softmax_stages_are_captured_and_backends_agree() -> None:
    model, x = build(), torch.randn(2, 3, 64, 96)
    expected = model(x)
    with capture(model) as maps:
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    assert list(maps) == ["stages.2.1.attn", "stages.2.2.attn", "stages.3.1.attn"]
    assert maps["stages.2.1.attn"].weights.shape == (2, 2, 24, 24)
    with backend("reference"):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["multihead", "linear", "shifted_window", "magnitude", "bilevel"])
def test_another_attention_can_stand_in_every_block(attention: str) -> None:
    model = build(attention=attention)
    for size in ((64, 64), (97, 130)):
        assert model(torch.randn(1, 3, *size)).isfinite().all()
    with pytest.raises(CheckpointError, match=f"attention='{attention}'"):
        zoo.to_official(model)


def test_the_angles_of_a_file_are_checked() -> None:
    model = build()
    state = zoo.to_official(model)
    assert state["layers.3.RoPE.angle"].shape == (4,)
    state["layers.1.RoPE.angle"] = state["layers.1.RoPE.angle"] * 2
    with pytest.raises(CheckpointError, match=r"layers.1.RoPE.angle does not hold the angles of MALA"):
        zoo.from_official("mala_tiny", state)


def test_a_file_tells_the_whole_configuration() -> None:
    model = build(layer_scales=[None, 1.0, None, 1.0], mlp_ratios=[2, 3, 4, 3.5])
    state = zoo.to_official(model)
    other, x = zoo.from_official("mala_tiny", state).eval(), torch.randn(1, 3, 64, 64)
    assert torch.equal(other(x), model(x))
    headless = {key: value for key, value in state.items() if not key.startswith(("head.", "proj.", "norm."))}
    features = zoo.from_official("mala_tiny", headless).eval()
    torch.testing.assert_close(features(x), model.forward_features(x).mean((2, 3)))
