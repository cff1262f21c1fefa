"""BiFormer: its attention by a plain loop, padding rules, official layouts, messages, memory, the peer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from domains.vision.models.biformer import BiLevelRoutingAttention, FullAttention
from zoo.attention import backend, capture
from zoo.bench.memory import peak_memory
from zoo.bench.peer import load_peer
from zoo.errors import CheckpointError, ConfigError
from zoo.weights.exchange import load_weights

TINY = {
    "depths": [1, 1, 2, 1],
    "embed_dims": [16, 16, 32, 32],
    "head_dim": 8,
    "n_win": 2,
    "topks": [1, 2, 3, -2],
}
OFFICIAL = {
    "depth": [1, 1, 2, 1],
    "embed_dim": [16, 16, 32, 32],
    "head_dim": 8,
    "n_win": 2,
    "topks": [1, 2, 3, -2],
}


def by_loop(layer: BiLevelRoutingAttention, x: Tensor) -> Tensor:
    """The attention part of one divisible map `(1, H, W, C)`, region by region and head by head."""
    n, (height, width) = layer.n_win, x.shape[1:3]
    q, k, v = layer.qkv(x[0]).split([layer.qk_dim, layer.qk_dim, x.shape[-1]], -1)
    h, w = height // n, width // n

    def region(t: Tensor, r: int) -> Tensor:
        i, j = divmod(r, n)
        return t[i * h : (i + 1) * h, j * w : (j + 1) * w].flatten(0, 1)

    out = torch.empty_like(v)
    for r in range(n * n):
        match = torch.stack([region(q, r).mean(0) @ region(k, s).mean(0) for s in range(n * n)])
        chosen = match.topk(layer.topk).indices.tolist()
        keys, values = (torch.cat([region(t, s) for s in chosen]) for t in (k, v))
        heads = []
        for qh, kh, vh in zip(
            *(t.chunk(layer.num_heads, -1) for t in (region(q, r), keys, values)), strict=True
        ):
            heads.append((qh @ kh.T * layer.qk_dim**-0.5).softmax(-1) @ vh)
        i, j = divmod(r, n)
        out[i * h : (i + 1) * h, j * w : (j + 1) * w] = torch.cat(heads, -1).view(h, w, -1)
    return out[None]


@pytest.mark.parametrize("qk_dim", [None, 8])
@pytest.mark.parametrize(("shape", "n_win", "topk"), [((8, 12), 2, 3), ((9, 9), 3, 1), ((4, 4), 4, 5)])
def test_attention_is_that_of_the_paper(
    shape: tuple[int, int], n_win: int, topk: int, qk_dim: int | None
) -> None:
    x = torch.randn(1, *shape, 16)
    for regions in ("padded", "floor"):
        layer = BiLevelRoutingAttention(16, 4, n_win, topk, qk_dim=qk_dim, side_dwconv=0, regions=regions)
        torch.testing.assert_close(layer(x), layer.proj(by_loop(layer, x)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(5, 7), (1, 3), (8, 9)])
def test_padding_rules(shape: tuple[int, int]) -> None:
    """`padded` sees more tokens of the bias; `floor` has more regions, and keys and values that are zero."""
    height, width = shape
    x = torch.randn(1, height, width, 16)
    padded = BiLevelRoutingAttention(16, 2, 3, 9, side_dwconv=0)
    size, full = padded.grid(height, width)
    assert full == (3 * size[0], 3 * size[1])
    assert full[0] - height < 3
    wide = torch.zeros(1, *full, 16)
    wide[:, :height, :width] = x
    torch.testing.assert_close(padded(x), padded(wide)[:, :height, :width], atol=1e-5, rtol=1e-4)
    floor = BiLevelRoutingAttention(16, 2, 3, 9, side_dwconv=0, regions="floor")
    size, full = floor.grid(height, width)
    assert size == (max(1, height // 3), max(1, width // 3))
    assert floor(x).shape == x.shape


def test_the_depthwise_convolution_sees_the_values_or_in_full_attention_the_input() -> None:
    x = torch.randn(1, 6, 6, 16)
    layer = BiLevelRoutingAttention(16, 2, 2, 4)
    v = layer.qkv(x)[..., 32:]
    added = layer.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    plain = BiLevelRoutingAttention(16, 2, 2, 4, side_dwconv=0)
    plain.load_state_dict(layer.state_dict(), strict=False)
    expected = plain(x) + torch.nn.functional.linear(added, layer.proj.weight)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    for lepe_of in ("x", "v"):
        full = FullAttention(16, lepe_of=lepe_of)
        none = FullAttention(16, lepe_of="")
        none.load_state_dict(full.state_dict(), strict=False)
        seen = x if lepe_of == "x" else full.qkv(x)[..., 32:]
        added = full.lepe(seen.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        expected = none(x) + torch.nn.functional.linear(added, full.proj.weight)
        torch.testing.assert_close(full(x), expected, atol=1e-5, rtol=1e-4)


def test_all_regions_are_full_attention_and_routing_has_no_gradient() -> None:
    x = torch.randn(1, 6, 6, 16, requires_grad=True)
    layer = BiLevelRoutingAttention(16, 2, 3, 9, side_dwconv=0)
    q, k, v = layer.qkv(x).flatten(1, 2).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=16**-0.5)
    expected = layer.proj(out.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
    products, _ = layer.route(layer.qkv(x)[..., :32], (2, 2))
    assert not products.requires_grad


def test_capture_shows_where_each_block_looks() -> None:
    model = zoo.create_model("biformer_tiny", **TINY).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), capture(model) as maps:
        captured = model(x)
    assert list(maps) == [
        "stages.0.0.attn",
        "stages.1.1.attn",
        "stages.2.1.attn",
        "stages.2.2.attn",
        "stages.3.1.attn",
    ]
    first = maps["stages.0.0.attn"].weights
    assert first.shape == (2, 2, 256, 256)
    torch.testing.assert_close(first.sum(-1), torch.ones(2, 2, 256))
    assert ((first > 0).sum(-1) == 64).all()  # one of four regions
    with torch.no_grad(), backend("reference"):
        torch.testing.assert_close(model(x), captured, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["biformer_tiny", "biformer_stl", "biformer_stl_nchw"])
def test_official_files_tell_classes_channels_and_norms(name: str) -> None:
    model = zoo.create_model(name, **(TINY | {"num_classes": 7, "in_chans": 4})).eval()
    official = zoo.to_official(model)
    options = dict(OFFICIAL)
    if name != "biformer_tiny":
        options["n_wins"] = [options.pop("n_win")] * 4
    again = zoo.from_official(name, official, **options)
    x = torch.randn(1, 4, 64, 96)
    assert torch.equal(again(x), model(x))
    assert ("stages.0.blocks.0.norm1.weight" in official) == (name != "biformer_tiny")
    assert ("stages.0.blocks.0.attn.qkv_linear.weight" in official) == name.endswith("nchw")
    assert ("stages.0.0.mlp.3.weight" in official) == (name == "biformer_tiny")


def test_a_detector_s_file_gives_its_backbone() -> None:
    dense = zoo.create_model("biformer_tiny", features_only=True, out_norms=True, **TINY).eval()
    parts = {f"backbone.{key}": value for key, value in zoo.to_official(dense).items()}
    x = torch.randn(1, 3, 64, 64)
    again = zoo.from_official("biformer_tiny", parts | {"neck.conv.weight": torch.ones(1)}, **OFFICIAL)
    torch.testing.assert_close(again(x), dense(x))


def test_dense_form_in_its_official_layout_and_from_a_classifier() -> None:
    x = torch.randn(1, 3, 72, 104)
    dense = zoo.create_model("biformer_tiny", features_only=True, out_norms=True, **TINY).eval()
    official = zoo.to_official(dense)
    assert {key for key in official if "extra_norms" in key} == {
        f"extra_norms.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")
    }
    assert not any(key.startswith(("head", "norm")) for key in official)
    again = zoo.from_official("biformer_tiny", official, **OFFICIAL)
    torch.testing.assert_close(again(x), dense(x))
    for feature in dense(x):
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-5, rtol=0)
    classifier = zoo.create_model("biformer_tiny", **TINY).eval()
    load_weights(dense, zoo.to_official(classifier))
    maps = classifier.forward_intermediates(x, intermediates_only=True)
    for found, plain in zip(dense(x), maps, strict=True):
        torch.testing.assert_close(
            found,
            torch.nn.functional.layer_norm(plain.movedim(1, -1), plain.shape[1:2], eps=1e-6).movedim(-1, 1),
            atol=1e-5,
            rtol=1e-4,
        )


def test_checkpoint_of_another_variant_names_the_tensor() -> None:
    wide = zoo.create_model("biformer_tiny", **(TINY | {"embed_dims": [24, 24, 32, 32]}))
    with pytest.raises(
        CheckpointError, match=r"downsample_layers\.0\.0\.weight is \[12, 3, 3, 3\], not \[8, 3, 3, 3\]"
    ):
        zoo.from_official("biformer_tiny", zoo.to_official(wide), **OFFICIAL)
    with pytest.raises(CheckpointError, match="no official checkpoint of 'biformer_tiny'"):
        zoo.from_official("biformer_tiny", {"conv1.weight": torch.zeros(3)})
    with pytest.raises(ConfigError, match="soft_routing"):
        zoo.from_official("biformer_tiny", zoo.to_official(wide), **OFFICIAL, soft_routing=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topks": [5, 2, 3, -2]}, "topk=5 regions of 2 x 2"),
        ({"head_dim": 5}, "not divisible by 3 heads"),
        ({"embed_dims": [16, 16, 32, 36]}, "8 heads"),
        ({"depths": [1, 1]}, "one number for each stage"),
        ({"regions": "round"}, "'padded' or 'floor'"),
        ({"channel_norm": True}, "patches=True"),
        ({"global_pool": ""}, "a head needs"),
        ({"in_chans": 0}, "at least 1"),
    ],
)
def test_impossible_options_are_a_message(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        zoo.create_model("biformer_tiny", **(TINY | options))


def test_a_large_image_needs_little_memory() -> None:
    """Copies of the keys and values of 16 regions would take 150 MiB in the third stage alone."""
    model = zoo.create_model("biformer_tiny", depths=[1, 1, 1, 1]).eval()
    x = torch.randn(1, 3, 1024, 1024)
    with torch.no_grad():
        assert peak_memory(lambda: model(x), x.device) < 200 * 2**20


def test_plain_peer_computes_the_same() -> None:
    peer = load_peer("biformer").PlainBiFormer(**(TINY | {"num_classes": 5})).eval()
    model = zoo.create_model("biformer_tiny", **(TINY | {"num_classes": 5})).eval()
    peer.load_state_dict(zoo.to_official(model))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), peer(x), atol=1e-4, rtol=1e-4)
