"""EfficientViT: what is its own; timm's implementation is the oracle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import zoo
from domains.vision.models.efficientvit import EfficientViT
from domains.vision.models.efficientvit_blocks import WindowAttention, distances, resized_table
from domains.vision.weights.efficientvit import to_timm
from zoo.attention import backend, capture
from zoo.errors import CheckpointError, ConfigError

TINY: dict[str, Any] = {
    "dims": [16, 32, 48],
    "depths": [1, 1, 2],
    "num_heads": [2, 2, 3],
    "kernels": [5, 3, 3],
    "key_dim": 8,
    "num_classes": 5,
}
NAMES = [f"efficientvit_m{i}" for i in range(6)]


def build(name: str = "efficientvit_m0", **options: Any) -> EfficientViT:
    torch.manual_seed(0)
    model = zoo.create_model(name, **(TINY | options))
    assert isinstance(model, EfficientViT)
    return shaken(model).eval()


def shaken(model: nn.Module) -> Any:
    """With norms, tables and statistics that do something."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim == 1:
            least = 0.5 * name.endswith(("weight", "var"))
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + least)
        elif name.endswith(("table", "attention_biases")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def image(*size: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- held to timm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_has_as_many_parameters_as_in_timm(name: str) -> None:
    with torch.device("meta"):
        theirs = sum(p.numel() for p in timm.create_model(name).parameters())
    assert zoo.model_card(name).parameters == theirs


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("efficientvit_m0", 224),
        ("efficientvit_m1", 160),
        ("efficientvit_m2", 240),
        ("efficientvit_m5", (96, 160)),
    ],
)
def test_equals_timm_with_its_weights(name: str, size: int | Sequence[int]) -> None:
    theirs = shaken(timm.create_model(name, img_size=size, num_classes=7)).eval()
    ours = zoo.from_official(name, theirs.state_dict(), img_size=size).double()
    x = image(*([size] * 2 if isinstance(size, int) else size), batch=1).double()
    expected = theirs.double()(x)
    close(ours(x), expected, 1e-9)
    with torch.no_grad():
        close(ours.fuse()(x), expected, 1e-9)


def test_gradients_are_the_slopes_of_the_loss() -> None:
    """Each kind of parameter along a random direction. (Those of timm's query convolutions are not.)"""
    model = build(img_size=96).double()
    x, step = image(96, 96, batch=1).double(), 1e-6
    kinds: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kinds.setdefault(re.sub(r"\d+", "*", name), []).append(parameter)
    model(x).square().sum().backward()
    for kind, parameters in kinds.items():
        directions = [torch.randn_like(p) for p in parameters]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
        losses = []
        with torch.no_grad():
            for move in (step, -2 * step):
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += move * direction
                losses.append(float(model(x).square().sum()))
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-5), kind


def test_saves_in_the_layout_of_timm() -> None:
    theirs = timm.create_model("efficientvit_m3", img_size=64, num_classes=3)
    ours = zoo.from_official("efficientvit_m3", theirs.state_dict(), img_size=64)
    theirs.load_state_dict(to_timm(zoo.to_official(ours)))
    close(theirs.eval()(image(64, 64)), ours(image(64, 64)))


# ---- checkpoints -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"distillation": True}, {"features_only": True, "shrink_windows": False}]
)
def test_official_layout_goes_round(options: dict[str, Any]) -> None:
    model = build(**options)
    official = zoo.to_official(model)
    again = zoo.from_official("efficientvit_m0", official)
    assert again.zoo_config["config"].get("features_only", False) == options.get("features_only", False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert zoo.to_official(again).keys() == official.keys()
    assert official["blocks2.3.mixer.m.attn.attention_bias_idxs"].dtype == torch.int64


def test_reads_a_classifier_without_head() -> None:
    official = zoo.to_official(build(num_classes=0, img_size=128))
    assert zoo.from_official("efficientvit_m0", official, img_size=128)(image(128, 128)).shape == (2, 48)


def test_reads_old_files_whose_pointwise_convolutions_are_matrices() -> None:
    model = build()
    official = zoo.to_official(model)
    old = {n: t.flatten(1) if t.shape[2:] == (1, 1) and ".se." not in n else t for n, t in official.items()}
    assert old["blocks1.0.ffn0.m.pw1.c.weight"].shape == (32, 16)
    assert torch.equal(zoo.from_official("efficientvit_m0", old)(image(64, 64)), model(image(64, 64)))


def test_reads_the_backbone_of_a_detector() -> None:
    model = build(features_only=True, shrink_windows=False)
    official = zoo.to_official(model)
    detector = {f"backbone.{name}": tensor for name, tensor in official.items()}
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "bbox_head.fc.weight": torch.zeros(1)}
    found = zoo.from_official("efficientvit_m0", detector)(image(96, 64))
    for actual, expected in zip(found, model(image(96, 64)), strict=True):
        assert torch.equal(actual, expected)


