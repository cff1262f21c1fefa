"""Official checkpoints of Conditional and Group DETR: round trips, other groups and classes, detection."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from detr_small import lively
from torch import Tensor

import zoo
from domains.detection.models.group_detr import GroupDETR
from domains.detection.weights.detect import detect
from zoo.errors import CheckpointError
from zoo.weights.exchange import detect_model, load_weights

SMALL = {"embed_dim": 32, "enc_layers": 1, "dec_layers": 2, "ffn_dim": 16, "backbone": "resnet18"}


def _model(**options: Any) -> GroupDETR:
    given = {"num_classes": 5, "num_queries": 4, "groups": 3, "num_heads": 8, **SMALL}
    model = lively(zoo.create_model("detection/group_detr_r50", **(given | options))).eval()
    assert isinstance(model, GroupDETR)
    return model


def _same(a: GroupDETR, b: GroupDETR) -> None:
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(a(x)["boxes"], b(x)["boxes"])


@pytest.mark.parametrize("position", ["sine", "learned"])
def test_official_layout_round_trips(position: str) -> None:
    model = _model(position=position)
    official = zoo.to_official(model)
    again = zoo.from_official("group_detr_r50", official, group_detr=3)
    assert {name: tuple(v.shape) for name, v in zoo.to_official(again).items()} == {
        name: tuple(v.shape) for name, v in official.items()
    }
    _same(model, again)  # pyright: ignore[reportArgumentType]


def test_official_names() -> None:
    names = set(zoo.to_official(_model()))
    layer = "transformer.decoder.layers"
    assert {f"{layer}.0.ca_qpos_proj.weight", f"{layer}.1.sa_kcontent_proj.bias"} < names
    assert f"{layer}.1.ca_qpos_proj.weight" not in names
    assert {"transformer.encoder.layers.0.self_attn.in_proj_bias", "backbone.0.body.bn1.running_var"} < names
    roots = {name.split(".")[0] for name in names}
    assert roots == {"transformer", "class_embed", "bbox_embed", "query_embed", "input_proj", "backbone"}


def test_one_group_of_many_is_the_first() -> None:
    many, one = _model(), _model(groups=1)
    load_weights(one, zoo.to_official(many))
    _same(many, one)


def test_further_groups_start_anew_which_is_said() -> None:
    many, one = _model(), _model(groups=1)
    drawn = many.query_embed.weight[4:].detach().clone()
    with pytest.warns(UserWarning, match="has 1 group of queries, the model 3: the others start anew"):
        load_weights(many, zoo.to_official(one))
    assert torch.equal(many.query_embed.weight[:4], one.query_embed.weight)
    assert torch.equal(many.query_embed.weight[4:], drawn)
    _same(many, one)


def test_other_classes_start_anew_which_is_said() -> None:
    old, new = _model(num_classes=9), _model()
    head = new.class_embed.weight.detach().clone()
    with pytest.warns(UserWarning, match="tells 9 classes apart, the model 5: class_embed starts anew"):
        load_weights(new, zoo.to_official(old))
    assert torch.equal(new.class_embed.weight, head)
    _same(old, new)


def test_another_number_of_queries_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has 12 queries, which are no groups of the model's 5"):
        load_weights(_model(num_queries=5), zoo.to_official(_model()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_detr": 5}, "12 queries, not 5 groups of 2"),
        ({"num_classes": 91}, "num_classes=5, not 91"),
        ({"backbone": "resnet50"}, "backbone=resnet18, not resnet50"),
        ({"pre_norm": True}, "pre_norm=False"),
        ({"position_embedding": "learned"}, "position=sine, not learned"),
    ],
)
def test_options_that_are_not_those_of_the_file(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        zoo.from_official("group_detr_r50", zoo.to_official(_model()), **options)


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Tensors without values, of the size of Group DETR with ResNet-50."""
    with torch.device("meta"):
        return zoo.to_official(zoo.create_model("detection/group_detr_r50"))


def test_detects_published_models(published: dict[str, Tensor]) -> None:
    assert detect(published) == "group_detr_r50"
    assert detect(published | {"query_embed.weight": torch.empty(300, 256)}) == "conditional_detr_r50"
    assert detect(published | {"class_embed.weight": torch.empty(3, 256)}) == "group_detr_r50"
    assert detect(published | {"query_embed.weight": torch.empty(7, 256)}) is None
    assert detect({"backbone.0.body.conv1.weight": torch.empty(1)}) is None
    assert detect_model(published) == "group_detr_r50"
