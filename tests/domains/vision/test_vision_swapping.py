"""`attention=NAME`: other layers of the zoo in the blocks of backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import zoo
from zoo.attention.layers import LAYERS
from zoo.errors import CheckpointError, ConfigError, UnknownName

BLOCKS: dict[str, tuple[dict, int]] = {
    "biformer_tiny": (
        {"depths": [1, 1, 1, 1], "embed_dims": [16] * 4, "head_dim": 4, "topks": [1, 4, 9, -2], "n_win": 3},
        3,
    ),
    "davit_tiny": ({"depths": [1, 1], "embed_dims": [16, 16], "num_heads": [4, 4]}, 2),
    "litv2_s": ({"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 4]}, 2),
    "agent_pvt_tiny": (
        {
            "depths": [1, 1],
            "embed_dims": [16, 16],
            "num_heads": [4, 4],
            "mlp_ratios": [2, 2],
            "agent_num": [4, 4],
            "agent_sr_ratios": [1, 1],
        },
        2,
    ),
    "inline_pvt_tiny": (
        {"depths": [1, 1], "embed_dims": [16, 16], "num_heads": [4, 4], "mlp_ratios": [2, 2]},
        2,
    ),
}
"""Small models, and how many of their blocks take another layer."""
CHOICES = [
    "multihead",
    "channel_groups",
    "cascaded",
    {"name": "agent", "agents": 9},
    {"name": "bilevel", "regions": 3},
    {"name": "hilo", "window": 3},
    "injective",
    {"name": "moh", "shared_heads": 1, "routed_heads": 2},
    {"name": "neighbourhood", "kernel": 3},
    {"name": "shifted_window", "window": 5, "shift": 2},
]
MODELS = pytest.mark.parametrize("name", BLOCKS)


def build(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return zoo.create_model(
        f"vision/{name}", num_classes=3, img_size=96, **(BLOCKS[name][0] | options)
    ).eval()


def chosen(attention: str | dict) -> str:
    return attention if isinstance(attention, str) else attention["name"]


@pytest.mark.parametrize("attention", CHOICES, ids=chosen)
@MODELS
def test_any_bidirectional_layer_stands_in_the_blocks(name: str, attention: str | dict) -> None:
    model = build(name, attention=attention)
    kind = LAYERS[chosen(attention)]
    assert sum(type(module) is kind for module in model.modules()) >= BLOCKS[name][1]
    for size in ((96, 96), (125, 150)):
        x = torch.randn(2, 3, *size)
        out = model(x)
        assert out.shape == (2, 3)
        assert out.isfinite().all()
        torch.testing.assert_close(model(x[:1]), out[:1], atol=1e-5, rtol=1e-4)


@MODELS
def test_a_layer_is_told_the_grid_of_each_map(name: str) -> None:
    model = build(name, attention={"name": "neighbourhood", "kernel": 3})
    model(torch.randn(1, 3, 96, 192))
    grids = [module.shape for module in model.modules() if type(module) is LAYERS["neighbourhood"]]
    assert grids[0] in [(24, 48), (12, 24), (6, 12)]
    assert all(2 * rows == columns for rows, columns in grids)


@MODELS
def test_model_with_another_layer_is_saved_and_rebuilt(name: str, tmp_path: Path) -> None:
    model, x = build(name, attention={"name": "hilo", "window": 3}), torch.randn(1, 3, 96, 64)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match=r"No official program of .* has attention=.*hilo"):
        zoo.to_official(model)


@MODELS
def test_what_cannot_stand_there_is_told(name: str) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'hilo'"):
        build(name, attention="hillo")
    with pytest.raises(ConfigError, match="is not bidirectional"):
        build(name, attention="retention")
    with pytest.raises(ConfigError, match="has no argument 'regions'"):
        build(name, attention={"name": "hilo", "regions": 3})


@pytest.mark.parametrize("attention", ["injective", {"name": "agent", "agents": 9}], ids=chosen)
def test_swapped_model_compiles_without_graph_breaks(attention: str | dict) -> None:
    torch._dynamo.reset()
    model, x = build("davit_tiny", attention=attention), torch.randn(1, 3, 96, 64)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
