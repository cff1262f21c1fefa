"""DLGSANet: what is its own; the plain layout in `benchmarks/plain` is the oracle, a picture at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from domains.superres.models import dlgsanet_layers
from domains.superres.models.dlgsanet import DLGSANet
from domains.superres.models.dlgsanet_layers import ChannelAttention, in_tiles, softmax_or, tlc_windows
from domains.superres.weights.dlgsanet import DLGSANetOfficial
from zoo.attention import capture
from zoo.bench.peer import load_peer
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.training.finetune import merge_lora
from zoo.weights.checkpoint import save_state_dict
from zoo.weights.exchange import load_weights

SMALL: dict[str, Any] = {
    "dim": 12,
    "groups": 2,
    "blocks": 1,
    "upscale": 2,
    "idynamic_num_heads": 3,
    "restormer_num_heads": 2,
    "tlc_kernel": 10,
}
"""Official arguments."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"buildblock_type": "edge"},
    {"buildblock_type": "idynamic", "window_size": 5},
    {"buildblock_type": "restormer"},
    {"idynamic": False, "window_size": 3},
    {"idynamic_ffn_type": "BaseFFN", "restormer_ffn_type": "BaseFFN", "restormer_ffn_expansion_factor": 1.3},
    {"restormer_ffn_type": "BaseFFN", "idynamic_ffn_expansion_factor": 2.66},
    {"activation": "gelu", "tlc_flag": False},
    {"activation": "sigmoid", "window_size": 3},
    {"activation": "none"},
    {"upsampler": "pixelshuffle", "upscale": 4},
    {"upsampler": "pixelshuffle", "upscale": 3, "body_norm": True},
    {"upsampler": ""},
    {"in_chans": 1, "img_range": 255.0},
    {"body_norm": True, "blocks": 2},
    {"dim": 10, "idynamic_num_heads": 4, "upscale": 3},
    {"blocks": 2, "groups": 1, "upscale": 1},
]
COUNTS = {
    "tiny": (565_710, 572_205, 581_298, 245),
    "light": (745_188, 751_683, 760_776, 325),
    "large": (4_733_724, 4_745_889, 4_762_920, 641),
}


def plain(**options: Any) -> Any:
    """The peer with weights of the size of trained ones."""
    torch.manual_seed(1)
    peer = load_peer("dlgsanet").PlainDLGSANet(**(SMALL | options))
    for parameter in peer.parameters():
        if parameter.ndim != 4:
            nn.init.normal_(parameter, 1.0 if parameter.ndim > 1 else 0.3, 0.2)
    return peer.eval()


def ours(peer: nn.Module, **options: Any) -> DLGSANet:
    """The model with the weights of the peer, by its official arguments."""
    model = zoo.from_official("dlgsanet_mini", peer.state_dict(), **(SMALL | options))
    assert isinstance(model, DLGSANet)
    return model


def small(**options: Any) -> DLGSANet:
    return ours(plain(**options), **options)


def close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# ---- held to the plain layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_official_option_equals_the_plain_layout(options: dict[str, Any]) -> None:
    peer = plain(**options)
    model = ours(peer, **options)
    x = torch.rand(1, peer.mean.shape[1] if options.get("in_chans") == 1 else 3, 23, 27)
    expected = peer(x)
    size = model.scale * 23, model.scale * 27
    assert tuple(expected.shape[2:]) == size
    close(model(x), expected)
    with torch.no_grad():
        close(model(x), expected)


@pytest.mark.parametrize("options", [{}, {"buildblock_type": "edge"}, {"idynamic": False}], ids=str)
def test_trains_as_the_plain_layout_does(options: dict[str, Any]) -> None:
    peer = plain(**options).double().train()
    model = ours(peer.float(), **options).double().train()
    peer.double()
    x, target = torch.rand(2, 3, 14, 17).double(), torch.rand(2, 3, 28, 34).double()
    for network in (model, peer):
        (network(x) - target).abs().mean().backward()
    own = zoo.to_official(model, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert own.keys() == dict(peer.named_parameters()).keys()
    for name, parameter in peer.named_parameters():
        close(own[name], parameter.grad, 1e-9)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (11, 2), (10, 10), (33, 21)])
def test_any_size_works(size: tuple[int, int]) -> None:
    peer = plain()
    x = torch.rand(1, 3, *size)
    close(ours(peer)(x), peer(x))


def test_pictures_of_a_batch_do_not_see_each_other() -> None:
    model = small()
    x = torch.rand(2, 3, 23, 15)
    with torch.no_grad():
        close(model(x), torch.cat([model(x[:1]), model(x[1:])]), 2e-6)


def test_windows_are_for_evaluation_only() -> None:
    model, whole = small(), small(tlc_flag=False)
    x = torch.rand(1, 3, 23, 27)
    with torch.no_grad():
        assert (model(x) - whole(x)).abs().max() > 1e-4
        close(model.train()(x), whole(x))


