"""LWGANet: what is its own; the plain layout in `benchmarks/plain` is the oracle on square images."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from domains.vision.models.lwganet import (
    LargeKernelAttention,
    LWGANet,
    MediumAttention,
    at_maxima,
    cell_maxima,
    reflected,
)
from zoo.attention import backend, capture
from zoo.bench.peer import load_peer
from zoo.errors import CheckpointError, ConfigError, DataError

TINY: dict[str, Any] = {"dim": 16, "depths": [1, 2, 1, 1], "head_width": 24, "num_classes": 5}
DENSE = {"features_only": True, "out_norms": True}
NAMES = ["lwganet_l0", "lwganet_l1", "lwganet_l2"]

pytestmark = pytest.mark.filterwarnings("ignore:The official weights:UserWarning")


def build(name: str = "lwganet_l0", **options: Any) -> LWGANet:
    model = zoo.create_model(name, **(TINY | {"drop_path_rate": 0.0} | options))
    assert isinstance(model, LWGANet)
    return shaken(model).eval()


def shaken(model: nn.Module) -> Any:
    """With weights of the size of trained ones, and norms that do something."""
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else tensor.normal_(0, 0.3)
    return model


def plain(model: LWGANet) -> nn.Module:
    """The peer with the same weights."""
    built: dict[str, Any] = model.__dict__["zoo_config"]["config"]
    act = nn.ReLU if model.act is nn.ReLU else nn.GELU
    sizes = {"depths": built["depths"], "stem_dim": built["dim"]}
    if not model.features_only:
        sizes |= {"feature_dim": built["head_width"], "num_classes": built["num_classes"]}
    if "kernel_sizes" in built:
        sizes["att_kernel"] = built["kernel_sizes"]
    peer = load_peer("lwganet").PlainLWGANet(**sizes, act=act, dense=model.features_only)
    peer.load_state_dict(zoo.to_official(model))
    return peer.train(model.training)


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- held to the plain layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, DENSE], ids=["classifier", "dense"])
def test_equals_the_plain_layout_and_so_does_its_fused_form(name: str, options: dict[str, Any]) -> None:
    model = build(name, **options)
    x = torch.randn(2, 3, 128, 128)
    expected = plain(model)(x)
    close(model(x), expected)
    close(model.fuse()(x), expected)


def test_equals_the_plain_layout_with_other_kernels() -> None:
    model = build(kernel_sizes=[7, 5, 3, 9])
    x = torch.randn(1, 3, 160, 160)
    close(model(x), plain(model)(x))


def test_trains_as_the_plain_layout_does() -> None:
    model = build().double().train()
    peer = plain(model).double()
    x = torch.randn(3, 3, 96, 96, dtype=torch.float64)
    for network in (model, peer):
        network(x).square().sum().backward()
    own = zoo.to_official(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert own.keys() == dict(peer.named_parameters()).keys()
    for name, parameter in peer.named_parameters():
        close(own[name], parameter.grad, 1e-7)
    for name, tensor in zoo.to_official(model).items():  # the running statistics have followed the batch
        close(tensor, peer.state_dict()[name], 1e-9)


@pytest.mark.parametrize(
    ("name", "options", "millions"),
    [
        ("lwganet_l0", {}, 2.941),
        ("lwganet_l0", DENSE, 1.333),
        ("lwganet_l1", {"num_classes": 45}, 5.907),
        ("lwganet_l2", DENSE, 12.003),
    ],
)
def test_published_variants_have_their_sizes(name: str, options: dict[str, Any], millions: float) -> None:
    model = zoo.create_model(name, **options)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


# ---- its parts, by definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(13, 13), (5, 9), (3, 3), (2, 4), (1, 1), (1, 6), (20, 8)])
def test_medium_range_is_the_sum_of_strips_and_sheared_strips_on_any_map(size: tuple[int, int]) -> None:
    layer = MediumAttention(2, 5)
    nn.init.normal_(layer.strips)
    height, width = size
    small = torch.randn(1, 2, height, width)
    padded = F.pad(small, (3, 3, 3, 3))
    expected = torch.zeros_like(small)
    for a, b in product(range(-2, 3), range(-1, 2)):
        straight, lying, sheared, sheared_lying = layer.strips[:, :, a + 2, b + 1].T[:, None, :, None, None]
        for tap, down, right in (
            (straight, a, b),
            (lying, b, a),
            (sheared, a, b - a),
            (sheared_lying, b - a, a),
        ):
            expected += tap * padded[:, :, 3 + down :, 3 + right :][:, :, :height, :width]
    close(F.conv2d(small, layer.merged(), padding=3, groups=2), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (4, 5), (30, 6)])
def test_medium_range_leaves_out_only_taps_beyond_the_map(size: tuple[int, int]) -> None:
    layer = MediumAttention(2, 11).eval()
    nn.init.normal_(layer.strips)
    x = torch.randn(1, 2, *size)
    blurred = F.conv2d(reflected(F.max_pool2d(x, 3, 1, 1), 1, 2), layer.blur, stride=3, groups=2)
    gate = layer.norm(F.conv2d(blurred, layer.merged(), padding=6, groups=2)).sigmoid()
    close(layer(x), x * F.interpolate(gate, size))


def test_reflection_goes_on_where_the_map_is_smaller() -> None:
    row = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]])
    assert reflected(row, 1, 2)[0, 0, 0].tolist() == [2, 1, 2, 3, 4, 3, 2]
    assert reflected(row[..., :2], 1, 2)[0, 0, 0].tolist() == [2, 1, 2, 1, 2]
    assert reflected(row[..., :1], 1, 2)[0, 0].tolist() == [[1, 1, 1, 1]] * 4
    wide = torch.randn(1, 2, 3, 5)
    close(reflected(wide, 1, 2), F.pad(wide, (1, 2, 1, 2), mode="reflect"))


@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 3)])
def test_values_go_back_to_the_first_maximum_of_each_cell(size: tuple[int, int]) -> None:
    x = torch.randint(0, 3, (2, 3, *size)).float()  # with many ties
    pooled, index = cell_maxima(x)
    values = torch.rand_like(pooled) + 1
    placed = at_maxima(values, index, x)
    assert placed.shape == x.shape
    for b, c, i, j in product(*map(range, pooled.shape)):
        cell = x[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        expected = torch.zeros(cell.numel())
        expected[cell.flatten().tolist().index(cell.max())] = values[b, c, i, j]
        assert placed[b, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten().tolist() == expected.tolist()


@pytest.mark.parametrize("size", [(14, 14), (9, 12), (4, 2), (1, 1)])
def test_dilated_convolution_by_phases_equals_itself(size: tuple[int, int]) -> None:
    layer = LargeKernelAttention(4, nn.GELU)
    x = torch.randn(2, 4, *size)
    close(layer._dilated(x), layer.conv_wide(x), 1e-5)


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (64, 64), (100, 112), (96, 128), (240, 36)])
def test_any_size_works_fused_as_well(size: tuple[int, int]) -> None:
    model = build()
    x = torch.randn(2, 3, *size)
    close(model.fuse()(x), model(x))
    maps = model.forward_intermediates(x, intermediates_only=True)
    shapes = [tuple(m.shape[2:]) for m in maps]
    expected = [tuple(s // 4 for s in size)]
    for _ in range(3):
        expected.append(tuple(-(-s // 2) for s in expected[-1]))
    assert shapes == expected


def test_a_transposed_image_with_transposed_weights_gives_the_same() -> None:
    """Rows and columns are treated alike on a map that is not square."""
    model, other = build(), build()
    state = {
        name: tensor[:, [1, 0, 3, 2]]
        if name.endswith("strips")
        else tensor.mT
        if tensor.ndim == 4
        else tensor
        for name, tensor in model.state_dict().items()
    }
    other.load_state_dict(state)
    x = torch.randn(1, 3, 96, 64)
    close(other(x.mT), model(x))


def test_too_small_an_image_is_told() -> None:
    with pytest.raises(DataError, match="at least 32"):
        build()(torch.randn(1, 3, 31, 64))


# ---- attention ---------------------------------------------------------------------------------------------


def test_attention_of_the_last_two_stages_is_captured() -> None:
    model = build()
    x = torch.randn(1, 3, 64, 96)
    with capture() as maps:
        captured = model(x)
    shapes = {name: tuple(found.weights.shape) for name, found in maps.items()}
    assert shapes == {"stages.2.1.far.attention": (1, 4, 6, 6), "stages.3.1.far": (1, 8, 6, 6)}
    close(captured, model(x))
    with backend("reference"):
        close(model(x), captured)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, DENSE, {"out_norms": True}, {"in_chans": 4}, {"act": "relu", "mlp_ratio": 3.0}]
)
def test_official_weights_there_and_back(options: dict[str, Any]) -> None:
    model = build(**options)
    official = zoo.to_official(model)
    act = {"act_layer": "ReLU"} if options.get("act") == "relu" else {}
    again = zoo.from_official("lwganet_l0", official, **act)
    x = torch.randn(1, model.in_chans, 64, 64)
    assert again.state_dict().keys() == model.state_dict().keys()
    close(again(x), model(x), 0.0)
    second = zoo.to_official(again)
    assert second.keys() == official.keys()
    assert all(torch.equal(second[name], official[name]) for name in official)


def test_official_names_of_a_dense_form_without_counters_and_filters_are_enough() -> None:
    model = build(**DENSE)
    kept = {
        n: t for n, t in zoo.to_official(model).items() if not n.endswith((".num_batches_tracked", ".filt"))
    }
    x = torch.randn(1, 3, 64, 64)
    close(zoo.from_official("lwganet_l0", kept)(x), model(x), 0.0)


def test_timm_hands_out_the_normalised_maps_of_the_dense_form(tmp_path: Path) -> None:
    model = build(**DENSE)
    path = tmp_path / "dense.pth"
    torch.save(zoo.to_official(model), path)
    sizes = {name: TINY[name] for name in ("dim", "depths")}
    features = timm.create_model(
        "lwganet_l0",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path)},
        features_only=True,
        out_indices=(1, 3),
        out_norms=True,
        **sizes,
    )
    x = torch.randn(1, 3, 64, 64)
    close(features.eval()(x), [model(x)[i] for i in (1, 3)], 0.0)
    assert features.feature_info.channels() == [32, 128]


def test_backbone_of_a_detector_is_taken_out_of_it() -> None:
    model = build(**DENSE)
    detector = {f"backbone.{name}": tensor for name, tensor in zoo.to_official(model).items()}
    detector |= {"neck.lateral_convs.0.conv.weight": torch.zeros(2, 2, 1, 1)}
    x = torch.randn(1, 3, 64, 64)
    close(zoo.from_official("lwganet_l0", detector)(x), model(x), 0.0)


def test_published_classifiers_start_other_classes_channels_and_dense_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small checkpoint stands in for the real file."""
    model = build("lwganet_l2")
    card = zoo.weights.cards.weight_card("lwganet_l2_in1k")
    file = tmp_path / card.name / card.file
    file.parent.mkdir()
    torch.save({"model": zoo.to_official(model), "epoch": 296}, file)
    monkeypatch.setenv("ZOO_MIRROR", str(tmp_path))
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    x = torch.randn(1, 3, 64, 64)
    loaded = zoo.create_model("lwganet_l2", pretrained=True)
    assert loaded.drop_path_rate == 0.1
    close(loaded.eval()(x), model(x), 0.0)
    few = zoo.create_model("lwganet_l2", pretrained=True, num_classes=3, in_chans=1).eval()
    gray = x.mean(1, keepdim=True)
    close(few.forward_features(gray), model.forward_features(gray.expand(-1, 3, -1, -1)))
    assert few(gray).shape == (1, 3)
    dense = zoo.create_model("lwganet_l2", pretrained=True, **DENSE).eval()
    fresh = [
        F.batch_norm(m, torch.zeros(m.shape[1]), torch.ones(m.shape[1]))
        for m in model.forward_intermediates(x, intermediates_only=True)
    ]
    close(dense(x), fresh)


