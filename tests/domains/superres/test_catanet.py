"""CATANet: its parts by plain loops, token centres, sizes, official layout, messages, memory, the peer."""

from __future__ import annotations

import copy
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch import multiprocessing as mp
from torch.optim.swa_utils import AveragedModel

import zoo
from domains.superres.models.catanet import CATANet, enlarged
from domains.superres.models.catanet_patches import LocalAttention, Patches, axis
from domains.superres.models.catanet_tokens import TokenAggregation, mirrored, refined
from domains.superres.weights.catanet import CATANetOfficial, scale_of
from zoo.attention import backend, capture
from zoo.bench.memory import peak_memory
from zoo.bench.peer import load_peer
from zoo.errors import CheckpointError, ConfigError, UnknownName
from zoo.training.ema import EMA
from zoo.weights.checkpoint import read_state_dict
from zoo.weights.exchange import load_weights

SMALL: dict[str, Any] = {
    "dim": 12,
    "qk_dim": 8,
    "mlp_dim": 20,
    "num_heads": 2,
    "patch_sizes": [6, 9],
    "num_tokens": [5, 7],
    "group_sizes": [24, 16],
    "n_iters": [3, 2],
}
OFFICIAL = {
    "setting": {"heads": 2, "patch_size": [6, 9]},
    "group_size": [24, 16],
    "n_iters": [3, 2],
}


def small(scale: int = 2, **options: Any) -> Any:
    """With weights large enough that every part shows, and token centres as if trained."""
    model = zoo.create_model("catanet_mini", scale=scale, **(SMALL | options)).eval()
    assert isinstance(model, CATANet)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 / parameter[0].numel() ** 0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("initted"):
            buffer.fill_(True)
    return model


def plain(model: CATANet) -> Any:
    return load_peer("catanet").plain_peer(zoo.to_official(model), model.scale, **SMALL)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


# ---- the published models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "count", "entries"), [(1, 419675, 284), (2, 477435, 286), (3, 549635, 286), (4, 535195, 288)]
)
def test_published_sizes(scale: int, count: int, entries: int) -> None:
    model = zoo.create_model(f"catanet_x{scale}")
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(zoo.to_official(model)) == entries
    assert (model.scale, model.min_size) == (scale, 28)


def test_initialisation() -> None:
    model = zoo.create_model("catanet_x2")
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = {id(m): float(m.weight.detach().std()) for m in linears}
    merges = {id(m) for name, m in model.named_modules() if name.endswith("tokens.merge")}
    assert all(0.015 < weights[key] < 0.025 for key in weights.keys() - merges)
    assert all(0.08 < weights[key] < 0.10 for key in merges)  # uniform to 1 / sqrt(40)
    assert all(not m.bias.any() for m in linears if m.bias is not None)


# ---- the peer, sizes and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_equals_the_plain_layout_at_every_scale(scale: int) -> None:
    model = small(scale)
    x = torch.rand(2, 3, 14, 11)
    with torch.no_grad():
        close(model(x), plain(model)(x))


@pytest.mark.parametrize("size", [(9, 9), (16, 9), (17, 24), (30, 23)])
def test_equals_the_plain_layout_at_odd_sizes(size: tuple[int, int]) -> None:
    model = small()
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        out = model(x)
        close(out, plain(model)(x))
        with backend("reference"):
            close(model(x), out)


def test_images_of_a_batch_do_not_depend_on_each_other() -> None:
    model = small()
    x = torch.rand(2, 3, 13, 12)
    with torch.no_grad():
        close(model(x), torch.cat([model(x[:1]), model(x[1:])]))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 20), (4, 3), (8, 30), (5, 9)])
def test_short_sides_are_continued_and_cut(height: int, width: int) -> None:
    model = small(3)
    x = torch.rand(1, 3, height, width)
    with torch.no_grad():
        out = model(x)
        whole = model(enlarged(x, 9))
    assert out.shape == (1, 3, 3 * height, 3 * width)
    close(out, whole[..., : 3 * height, : 3 * width])
    assert not out.std() < 1e-4


