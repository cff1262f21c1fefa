"""What holds for every vision backbone: timm's contract, saving, compiling, half precision, messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from small_backbones import SIDE, SMALL, build, images
from timm.data import create_transform, resolve_model_data_config
from timm.models import group_parameters
from torch import Tensor, nn

import domains.vision  # noqa: F401  (enters the models in timm's registry)
import zoo
from zoo.errors import CheckpointError, ConfigError, DataError, UnknownName
from zoo.registry import model_class
from zoo.weights.exchange import load_weights

COMPILED = [
    "agent_deit_tiny",
    "agent_pvt_tiny",
    "biformer_tiny",
    "biformer_stl_nchw",
    "davit_tiny",
    "dhvt_tiny_cifar_patch4",
    "efficientvit_m1",
    "inline_pvt_tiny",
    "halonet26t",
    "litv2_s",
    "lwganet_l0",
    "mala_tiny",
    "spectformer_xs",
    "sret_t",
]
"""One of each kind of block: compiling takes long."""
pytestmark = pytest.mark.filterwarnings("ignore:The official weights:UserWarning")
ALL = pytest.mark.parametrize("name", SMALL)


def width(features: Tensor) -> int:
    """Channels of a map, or of tokens with a class token."""
    return features.shape[1 if features.ndim == 4 else 2]


def pooled(features: Tensor) -> Tensor:
    """The mean of a map, or the class token."""
    return features.mean((2, 3)) if features.ndim == 4 else features[:, 0]


def test_all_models_of_the_domain_are_tested_here() -> None:
    assert zoo.list_models("vision/*") == sorted(SMALL)


# ---- the calls of timm -------------------------------------------------------------------------------------


@ALL
def test_forward_is_the_head_of_the_features(name: str) -> None:
    model, x = build(name), images()
    features = model.forward_features(x)
    assert width(features) == model.num_features
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model(x).shape == (2, 5)
    torch.testing.assert_close(model(x), model.forward_head(features))


@ALL
def test_without_classes_the_pooled_features_come_out(name: str) -> None:
    x = images()
    model = build(name, num_classes=0)
    features = model.forward_features(x)
    torch.testing.assert_close(model(x), pooled(features))
    assert isinstance(model.get_classifier(), nn.Identity)
    torch.testing.assert_close(build_like(model, global_pool="")(x), features)


def build_like(model: nn.Module, **overrides) -> nn.Module:
    built = model.zoo_config
    other = zoo.create_model(f"vision/{built['name']}", **(built["config"] | overrides)).eval()
    other.load_state_dict(model.state_dict())
    return other


@ALL
def test_the_head_can_be_changed_after_construction(name: str) -> None:
    model, x = build(name), images()
    model.reset_classifier(11)
    assert model(x).shape == (2, 11)
    assert model.num_classes == 11
    model.reset_classifier(0, "")
    assert width(model(x)) == model.num_features
    model.reset_classifier(3, "max")
    assert model(x).shape == (2, 3)
    with pytest.raises(ConfigError, match="a head needs at least one class and a pool"):
        model.reset_classifier(3, "")
    with pytest.raises(ConfigError, match="'avg', 'max' or ''"):
        model.reset_classifier(3, "median")


@ALL
@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(name: str, channels: int) -> None:
    assert build(name, in_chans=channels)(images(channels=channels)).shape == (2, 5)


@ALL
@pytest.mark.parametrize(("height", "width"), [(97, 131), (160, 96), (224, 224)])
def test_any_size(name: str, height: int, width: int) -> None:
    model = build(name)
    out = model(images(1, 3, height, width))
    assert out.shape == (1, 5)
    assert out.isfinite().all()


@ALL
def test_a_batch_is_its_images_one_by_one(name: str) -> None:
    model, x = build(name), images(3, 3, 97, 120)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), model(x), atol=1e-4, rtol=1e-4)


@ALL
def test_intermediate_maps_are_those_of_the_stages(name: str) -> None:
    model, x = build(name), images()
    final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, model.forward_features(x))
    last = final if final.ndim == 4 else final[:, 1:].mT.reshape(maps[-1].shape)
    torch.testing.assert_close(maps[-1], last)
    for feature, info in zip(maps, model.feature_info, strict=True):
        side = SIDE / info["reduction"]
        assert feature.shape[:2] == (2, info["num_chs"])
        assert all(side - 1 < size < side + 1 for size in feature.shape[2:])
    found = model.forward_intermediates(x, [-1, 0], intermediates_only=True)
    torch.testing.assert_close(found[0], maps[0])
    (first,) = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(first, maps[0])
    with pytest.raises(ConfigError, match="NCHW"):
        model.forward_intermediates(x, output_fmt="NLC")


@ALL
def test_features_only_gives_the_chosen_maps_with_the_weights_of_the_whole(name: str) -> None:
    whole, x = build(name), images()
    chosen = [0, 2]
    model = build(name, features_only=True, out_indices=chosen)
    model.load_state_dict(
        {key: value for key, value in whole.state_dict().items() if key in model.state_dict()}
    )
    expected = whole.forward_intermediates(x, chosen, intermediates_only=True)
    for found, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    infos = [whole.feature_info[i] for i in chosen]
    assert model.feature_info.channels() == [info["num_chs"] for info in infos]
    assert model.feature_info.reduction() == [info["reduction"] for info in infos]
    assert model.feature_info.module_name() == [info["module"] for info in infos]
    assert not any(key.startswith(("head", "norm.")) for key in model.state_dict())
    with pytest.raises(ConfigError, match="features_only"):
        build(name, out_indices=[0])


@ALL
def test_checkpointing_changes_neither_outputs_nor_gradients(name: str) -> None:
    model, x = build(name), images(1)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out = model(x)
        out.square().sum().backward()
        results.append((out, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1])


@ALL
def test_every_parameter_gets_a_gradient(name: str) -> None:
    for options in ({}, {"num_classes": 0}):
        model = build(name, **options).train()
        model(images(2)).square().sum().backward()
        assert not {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


@ALL
def test_every_parameter_has_a_layer_for_its_learning_rate(name: str) -> None:
    model = build(name)
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert groups[first_weight(model)] == 0
        depth = [groups[n] for n in groups if n.startswith("stages.")]
        assert depth == sorted(depth)
    assert model.no_weight_decay() <= {n for n, _ in model.named_parameters()}


def first_weight(model: nn.Module) -> str:
    first = model.pretrained_cfg["first_conv"]
    return f"{first if isinstance(first, str) else first[0]}.weight"


# ---- preprocessing, timm's registry ------------------------------------------------------------------------


@ALL
def test_preprocessing_comes_with_the_model(name: str) -> None:
    model = build(name, img_size=128)
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    assert cfg["input_size"] == (3, 128, 128)
    assert isinstance(model.get_submodule(first_weight(model).removesuffix(".weight")), nn.Conv2d)
    transform = create_transform(**resolve_model_data_config(model))
    assert transform(Image.new("RGB", (150, 140))).shape == (3, 128, 128)
    model.set_input_size((96, 160))
    assert model.pretrained_cfg["input_size"] == (3, 96, 160)
    assert model(images(1, 3, 96, 160)).shape == (1, 5)


@ALL
def test_timm_builds_it(name: str) -> None:
    assert timm.is_model(f"zoo_{name}")
    assert timm.is_model(name)
    model = timm.create_model(f"zoo_{name}", num_classes=4, in_chans=2, drop_rate=0.1, **SMALL[name])
    assert isinstance(model, model_class(name))
    assert model(images(channels=2)).shape == (2, 4)
    assert model.pretrained_cfg["num_classes"] == type(model).published_cfg()["num_classes"]
    features = timm.create_model(f"zoo_{name}", features_only=True, out_indices=(-1,), **SMALL[name]).eval()
    (found,) = features(images())
    assert found.shape[1] == features.feature_info.channels()[0] == model.num_features


@ALL
def test_timm_loads_an_official_file_and_fits_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path / "empty"))
    whole = build(name, num_classes=1000)
    path = tmp_path / "official.pth"
    torch.save({"model": zoo.to_official(whole), "epoch": 3}, path)
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}} | SMALL[name]
    weight = whole.get_parameter(first_weight(whole))
    model = timm.create_model(f"zoo_{name}", num_classes=4, in_chans=1, **options)
    torch.testing.assert_close(model.get_parameter(first_weight(model)), weight.sum(1, keepdim=True))
    model = timm.create_model(f"zoo_{name}", in_chans=5, **options).eval()
    expected = torch.cat([weight, weight[:, :2]], 1) * 3 / 5
    torch.testing.assert_close(model.get_parameter(first_weight(model)), expected)
    features = timm.create_model(f"zoo_{name}", features_only=True, **options).eval()
    x = images()
    maps = whole.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(features(x), maps)
    with pytest.raises(
        CheckpointError, match=r"No weights .* pretrained_cfg_overlay|There is no file .*empty"
    ):
        timm.create_model(f"zoo_{name}", pretrained=True, **SMALL[name])


@ALL
def test_timm_loads_a_checkpoint_in_either_layout(name: str, tmp_path: Path) -> None:
    model, x = build(name), images()
    for state in (model.state_dict(), zoo.to_official(model)):
        path = tmp_path / "model.pth"
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
        other = timm.create_model(f"zoo_{name}", num_classes=5, checkpoint_path=str(path), **SMALL[name])
        torch.testing.assert_close(other.eval()(x), model(x))


# ---- weights -----------------------------------------------------------------------------------------------


@ALL
def test_official_layout_round_trip(name: str) -> None:
    model, x = build(name), images(1)
    official = zoo.to_official(model)
    other = zoo.create_model(f"vision/{name}", num_classes=5, **SMALL[name]).eval()
    load_weights(other, official)
    assert torch.equal(other(x), model(x))
    again = zoo.to_official(other)
    assert again.keys() == official.keys()
    assert all(torch.equal(again[key], official[key]) for key in official if "num_batches" not in key)


@ALL
def test_a_tensor_that_does_not_fit_is_named(name: str) -> None:
    model = build(name)
    official = zoo.to_official(model)
    key = next(key for key, value in official.items() if value.ndim == 4)
    wrong = official | {key: torch.zeros(2, 3, 3, 3)}
    with pytest.raises(CheckpointError, match=rf"{key} is \[2, 3, 3, 3\], not"):
        load_weights(model, wrong)
    del wrong[key]
    with pytest.raises(CheckpointError, match=rf"missing \(1\): {key}"):
        load_weights(model, wrong)


@ALL
def test_weights_are_stored_as_safetensors_demands(name: str) -> None:
    assert all(tensor.is_contiguous() for tensor in build(name).state_dict().values())


@ALL
def test_saved_model_is_rebuilt_with_equal_outputs(name: str, tmp_path: Path) -> None:
    model, x = build(name), images(1)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))


# ---- forms -------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("size", [(SIDE, SIDE), (130, 97)])
def test_fused_copy_computes_the_same(name: str, size: tuple[int, int]) -> None:
    model, x = build(name), images(2, 3, *size)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = model.fuse()
    torch.testing.assert_close(fused(x), model(x), atol=1e-4, rtol=1e-4)
    left = {n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert not {n for n in left if n.split(".")[0] not in ("norm", "out_norms")}  # these have no convolution
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model, x = build(name), images(1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", COMPILED)
def test_exports_for_any_batch(name: str) -> None:
    model = build(name)
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(model, (images(2),), dynamic_shapes={"x": {0: batch}})
    x = images(3)
    torch.testing.assert_close(exported.module()(x), model(x))


@ALL
def test_bfloat16_autocast_is_close(name: str) -> None:
    model, x = build(name), images(4)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


# ---- messages ----------------------------------------------------------------------------------------------


@ALL
def test_wrong_images_are_told(name: str) -> None:
    model = build(name)
    with pytest.raises(DataError, match=r"Images are \(B, 3, H, W\), not \(2, 4, 96, 96\)"):
        model(images(channels=4))
    with pytest.raises(DataError, match="floating point, scaled to"):
        model(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    small = model.min_size - 1
    with pytest.raises(DataError, match=f"{small} x 96 are too small: each side needs at least {small + 1}"):
        model(images(1, 3, small, SIDE))
    with pytest.warns(UserWarning, match="not to be scaled"):
        model.__class__.forward(
            zoo.create_model(f"vision/{name}", **SMALL[name]).eval(), 255 * images().abs()
        )


def test_a_tag_chooses_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path / "mirror"))
    whole = zoo.create_model("biformer_tiny", num_classes=1000)
    (tmp_path / "mirror" / "biformer_tiny_in1k").mkdir(parents=True)
    torch.save(zoo.to_official(whole), tmp_path / "mirror" / "biformer_tiny_in1k" / "biformer_tiny_best.pth")
    assert "biformer_tiny.in1k" in timm.list_models("biformer*", pretrained=True)
    for make in (zoo.create_model, timm.create_model):
        model = make("biformer_tiny.in1k", pretrained=True, num_classes=3)
        assert torch.equal(model.stages[2][3].mlp[0].weight, whole.stages[2][3].mlp[0].weight)
    dense = zoo.create_model("biformer_tiny", pretrained=True, features_only=True, out_norms=True)
    assert torch.equal(dense.stages[2][3].mlp[0].weight, whole.stages[2][3].mlp[0].weight)
    path = tmp_path / "mirror" / "biformer_tiny_in1k" / "biformer_tiny_best.pth"
    model = zoo.create_model("biformer_tiny", checkpoint_path=path, in_chans=1)
    assert torch.equal(model.head.weight, whole.head.weight)
    with pytest.raises(UnknownName, match="no weights 'in21k'"):
        zoo.create_model("biformer_tiny.in21k", pretrained=True)


def test_an_unknown_model_or_argument_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'biformer_tiny'"):
        zoo.create_model("vision/biformer_tinny")
    with pytest.raises(ConfigError, match="Did you mean 'num_classes'"):
        zoo.create_model("vision/biformer_tiny", num_class=3)
    with pytest.raises(ConfigError, match="img_size"):
        zoo.create_model("vision/biformer_tiny", img_size=[1, 2, 3])
