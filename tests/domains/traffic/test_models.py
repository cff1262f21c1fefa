"""What holds for every traffic model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import ConfigError, DataError

N, P, Q, DAY = 7, 6, 4, 24
SIZES = {"num_nodes": N, "history": P, "horizon": Q, "steps_per_day": DAY}
SMALL = {
    "gman": {"num_heads": 2, "head_dim": 4},
    "gman_metr_la": {"num_heads": 2, "head_dim": 4, "num_layers": 2, "from_last": True, "smooth_time": True},
    "gman_paper": {"num_heads": 2, "head_dim": 4, "num_layers": 1, "spatial_groups": 3},
    "gman_port": {"num_heads": 3, "head_dim": 3},
    "st_llm": {"width": 24, "num_heads": 2, "llm_layers": 2, "trainable_layers": None, "max_positions": 9},
    "st_link": {"width": 24, "num_heads": 2, "num_layers": 2, "hidden": 32, "num_eigenvectors": 3, "topk": 2},
    "stid": {"value_dim": 8, "node_dim": 4, "slot_dim": 4, "day_dim": 0, "add_last": True},
}
ALL = pytest.mark.parametrize("name", SMALL)


def build(name: str, **overrides) -> nn.Module:
    return zoo.create_model(name, **(SIZES | SMALL[name] | overrides))


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def window(batch: int = 3, channels: int | None = None) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, P, N) if channels is None else torch.randn(batch, P, N, channels)
    start = torch.randint(0, 7 * DAY, (batch, 1)) + torch.arange(P + Q)
    return x, torch.stack([start // DAY % 7, start % DAY], -1)


def test_all_models_of_the_domain_are_tested_here() -> None:
    assert zoo.list_models("traffic/*") == sorted(SMALL)


@ALL
def test_forecast_has_a_step_per_horizon_and_sensor(name: str) -> None:
    assert build(name)(*window()).shape == (3, Q, N)
    assert build(name, in_channels=2)(*window(channels=2)).shape == (3, Q, N)


@ALL
def test_every_trainable_parameter_gets_a_gradient(name: str) -> None:
    model = build(name)
    model(*window()).square().sum().backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and p.numel()}
    assert not without


@ALL
def test_a_step_reduces_the_loss_on_its_batch(name: str) -> None:
    model = without_dropout(build(name))
    x, time = window()
    y = torch.randn(3, Q, N)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = (model(x, time) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@ALL
def test_saved_model_is_rebuilt_with_equal_forecast(name: str, tmp_path: Path) -> None:
    model = build(name)
    model(*window())  # moves running statistics
    zoo.save_model(model, tmp_path / "model.safetensors", extra={})
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    x, time = window()
    assert torch.equal(loaded.eval()(x, time), model.eval()(x, time))


@pytest.mark.parametrize("name", ["gman", "gman_paper", "st_llm", "st_link", "stid"])
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    model = without_dropout(build(name))
    x, time = window()
    expected = model(x, time)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, time), expected, atol=1e-4, rtol=1e-4)


@ALL
def test_bfloat16_autocast_is_close(name: str) -> None:
    model = build(name)
    for _ in range(5):
        model(*window())
    model.eval()
    x, time = window()
    exact = model(x, time)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, time)
    assert (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


@ALL
def test_wrong_sizes_are_told(name: str) -> None:
    x, time = window()
    with pytest.raises(DataError, match=f"{P} \\+ {Q} steps of {N} sensors"):
        build(name)(x[:, :, 1:], time)
    with pytest.raises(DataError, match=f"{P} \\+ {Q} steps"):
        build(name)(x, time[:, 1:])


@pytest.mark.parametrize("name", ["gman", "gman_metr_la", "gman_port"])
def test_permuted_sensors_permute_the_forecast_of_gman(name: str) -> None:
    model = build(name).eval()
    x, time = window()
    order = torch.randperm(N)
    expected = model(x, time)[:, :, order]
    model.embedding.spatial_embedding.copy_(model.embedding.spatial_embedding[order])
    torch.testing.assert_close(model(x[:, :, order], time), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_encoder_of_gman_looks_ahead_only_without_mask(causal: bool) -> None:
    model = build("gman", causal=causal).eval()
    codes = []
    model.encoder[0].register_forward_hook(lambda module, args, out: codes.append(out))
    x, time = window()
    model(x, time)
    x[:, -1] += 1
    model(x, time)
    early = slice(0, P - 1)
    assert torch.equal(codes[0][:, early], codes[1][:, early]) == causal


def test_decay_of_gman_running_statistics_follows_its_schedule() -> None:
    model = build("gman")
    momenta = []
    for step in (0, 9, 10, 20, 1000):
        model.set_norm_decay(step, 10)
        momenta.append(round(float(model.input[0].norm.momentum), 6))
    assert momenta == [0.5, 0.5, 0.25, 0.125, 0.01]
    port = build("gman_port")
    port.set_norm_decay(1000, 10)
    assert float(port.input[0].norm.momentum) == pytest.approx(0.1)


def test_group_attention_without_the_groups_among_each_other_is_attention_within_each_group() -> None:
    """A group, as a network of its own, gives the same once what the groups exchange is switched off."""
    attention = build("gman", spatial_groups=3).eval().encoder[0].spatial
    dense = build("gman").eval().encoder[0].spatial
    dense.load_state_dict(attention.state_dict(), strict=False)
    nn.init.zeros_(attention.group_qkv.weight)
    attention.group_qkv.norm.bias.data.fill_(-1.0)  # negative before the ReLU
    h, embedding = torch.randn(2, P, N, 8), build("gman").eval().embedding(window(2)[1][:, :P])
    grouped = attention(h, embedding, None)
    for group in range(3):
        members = (attention.groups == group).nonzero()[:, 0]
        alone = dense(h[:, :, members], embedding._replace(space=embedding.space[members]), None)
        torch.testing.assert_close(grouped[:, :, members], alone, atol=1e-5, rtol=1e-5)


def test_groups_exchange_something_and_are_not_more_than_sensors() -> None:
    attention = build("gman", spatial_groups=3).eval().encoder[0].spatial
    h, embedding = torch.randn(1, P, N, 8), build("gman").eval().embedding(window(1)[1][:, :P])
    changed = h.clone()
    changed[:, :, attention.groups == 0] += 1
    others = attention.groups != 0
    assert not torch.equal(
        attention(h, embedding, None)[:, :, others], attention(changed, embedding, None)[:, :, others]
    )
    with pytest.raises(ConfigError, match="spatial_groups"):
        build("gman", spatial_groups=N + 1)


@pytest.mark.parametrize("option", [{"head_dim": 0}, {"head_dim": -1}, {"dropout": 3.0}])
def test_impossible_sizes_are_a_message(option: dict) -> None:
    with pytest.raises(ConfigError, match=f"'gman' cannot be built with .*{next(iter(option))}="):
        build("gman", **option)


def test_port_refuses_heads_it_is_not_defined_for() -> None:
    with pytest.raises(ConfigError, match="num_heads = head_dim"):
        build("gman_port", num_heads=2, head_dim=4)


def test_frozen_weights_stay_bit_identical() -> None:
    for name, frozen in (("st_llm", "fc_1"), ("st_link", "mlp")):
        model = build(name, trainable_layers=1)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
        model(*window()).square().sum().backward()
        optimizer.step()
        same = {n for n, p in model.named_parameters() if torch.equal(p, before[n])}
        assert {n for n in before if frozen in n.split(".")} <= same
        assert not any("norm" in n or "ln_" in n for n in same)


@pytest.mark.parametrize("channels", [1, 2])
def test_gman_from_last_starts_at_the_last_reading_of_the_first_channel(channels: int) -> None:
    model = build("gman", from_last=True, in_channels=channels)
    x, time = window(channels=channels)
    torch.testing.assert_close(model(x, time), x[:, -1:, :, 0].expand(-1, Q, -1))


def test_smooth_time_makes_neighbouring_slots_alike_and_every_slot_its_own() -> None:
    wide = {"steps_per_day": 288, "num_heads": 4, "head_dim": 8}
    smooth, random = (
        build("gman", smooth_time=flag, **wide).embedding.time[0].weight[:, 7:].detach()
        for flag in (True, False)
    )
    distance = torch.cdist(smooth.T, smooth.T)
    assert distance.diagonal(1).max() < distance.diagonal(3).min() < distance.diagonal(144).min()
    assert (distance + torch.eye(288)).min() > 0.1
    assert distance.diagonal(1).mean() < 0.5 * distance.mean()
    distance = torch.cdist(random.T, random.T)
    assert distance.diagonal(1).mean() > 0.9 * distance.mean()


def test_stid_adds_the_last_reading() -> None:
    model = build("stid")
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    x, time = window()
    torch.testing.assert_close(model(x, time), x[:, -1:].expand(-1, Q, -1))