def test_short_sides_are_reflected_where_they_can() -> None:
    x = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 4, 5)
    assert enlarged(x, 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert enlarged(x[..., :4], 8)[0, 0, 0].tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert enlarged(x, 8).shape == (1, 1, 8, 8)
    assert enlarged(x, 4) is x


# ---- patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(31, 40, 16), (28, 28, 28), (45, 33, 20), (7, 9, 4)])
def test_patches_are_put_back_as_the_official_program_does(height: int, width: int, size: int) -> None:
    x = torch.randn(2, height, width, 3)
    expected = torch.zeros_like(x)
    rows, columns = axis(height, size).starts, axis(width, size).starts
    for i in rows:
        for j in columns:
            expected[:, i : i + size, j : j + size] += x[:, i : i + size, j : j + size]
    for before, i in pairwise(rows):
        expected[:, i : before + size] /= 2
    for before, j in pairwise(columns):
        expected[:, :, j : before + size] /= 2
    patches = Patches(height, width, size, x.device)
    torch.testing.assert_close(patches.apply(x, lambda p: p), expected)
    torch.testing.assert_close(patches.coverage(x), expected)
    thrice = any((side - size) % (size - 2) == 1 and side > 2 * size - 2 for side in (height, width))
    assert torch.allclose(expected, x) != thrice


def test_local_attention_is_that_of_each_patch() -> None:
    layer = LocalAttention(12, 8, 20, 2, 6).eval()
    nn.init.normal_(layer.qkv.weight)
    x = torch.randn(1, 10, 6, 12)
    out = torch.zeros_like(x)
    for i in (0, 4):
        patch = x[0, i : i + 6].reshape(-1, 12)
        q, k, v = layer.qkv(layer.norm(patch)).split([8, 8, 12], -1)
        heads = [
            (a @ b.T / 2).softmax(-1) @ c
            for a, b, c in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True)
        ]
        out[0, i : i + 6] += (patch + layer.proj(torch.cat(heads, -1))).view(6, 6, 12)
    out[:, 4:6] /= 2
    close(layer(x), out + layer.mlp(out))


# ---- tokens ------------------------------------------------------------------------------------------------


def token_layer(**options: Any) -> TokenAggregation:
    sizes = {"num_tokens": 5, "group_size": 8, "n_iter": 2} | options
    layer = TokenAggregation(12, 8, 20, 2, **sizes)
    nn.init.normal_(layer.qkv.weight)
    return layer


@pytest.mark.parametrize("size", [(4, 8), (5, 7), (3, 3), (2, 3)])
def test_token_aggregation_by_a_loop(size: tuple[int, int]) -> None:
    """Tokens that fill their groups, that do not, fewer than 1.5 groups (mirrored twice), and one group."""
    layer = token_layer().eval()
    layer.initted.fill_(True)
    x = torch.randn(1, *size, 12)
    tokens = layer.norm(x.flatten(1, 2))[0]
    nearest = F.cosine_similarity(tokens[:, None], layer.means[None], dim=-1).argmax(-1)
    order = sorted(range(len(tokens)), key=lambda n: (int(nearest[n]), n))
    group = min(8, len(order))
    line = (order + order[::-1]) * 3
    mixed = torch.zeros_like(tokens)
    q, k, v = layer.qkv(tokens).split([8, 8, 12], -1)
    centre_k, centre_v = layer.centre_kv(layer.means).split([8, 12], -1)
    for place, token in enumerate(order):
        first = place // group * group
        seen = line[first : first + 2 * group]
        for h in range(2):
            narrow, wide = slice(4 * h, 4 * h + 4), slice(6 * h, 6 * h + 6)
            near = (k[seen, narrow] @ q[token, narrow] / 2).softmax(0) @ v[seen, wide]
            far = (centre_k[:, narrow] @ q[token, narrow] / 2).softmax(0) @ centre_v[:, wide]
            mixed[token, wide] = near + far
    expected = x + layer.merge(layer.proj(mixed)).view(x.shape)
    close(layer(x), expected + layer.mlp(expected))
    assert torch.equal(layer.groups(x).flatten(), nearest)


def test_mirrored() -> None:
    assert mirrored(3, 10, torch.device("cpu")).tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2, 2]


def test_a_centre_without_tokens_keeps_its_direction() -> None:
    rows = F.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.3]]), dim=-1)
    found = refined(rows, torch.tensor([[2.0, 0.0], [-3.0, -4.0]]))
    torch.testing.assert_close(found[0], F.normalize(rows.sum(0), dim=-1))
    torch.testing.assert_close(found[1], torch.tensor([-0.6, -0.8]))


