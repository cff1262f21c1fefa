"""SReT: passes that share weights, groups and their shuffling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from domains.vision.models.sret import SReT, fixed_order, in_groups
from domains.vision.vit import SelfAttention
from zoo.attention import capture
from zoo.errors import CheckpointError, ConfigError, DataError

TINY: dict[str, Any] = {
    "embed_dims": [8, 16, 32],
    "depths": [4, 2, 2],
    "num_blocks": [2, 1, 1],
    "num_heads": [2, 4, 8],
    "groups": [4, 2, 1],
    "img_size": 64,
    "num_classes": 5,
}
OFFICIAL = {"heads": [2, 4, 8], "groups1": [4, 2, 1], "groups2": [2, 1, 1]}


def build(**options: Any) -> SReT:
    torch.manual_seed(0)
    model = zoo.create_model("sret_t", **(TINY | options))
    assert isinstance(model, SReT)
    return model.eval()


@pytest.mark.parametrize(("name", "millions"), [("sret_t", 4.8), ("sret_lt", 5.0), ("sret_s", 20.9)])
def test_published_sizes(name: str, millions: float) -> None:
    parameters = zoo.model_card(name).parameters
    assert parameters is not None
    assert round(parameters / 1e6, 1) == millions


def test_official_files_repeat_shared_blocks_and_may_leave_the_copies_out() -> None:
    model, x = build(), torch.randn(1, 3, 64, 64)
    state = zoo.to_official(model)
    copies = {
        key for key in state if key.startswith(("transformers.0.blocks.2.", "transformers.0.blocks.6."))
    }
    assert "transformers.0.blocks.6.attn.qkv.weight" in copies
    first = {key: value for key, value in state.items() if key not in copies}
    for given in (state, first):
        other = zoo.from_official("sret_t", given, **OFFICIAL).eval()
        torch.testing.assert_close(other(x), model(x))
    key = "transformers.0.blocks.2.mlp.fc1.weight"
    with pytest.raises(CheckpointError, match=f"{key} differs from the pass before"):
        zoo.from_official("sret_t", state | {key: state[key] + 1}, **OFFICIAL)


@pytest.mark.parametrize("tokens", [12, 10])
def test_shuffled_groups_are_those_of_shuffled_tokens(tokens: int) -> None:
    attn, x, order = SelfAttention(8, 2), torch.randn(2, tokens, 8), torch.randperm(tokens)
    expected = in_groups(attn, x[:, order], 4)[:, order.argsort()]
    torch.testing.assert_close(in_groups(attn, x, 4, order), expected)


@pytest.mark.parametrize("tokens", [12, 10, 3])
def test_groups_attend_by_themselves_and_the_last_may_be_shorter(tokens: int) -> None:
    attn, x = SelfAttention(8, 2), torch.randn(2, tokens, 8)
    apart = torch.cat([attn(part) for part in x.split(-(-tokens // 4), 1)], 1)
    torch.testing.assert_close(in_groups(attn, x, 4), apart)


def test_no_map_is_larger_than_a_group() -> None:
    model = build()
    with capture(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    widths = [tile.weights.shape[-1] for found in list(maps.values())[:4] for tile in found.tiles]
    assert widths == [16, 32, 16, 32]


def test_order_is_random_in_training_only() -> None:
    x = torch.randn(1, 3, 64, 64)
    for shuffle, varies in (("random", True), ("fixed", False)):
        model = build(shuffle=shuffle)
        assert torch.equal(model(x), model(x))
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        assert torch.allclose(model(x), model(x), atol=1e-7) is not varies


def test_orders_can_be_set() -> None:
    model, x = build(), torch.randn(1, 3, 64, 64)
    before = model(x)
    orders = [torch.randperm(64), torch.randperm(64)]
    model.set_permutations(orders)
    changed = model(x)
    assert not torch.allclose(changed, before, atol=1e-6)
    assert torch.equal(model.train(False)(x), changed)
    with pytest.raises(DataError, match="of 64 tokens was set, the map has 96"):
        model(torch.randn(1, 3, 64, 96))
    with pytest.raises(DataError, match="2 passes shuffle their tokens, but 1 orders"):
        model.set_permutations(orders[:1])
    model.set_permutations(None)
    assert torch.equal(model(x), before)


def test_fixed_orders_are_permutations_and_differ() -> None:
    one, two = (fixed_order(784, seed, torch.device("cpu")) for seed in range(2))
    assert torch.equal(one.sort().values, torch.arange(784))
    assert (one == two).float().mean() < 0.02


def test_wrong_numbers_are_told() -> None:
    for options, message in (
        ({"depths": [3, 2, 2]}, "multiples of num_blocks"),
        ({"num_heads": [2, 4]}, "one number for each stage"),
        ({"groups": [0, 1, 1]}, "at least 1"),
        ({"shuffle": "never"}, "'random' or 'fixed'"),
        ({"embed_dims": [8, 12, 32]}, "a multiple of the one before"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(**options)
    with pytest.raises(ConfigError, match="patch_size=16, stride=8"):
        zoo.from_official("sret_t", zoo.to_official(build()), patch_size=8)
