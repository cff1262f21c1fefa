"""DHVT: class token, overlapping patches, images of CIFAR."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

import domains.vision  # noqa: F401  (enters the models in timm's registry)
import zoo
from domains.vision.models.dhvt import DHVT
from zoo.attention import capture
from zoo.errors import ConfigError
from zoo.weights.exchange import load_weights

TINY: dict[str, Any] = {"embed_dim": 12, "depth": 3, "num_heads": 3, "num_classes": 5}


def build(name: str = "dhvt_tiny_cifar_patch4", **options: Any) -> DHVT:
    torch.manual_seed(0)
    model = zoo.create_model(name, **(TINY | options))
    assert isinstance(model, DHVT)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "millions"), [("dhvt_tiny_cifar_patch2", 5.8), ("dhvt_small_cifar_patch2", 22.8)]
)
def test_published_sizes(name: str, millions: float) -> None:
    parameters = zoo.model_card(name).parameters
    assert parameters is not None
    assert round(parameters / 1e6, 1) == millions


def test_the_class_token_is_classified_and_the_map_pooled_on_request() -> None:
    model, x = build(), torch.randn(2, 3, 32, 36)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 1 + 8 * 9, 12)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    model.reset_classifier(5, "avg")
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), tokens[:, 1:].mean(1))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), tokens)


@pytest.mark.parametrize(("patch", "side"), [(2, 17), (4, 9), (8, 5), (16, 3)])
def test_patches_are_powers_of_two(patch: int, side: int) -> None:
    model = build(patch_size=patch, embed_dim=24)
    (last,) = model.forward_intermediates(torch.randn(1, 3, 33, 33), [-1], intermediates_only=True)
    assert last.shape == (1, 24, side, side)
    with pytest.raises(ConfigError, match="power of 2"):
        build(patch_size=3 * patch)


def test_head_tokens_are_among_the_keys() -> None:
    model = build()
    with capture(model) as maps:
        model(torch.randn(1, 3, 32, 32))
    assert maps["stages.0.0.attn"].weights.shape == (1, 3, 1 + 64 + 3, 1 + 64 + 3)


def test_another_attention_sees_class_token_and_map_as_one_sequence() -> None:
    model = build(attention="multihead")
    with capture(model) as maps:
        model(torch.randn(1, 3, 32, 32))
    assert maps["stages.0.0.attn"].weights.shape == (1, 3, 65, 65)


def test_timm_knows_the_size_of_the_images() -> None:
    model = timm.create_model("dhvt_tiny_cifar_patch4", **TINY)
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["crop_pct"] == 1.0


@pytest.mark.parametrize(("channels", "expected"), [(1, [2.0]), (5, [1.0, 2.0, 3.0, 1.0, 2.0])])
def test_affine_maps_are_fitted_to_other_channels(channels: int, expected: list[float]) -> None:
    model = build()
    with torch.no_grad():
        model.stem.pre_affine.alpha.copy_(torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1))  # type: ignore[union-attr]
    other = build(in_chans=channels)
    load_weights(other, zoo.to_official(model))
    assert other.stem.pre_affine.alpha.flatten().tolist() == expected  # type: ignore[union-attr]


def test_the_plain_form_of_the_official_program_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain ViT"):
        zoo.from_official("dhvt_tiny_cifar_patch4", zoo.to_official(build()), apply_dhvt=False)