def test_centres_follow_in_training_only() -> None:
    layer = token_layer()
    x = torch.randn(2, 4, 5, 12)
    start = layer.means.clone()
    layer.eval()(x)
    assert torch.equal(layer.means, start)
    assert not layer.initted
    layer.train()(x)
    first = layer.means.clone()
    assert layer.initted
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(5))
    rows = F.normalize(layer.norm(x.flatten(1, 2)), dim=-1).flatten(0, 1)
    layer(x)
    after = refined(rows, refined(rows, first))
    torch.testing.assert_close(layer.means, 0.999 * first + 0.001 * after)
    layer.eval()(x)
    torch.testing.assert_close(layer.means, 0.999 * first + 0.001 * after)


def test_training_equals_the_plain_layout_forward_and_backward() -> None:
    model = small().train()
    peer = plain(model).train()
    x, target = torch.rand(2, 3, 14, 13), torch.rand(2, 3, 28, 26)
    for network in (model, peer):
        F.l1_loss(network(x), target).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    ours = zoo.to_official(model, gradients)
    for name, parameter in peer.named_parameters():
        assert ours[name].abs().max() > 0, name
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-3)
    for block, other in zip(model.blocks, peer.blocks, strict=True):
        torch.testing.assert_close(block.tokens.means, other[0].means)