# ---- sizes and windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", COUNTS)
def test_published_variants_have_their_sizes(family: str) -> None:
    *parameters, entries = COUNTS[family]
    for scale, count in zip((2, 3, 4), parameters, strict=True):
        name = f"dlgsanet_{family}_x{scale}"
        model = zoo.create_model(name)
        assert model.scale == scale
        assert sum(p.numel() for p in model.parameters()) == count == zoo.model_card(name).parameters
        assert len(zoo.to_official(model)) == entries


@pytest.mark.parametrize(("scale", "kernel"), [(2, 96), (3, 72), (4, 48)])
def test_published_windows_depend_on_the_scale(scale: int, kernel: int) -> None:
    model = zoo.create_model("dlgsanet_mini", scale=scale, dim=6)
    assert [m.tlc_kernel for m in model.modules() if isinstance(m, ChannelAttention)] == [kernel] * 2


@pytest.mark.parametrize(
    ("size", "kernel", "starts"),
    [
        (97, 48, [0, 25, 49]),
        (49, 48, [0, 1]),
        (48, 48, [0]),
        (5, 48, [0]),
        (23, 10, [0, 7, 13]),
        (200, 48, [0, 38, 76, 114, 152]),
        (16, 5, [0, 4, 8, 11]),
    ],
)
def test_window_origins(size: int, kernel: int, starts: list[int]) -> None:
    assert tlc_windows(size, kernel) == starts


@pytest.mark.parametrize("halo", [1, 2])
def test_tiles_give_what_the_whole_map_gives(halo: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(3, 4, 2 * halo + 1, padding=halo)

    def branch(x: Tensor) -> Tensor:
        return dlgsanet_layers.convolved(conv, x)

    x = torch.randn(2, 11, 5, 3)
    monkeypatch.setattr(dlgsanet_layers, "TILE", (4, 3))
    with torch.no_grad():
        close(in_tiles(branch, x, halo), branch(x), 1e-6)


# ---- attention ---------------------------------------------------------------------------------------------


def test_attention_is_captured_by_window_and_sparse() -> None:
    model = small()
    with capture() as maps:
        model(torch.rand(1, 3, 10, 10))
    found = maps["groups.0.layers.1.mixer"].weights
    assert found.shape == (1, 2, 6, 6)
    assert 0 < (found == 0).float().mean() < 1
    assert (found >= 0).all()


def test_silent_channels_train_without_nan() -> None:
    layer = ChannelAttention(6, 2, softmax_or("relu"), None).train()
    nn.init.zeros_(layer.qkv.weight[:1])
    layer(torch.rand(1, 4, 5, 6), nn.LayerNorm(6)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_low_rank_updates_count_as_if_they_were_merged() -> None:
    peft = pytest.importorskip("peft")
    model = small()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False), model)
    x = torch.rand(1, 3, 12, 11)
    with torch.no_grad():
        expected = model.eval()(x)
        merge_lora(model)
        close(model(x), expected)


# ---- precision, compilation --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_keep_their_dtype(dtype: torch.dtype) -> None:
    model = small()
    x = torch.rand(1, 3, 23, 27)
    expected = model(x)
    out = model.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    close(out.float(), expected, 0.1 if dtype == torch.bfloat16 else 1e-4)


