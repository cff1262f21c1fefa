"""`attention=NAME`: other layers of the zoo in the encoder of detectors on one map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detr_small import FROZEN, images, small_detr, targets

import zoo
from domains.detection.losses import box_terms
from domains.detection.matching import SetLoss
from domains.detection.models.common import ImageBatch, resized_mask
from domains.detection.models.detector import layers
from zoo.attention import Padding
from zoo.attention.layers import LAYERS
from zoo.config import compose
from zoo.errors import CheckpointError, ConfigError, UnknownName

CHOICES: list[str | dict[str, Any]] = [
    "gated",
    "linear",
    "sinks",
    "kronecker",
    {"name": "hilo", "window": 2},
    {"name": "mla", "kv_rank": 8},
    {"name": "moh", "shared_heads": 1, "routed_heads": 2},
    {"name": "local", "window": 5},
]


def chosen(attention: str | dict[str, Any]) -> str:
    return attention if isinstance(attention, str) else attention["name"]


CHOSEN = pytest.mark.parametrize("attention", CHOICES, ids=chosen)


@CHOSEN
def test_a_step_of_training_on_images_of_several_sizes(attention: str | dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, batch = small_detr(attention=attention).train(), ImageBatch.pad(images((64, 96), (48, 80)))
    wanted, kind = targets(3, 2), LAYERS[chosen(attention)]
    assert sum(type(module) is kind for module in model.modules()) == 1
    optimizer, loss, values = torch.optim.AdamW(model.parameters(), 1e-3), SetLoss(box_terms()), []
    for _ in range(4):
        total, _ = loss(layers(model(batch.images, batch.mask)), wanted, 3)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(float(total.detach()))
    inside = {n: p.grad for n, p in model.named_parameters() if "attention.layer" in n}
    assert inside
    assert [n for n, grad in inside.items() if grad is None] == []
    assert values[-1] < values[0]


@CHOSEN
def test_what_stands_in_padded_cells_changes_nothing(attention: str | dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, batch = small_detr(attention=attention), ImageBatch.pad(images((64, 96), (48, 80)))
    assert batch.mask is not None
    (features,) = model.backbone(batch.images)
    padded = resized_mask(batch.mask, features.shape[-2:])
    assert padded.any()
    other = torch.where(padded[:, None], 100 * torch.randn_like(features), features)
    for name in ("logits", "boxes"):
        before, after = (model.detect(x, batch.mask)[name] for x in (features, other))
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_a_layer_is_told_the_map() -> None:
    model: Any = small_detr(attention={"name": "hilo", "window": 2})
    model(torch.randn(1, 3, 64, 160))
    assert model.encoder[0].attention.layer.shape == (4, 10)


def test_positions_reach_the_layer() -> None:
    """A layer that knows no order by itself tells the cells of a map apart."""
    model, x = small_detr(attention="multihead"), torch.randn(1, 3, 64, 64)
    (features,) = model.backbone(x)
    turned = features.flip(-1)
    assert not torch.allclose(model.detect(features)["boxes"], model.detect(turned)["boxes"], atol=1e-3)


def test_the_other_detector_on_one_map_takes_it_too() -> None:
    model = zoo.create_model(
        "group_dab_mini", embed_dim=32, backbone_options=FROZEN, attention="gated"
    ).eval()
    assert model(torch.randn(2, 3, 64, 48))["boxes"].isfinite().all()


def test_a_swapped_model_is_saved_and_rebuilt(tmp_path: Path) -> None:
    model, x = small_detr(attention={"name": "gated", "gate": "headwise"}), torch.randn(1, 3, 64, 64)
    zoo.save_model(model, tmp_path / "model.safetensors")
    loaded, _ = zoo.load_model(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded.eval()(x)["boxes"], model(x)["boxes"])
    with pytest.raises(CheckpointError, match="attention="):
        zoo.to_official(model)


def test_a_swapped_encoder_layer_compiles_in_one_graph() -> None:
    torch._dynamo.reset()
    layer: Any = small_detr(attention="gated").encoder[0]
    inputs = torch.randn(2, 12, 32), torch.randn(1, 12, 32), Padding(torch.rand(2, 12) < 0.8), (3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("gatde", "Did you mean 'gated'"),
        ("gla", "'gla' is not bidirectional"),
        ({"name": "agent", "agents": 4}, "no padding among what it supports, but a batch.*gated"),
        ({"name": "gated", "gates": 1}, "has no argument 'gates'"),
    ],
)
def test_what_cannot_stand_there_is_told(attention: str | dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownName), match=message):
        small_detr(attention=attention)


def test_the_config_takes_a_name_or_keys() -> None:
    config = compose("train", ["domain=detection", "model.attention.name=mla", "model.attention.kv_rank=8"])
    assert config.model.attention == {"name": "mla", "kv_rank": 8}