def _share(rank: int, port: int, layer: TokenAggregation, x: Tensor, folder: Path) -> None:
    torch.set_num_threads(1)
    layer = copy.deepcopy(layer)  # the memory of what is sent is shared
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for _ in range(2):
        layer.zero_grad()
        layer(x[rank : rank + 1]).square().sum().backward()
    gradient = layer.norm.weight.grad
    assert gradient is not None
    dist.all_reduce(gradient)
    torch.save((layer.means, gradient), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_centres_are_those_of_all_processes(unused_tcp_port: int, tmp_path: Path) -> None:
    layer = token_layer(num_tokens=7).double()  # 20 tokens in 7 runs: no two of the same tokens
    x = torch.randn(2, 4, 5, 12, dtype=torch.float64)
    mp.spawn(_share, (unused_tcp_port, copy.deepcopy(layer), x, tmp_path), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for _ in range(2):
        layer.zero_grad()
        layer(x).square().sum().backward()
    for rank in range(2):
        means, gradient = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(means, layer.means)
        torch.testing.assert_close(gradient, layer.norm.weight.grad)


@pytest.fixture
def unused_tcp_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_ready_and_token_groups() -> None:
    model: Any = zoo.create_model("catanet_mini", **SMALL)
    assert not model.ready
    model(torch.rand(1, 3, 12, 10))
    assert model.ready
    groups = model.eval().token_groups(torch.rand(2, 3, 4, 13))
    assert [tuple(group.shape) for group in groups] == [(2, 4, 13)] * 2
    assert all(int(group.max()) < count for group, count in zip(groups, SMALL["num_tokens"], strict=True))


def test_averaged_weights_come_with_the_trained_centres() -> None:
    model: Any = zoo.create_model("catanet_mini", **SMALL)
    averaged: Any = AveragedModel(model, use_buffers=False, multi_avg_fn=EMA()._average)
    model(torch.rand(1, 3, 12, 10))
    averaged.update_parameters(model)
    assert averaged.module.ready
    torch.testing.assert_close(averaged.module.blocks[1].tokens.means, model.blocks[1].tokens.means)


# ---- how it runs -------------------------------------------------------------------------------------------


def test_capture_and_compile() -> None:
    model = small()
    x = torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        expected = model(x)
        close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        with capture(model) as maps:
            close(model(x), expected)
    names = [f"blocks.{i}.{part}" for i in range(2) for part in ("tokens", "tokens#2", "local")]
    assert list(maps) == names
    assert maps["blocks.0.tokens"].sizes == (5, 2, 24, 48)
    assert maps["blocks.0.tokens#2"].sizes == (1, 2, 120, 5)
    assert maps["blocks.1.local"].sizes == (4, 2, 81, 81)


def test_bfloat16() -> None:
    model = small()
    x = torch.rand(1, 3, 12, 10)
    with torch.no_grad():
        groups = model.token_groups(x)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(x)
            half = model.token_groups(x)
    assert out.isfinite().all()
    assert (groups[0] == half[0]).float().mean() > 0.95
    assert (out - model(x)).abs().mean() < 0.1


def test_needs_little_memory() -> None:
    one: dict[str, Any] = {"patch_sizes": [28], "num_tokens": [16], "group_sizes": [64], "n_iters": [1]}
    model = zoo.create_model("catanet_x2", **one).eval()
    peer = load_peer("catanet").plain_peer(zoo.to_official(model), 2, **one)
    x = torch.rand(1, 3, 56, 56)
    with torch.inference_mode():
        ours, theirs = (peak_memory(lambda m=m: m(x), torch.device("cpu")) for m in (model, peer))
    assert ours < theirs / 2


@pytest.mark.parametrize("attention", ["gated", {"name": "mla", "kv_rank": 6}])
def test_another_local_attention(attention: Any) -> None:
    model = zoo.create_model("catanet_mini", **SMALL, attention=attention)
    x = torch.rand(1, 3, 12, 10)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(CheckpointError, match="attention="):
        zoo.to_official(model)


# ---- official files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_official_round_trip(scale: int) -> None:
    model = small(scale)
    official = zoo.to_official(model)
    assert CATANetOfficial.matches(official)
    assert scale_of(official) == scale
    again = zoo.from_official("catanet_mini", official, **OFFICIAL)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    x = torch.rand(1, 3, 12, 10)
    assert torch.equal(again(x), model(x))


def test_files_of_basicsr(tmp_path: Path) -> None:
    model = small(4)
    official = zoo.to_official(model)
    zeros = {f"module.{name}": torch.zeros_like(value) for name, value in official.items()}
    averaged = {f"module.{name}": value for name, value in official.items()}
    torch.save({"params": zeros, "params_ema": averaged}, tmp_path / "both.pth")
    torch.save({"params": averaged}, tmp_path / "one.pth")
    for file in ("both.pth", "one.pth"):
        again: Any = zoo.from_official("catanet_mini", tmp_path / file, **OFFICIAL)
        torch.testing.assert_close(again.last_conv.weight, model.last_conv.weight)
        assert CATANetOfficial.matches(read_state_dict(tmp_path / file))


def test_a_file_of_another_scale_is_named() -> None:
    official = zoo.to_official(zoo.create_model("catanet_x2"))
    with pytest.raises(ConfigError, match=r"catanet_x4 enlarges 4 times\. For 2 times, use catanet_x2"):
        zoo.from_official("catanet_x4", official)
    with pytest.raises(CheckpointError, match="enlarges 2 times, not upscale=3"):
        zoo.from_official("catanet_x2", official, upscale=3)
    with pytest.raises(CheckpointError, match="enlarges 2 times, the model 4 times"):
        load_weights(zoo.create_model("catanet_x4"), official)
    with pytest.raises(CheckpointError, match="no official checkpoint of 'catanet_x2'"):
        zoo.from_official("catanet_x2", {"conv_first.weight": torch.zeros(3)})


def test_low_rank_updates_are_seen() -> None:
    class Updated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[..., :1]

    layer = LocalAttention(12, 8, 20, 2, 6)
    x = torch.randn(1, 6, 6, 12)
    before = layer(x)
    updated = Updated(12, 28, bias=False)
    updated.load_state_dict(layer.qkv.state_dict())
    layer.qkv = updated
    assert (layer(x) - before).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 5}, "CATANet has a scale of 1, 2, 3, 4, not 5"),
        ({"num_heads": 5}, "dim=24 and qk_dim=24 are not divisible by num_heads=5"),
        ({"patch_sizes": [8, 8, 8]}, "3 patch_sizes, 2 num_tokens"),
        ({"patch_sizes": [8, 3]}, "patch_sizes are numbers of at least 4"),
        ({"num_tokens": [4, 0]}, "num_tokens are numbers of at least 1"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        zoo.create_model("catanet_mini", **options)
    with pytest.raises(ConfigError, match="use catanet_x3"):
        zoo.create_model("catanet_x2", scale=3)
    with pytest.raises(UnknownName):
        zoo.create_model("catanet_mini", attention="nonsense")