def test_autocast() -> None:
    model = small()
    x = torch.rand(1, 3, 23, 27)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            close(model(x).float(), expected, 0.1)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_graph_breaks(training: bool) -> None:
    torch._dynamo.reset()
    model = small(groups=1).train(training)
    x = torch.rand(1, 3, 10, 12)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(x), model(x), 1e-5)


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_official_weights_there_and_back(options: dict[str, Any]) -> None:
    peer = plain(**options)
    official = zoo.to_official(ours(peer, **options))
    assert official.keys() == peer.state_dict().keys()
    assert all(torch.equal(official[name], value) for name, value in peer.state_dict().items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shapes_are_read_from_the_file(options: dict[str, Any]) -> None:
    hidden = {"buildblock_type", "activation", "tlc_flag", "tlc_kernel", "img_range"}
    official = SMALL | options
    told = {name: value for name, value in official.items() if name in hidden}
    state = plain(**options).state_dict()
    found = DLGSANetOfficial.config(state, **told)
    stated = DLGSANetOfficial.config(state, **official)
    ratios = {"local_ratio", "global_ratio", "kernel_size", "group_channels", "num_heads"}
    assert {n: v for n, v in found.items() if n not in ratios} == {
        n: v for n, v in stated.items() if n in found and n not in ratios
    }
    again = zoo.to_official(zoo.from_official("dlgsanet_mini", state, **told))
    assert DLGSANetOfficial.matches(state)
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_averaged_weights_of_a_basicsr_file(tmp_path: Path) -> None:
    peer = plain()
    averaged = {f"module.{name}": value for name, value in peer.state_dict().items()}
    other = {name: torch.zeros_like(value) for name, value in averaged.items()}
    torch.save({"params": other, "params_ema": averaged}, tmp_path / "net_g.pth")
    model = zoo.from_official("dlgsanet_mini", tmp_path / "net_g.pth", tlc_kernel=10)
    x = torch.rand(1, 3, 12, 12)
    close(model(x), peer(x))
    save_state_dict(zoo.to_official(model), tmp_path / "again.safetensors")
    close(zoo.from_official("dlgsanet_mini", tmp_path / "again.safetensors", tlc_kernel=10)(x), model(x), 0.0)


def test_own_checkpoint_round_trip(tmp_path: Path) -> None:
    model = zoo.create_model("dlgsanet_mini", scale=3, dim=6, tlc_kernel=8).eval()
    zoo.save_model(model, tmp_path / "mini.safetensors")
    again, _ = zoo.load_model(tmp_path / "mini.safetensors")
    x = torch.rand(1, 3, 9, 10)
    assert torch.equal(again(x), model(x))


def test_another_scale_is_named() -> None:
    official, model = plain().state_dict(), small(upscale=3)
    with pytest.raises(CheckpointError, match="enlarges 2 times, the model 3 times"):
        load_weights(model, official)
    with pytest.raises(CheckpointError, match="has scale=2, not 4"):
        zoo.from_official("dlgsanet_mini", official, upscale=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 24}, "has dim=12, not 24"),
        ({"buildblock_type": "idynamic"}, "blocks of type sparseedge or edge, not idynamic"),
        ({"buildblock_type": "dense"}, "no buildblock_type 'dense'"),
        ({"idynamic_num_heads": 6}, "4 groups of filters, not of 6 channels"),
        ({"restormer_ffn_expansion_factor": 3.0}, "restormer_ffn of 24 channels, not 3.0x"),
        ({"upsampler": "pixelshuffle"}, "has upsampler=direct, not stepwise"),
        ({"idynamic_ffn_type": "BaseFFN"}, "has local_mlp=gated, not plain"),
        ({"restormer_ffn_type": "FFN"}, "no feed-forward 'FFN'"),
    ],
)
def test_options_that_are_not_those_of_the_file_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        zoo.from_official("dlgsanet_mini", plain().state_dict(), **options)


def test_files_that_do_not_fit_are_told() -> None:
    official = plain().state_dict()
    with pytest.raises(CheckpointError, match=r"no tensor 'overlap_embed\.0\.proj\.weight'"):
        zoo.from_official("dlgsanet_mini", {"first_conv.weight": torch.zeros(3)})
    assert not DLGSANetOfficial.matches({"first_conv.weight": torch.zeros(3)})
    name = "deep_feature_extraction.1.body.0.norm1.body.weight"
    with pytest.raises(CheckpointError, match=r"missing \(1\): deep_feature_extraction\.1\.body\.0\.norm1"):
        zoo.from_official("dlgsanet_mini", {n: v for n, v in official.items() if n != name})


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_type": "dense"}, "no blocks 'dense'. Types of blocks: sparse, softmax, local, global"),
        ({"kernel_size": 6}, "odd side, not 6"),
        ({"group_channels": 0}, "group_channels is at least 1, not 0"),
        ({"dim": 20}, "dim=20 cannot be shared out evenly"),
        ({"num_heads": 5}, "dim=24 is not divisible by num_heads=5"),
        ({"activation": "tanh"}, "no activation 'tanh'. Activations: relu"),
        ({"local_mlp": "swiglu"}, "no MLP 'swiglu'. MLPs: gated, plain"),
        ({"local_ratio": 0.01}, "no hidden channel"),
        ({"tlc_kernel": -1}, "side of a window in pixels, not -1"),
        ({"upsampler": "nearest"}, "no upsampler 'nearest'. Upsamplers: direct, stepwise, none"),
        ({"upsampler": "none"}, "'none' does not enlarge 2 times"),
        ({"upsampler": "stepwise", "scale": 5}, r"3 or 2\^n times, not 5"),
        ({"img_range": 0.0}, "img_range is positive"),
        ({"blocks": 0}, "blocks is at least 1, not 0"),
    ],
)
def test_impossible_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("dlgsanet_mini", **options)


def test_another_scale_than_the_published_one_is_told() -> None:
    with pytest.raises(ConfigError, match="For 3 times, use dlgsanet_light_x3"):
        zoo.create_model("dlgsanet_light_x2", scale=3)


def test_pictures_of_other_channels_are_told() -> None:
    with pytest.raises(DataError, match=r"\(B, 3, H, W\) here, not \(1, 1, 8, 8\)"):
        small()(torch.rand(1, 1, 8, 8))