def test_loading_official_weights_tells_their_licence() -> None:
    with pytest.warns(UserWarning, match="CC BY-NC 4.0"):
        zoo.from_official("lwganet_l0", zoo.to_official(build()))
    for name in NAMES:
        assert "non-commercial" in zoo.model_card(name).licence
        assert "non-commercial" in zoo.weights.cards.weight_card(f"{name}_in1k").licence


def test_weights_that_do_not_fit_are_told() -> None:
    official = zoo.to_official(build())
    name = "stages.4.blocks.0.GA3.attn.qkv.weight"
    with pytest.raises(CheckpointError, match=r"GA3\.attn\.qkv\.weight is \[40, 16\], not \[48, 16\]"):
        zoo.from_official("lwganet_l0", official | {name: official[name][:40]})
    with pytest.raises(CheckpointError, match=r"no tensor 'Stem\.proj\.weight'"):
        zoo.from_official("lwganet_l0", {"stem.weight": torch.zeros(3)})
    blur = "stages.0.blocks.0.MRA.max_m2.filt"
    with pytest.raises(CheckpointError, match=f"{blur} is not the blur filter"):
        zoo.from_official("lwganet_l0", official | {blur: official[blur] * 2})


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 20}, "dim is a multiple of 8, not 20"),
        ({"kernel_sizes": [11, 11, 11, 10]}, "odd and at least 3, not 10"),
        ({"depths": [1, 1, 1]}, "four stages"),
        ({"act": "silu"}, "act is one of gelu, relu, not 'silu'"),
    ],
)
def test_impossible_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**options)


def test_drop_path_acts_before_the_last_norm() -> None:
    """A dropped branch still counts in the statistics of the norm, and gives its bias."""
    block = build(drop_path_rate=0.9).stages[3][1].train()
    torch.manual_seed(0)
    seen: list[Tensor] = []
    block.norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    x = torch.randn(8, 128, 3, 3)
    out = block(x)
    silent = seen[0].flatten(1).abs().amax(1) == 0
    assert 0 < silent.sum() < 8
    norm = block.norm
    mean, var = seen[0].mean((0, 2, 3)), seen[0].var((0, 2, 3), correction=0)
    constant = norm.bias - mean * norm.weight / (var + norm.eps).sqrt()
    close((out - x)[silent], constant[:, None, None].expand_as(out[silent]))


def test_fused_form_compiles_and_has_no_norm_left() -> None:
    torch._dynamo.reset()
    fused = build().fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    x = torch.randn(1, 3, 64, 64)
    close(torch.compile(fused, fullgraph=True, backend="eager")(x), fused(x))