def test_published_classifier_starts_other_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path))
    published = shaken(zoo.create_model("efficientvit_m0")).eval()
    file = tmp_path / "efficientvit_m0_in1k" / "efficientvit_m0.pth"
    file.parent.mkdir()
    torch.save({"model": zoo.to_official(published)}, file)
    (tmp_path / "efficientvit_m0_timm").mkdir()
    timm_file = tmp_path / "efficientvit_m0_timm" / "model.safetensors"
    save_file(to_timm(zoo.to_official(published)), timm_file)
    x = image(224, 224, batch=1)
    for weights in (True, "efficientvit_m0_timm"):
        assert torch.equal(zoo.create_model("efficientvit_m0", pretrained=weights).eval()(x), published(x))

    detector = zoo.create_model(
        "efficientvit_m0", pretrained=True, features_only=True, shrink_windows=False, in_chans=1
    )
    old, new = (model.stages[2][3].attention.cascade.table for model in (published, detector))
    close(new, resized_table(old, 7))
    close(detector.stem[0].conv.weight, published.stem[0].conv.weight.sum(1, keepdim=True))
    large = zoo.create_model("efficientvit_m0", pretrained=True, img_size=448, num_classes=3).eval()
    close(large.stages[2][3].attention.cascade.table, resized_table(old, 7))
    published.set_input_size(448)
    close(large.forward_features(image(448, 448)), published.forward_features(image(448, 448)))
    with pytest.raises(CheckpointError, match=r"dws.0.c.weight is \[16, 1, 5, 5\], not \[16, 1, 7, 7\]"):
        zoo.create_model("efficientvit_m0", pretrained=True, kernels=[7, 5, 3, 3])


def test_files_of_other_models_are_told() -> None:
    with pytest.raises(CheckpointError, match="MIT Han Lab"):
        zoo.from_official("efficientvit_m0", {"backbone.stages.0.op_list.0.main.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"it has no tensor 'patch_embed.0.c.weight'"):
        zoo.from_official("efficientvit_m0", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"num_heads = \[2, 2, 3\], not \[4, 4, 4\]"):
        zoo.from_official("efficientvit_m0", zoo.to_official(build()), num_heads=[4, 4, 4])
    with pytest.raises(CheckpointError, match=r"blocks3.*attention_biases is \[3, 4\], not \[3, 16\]"):
        zoo.from_official("efficientvit_m0", zoo.to_official(build(img_size=128)))


# ---- windows -----------------------------------------------------------------------------------------------


def test_a_map_that_windows_do_not_fill_is_padded_by_zeros_below_and_to_the_right() -> None:
    torch.manual_seed(0)
    layer = shaken(WindowAttention(8, 2, 4, (3, 3), 3)).eval()
    x = torch.randn(2, 8, 4, 2)
    padded = F.pad(x, (0, 1, 0, 2))
    rows = [layer(padded[:, :, i : i + 3]) for i in (0, 3)]
    close(layer(x), torch.cat(rows, 2)[:, :, :4, :2], 1e-5)


def test_a_map_smaller_than_a_window_is_padded_to_one() -> None:
    model = build(features_only=True, shrink_windows=False)
    last = model(image(64, 64))[-1]
    assert last.shape == (2, 48, 1, 1)
    assert last.isfinite().all()


def test_windows_do_not_exceed_the_map_they_are_built_for() -> None:
    sides = {
        size: [stage[-1].attention.window for stage in build(img_size=size).stages]
        for size in (224, 128, 512, (96, 512), 16)
    }
    assert sides == {224: [7, 7, 4], 128: [7, 4, 2], 512: [7, 7, 7], (96, 512): [6, 3, 2], 16: [1, 1, 1]}


def test_distances_count_in_rows_of_the_window() -> None:
    assert distances(2).tolist() == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


def test_another_input_size_interpolates_the_tables() -> None:
    model = build()
    before = model.stages[2][3].attention.cascade.table.detach().clone()
    expected = model(image(224, 224))
    model.set_input_size(224)
    assert torch.equal(model(image(224, 224)), expected)
    model.set_input_size((448, 448))
    table = model.stages[2][3].attention.cascade.table
    close(table, resized_table(before, 7))
    assert table.requires_grad
    assert model.pretrained_cfg["input_size"] == (3, 448, 448)
    assert model(image(448, 448, batch=1)).shape == (1, 5)
    assert torch.equal(resized_table(before, 4), before)


# ---- heads, inference form, attention maps -----------------------------------------------------------------


def test_distillation_trains_two_heads_and_predicts_their_mean() -> None:
    model = build(distillation=True)
    x = image(64, 64)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    label, teacher = (classifier for classifier in (model.head.label, model.head.teacher))
    close(model(x), (label(features) + teacher(features)) / 2)
    logits = model.train()(x)
    assert [tuple(part.shape) for part in logits] == [(2, 5), (2, 5)]
    model.reset_classifier(3)
    assert [layer.out_features for layer in model.get_classifier()] == [3, 3]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (224, 224)),
        ({"distillation": True, "img_size": 96}, (96, 96)),
        ({"in_chans": 3, "num_classes": 0, "global_pool": ""}, (100, 70)),
        ({"kernels": [7, 1, 3], "window_size": [3, 4, 5]}, (130, 65)),
    ],
)
def test_fused_copy_gives_equal_outputs_and_leaves_the_model(options: dict[str, Any], size: tuple) -> None:
    model = build(**options)
    x, state = image(*size), {n: t.clone() for n, t in model.state_dict().items()}
    fused = model.fuse()
    close(fused(x), model(x))
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_fused_copy_is_exported_for_any_batch_and_fused_again() -> None:
    fused, x = build().fuse(), image(96, 70, batch=3)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(fused, (image(96, 70),), dynamic_shapes={"x": {0: batch}})
    close(program.module()(x), fused(x), 1e-5)
    assert torch.equal(fused.fuse()(x), fused(x))
    fused.set_input_size((250, 230))
    with pytest.raises(ConfigError, match="keeps its windows"):
        fused.set_input_size(448)


def test_fused_copy_shows_its_attention_too() -> None:
    model, x = build(), image(224, 224, batch=1)
    with capture(model) as maps:
        model(x)
    with capture() as fused:
        model.fuse()(x)
    assert list(maps)[:2] == [f"stages.0.0.attention.cascade.heads.{i}" for i in range(2)]
    assert len(maps) == len(fused) == 2 + 2 + 6
    for one, other in zip(maps.values(), fused.values(), strict=True):
        close(other.weights, one.weights, 1e-5)


def test_backends_agree() -> None:
    model, x = build(), image(160, 96)
    expected = model(x)
    with backend("reference"):
        close(model(x), expected, 1e-5)


def test_decay_leaves_the_tables_alone() -> None:
    assert build().no_weight_decay() == {
        f"stages.{stage}.{block}.attention.cascade.table" for stage, block in ((0, 0), (1, 3), (2, 3), (2, 4))
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": [3, 2, 2]}, "16 channels cannot be shared out evenly to 3 heads"),
        ({"depths": [1, 1]}, "one entry per stage, not 3, 2 and 3"),
        ({"dims": [12, 32, 48]}, "divisible by 8, not 12"),
        ({"kernels": [5, 3]}, "at least as many as heads"),
        ({"kernels": [5, 4, 3]}, "kernels are odd"),
        ({"key_dim": [8, 8]}, "key_dim is a positive number, or one for each of the 3 stages"),
        ({"window_size": 0}, "window_size is a positive number"),
    ],
)
def test_impossible_arguments_are_a_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)
