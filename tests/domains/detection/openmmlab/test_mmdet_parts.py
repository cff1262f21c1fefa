"""Backbones and detectors of the zoo, built by mmdet's registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from zoo.errors import CheckpointError, ConfigError, DataError
from zoo.weights.checkpoint import save_model, save_state_dict

pytestmark = pytest.mark.usefixtures("mmdet")
SMALL = {"num_queries": 6, "groups": 2, "backbone": {"name": "resnet_mini", "norm": "frozen"}}


def _build(**cfg: Any) -> Any:
    from mmdet.registry import MODELS  # pyright: ignore[reportMissingImports]
    from mmengine.config import ConfigDict  # pyright: ignore[reportMissingImports]

    return MODELS.build(ConfigDict(cfg))


def _backbone(name: str, **options: Any) -> Any:
    return _build(type="ZooBackbone", name=name, **options)


# ---- backbones ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("biformer_tiny", (1, 2, 3)),
        ("efficientvit_m0", (0, 1)),
        ("resnet18", (0, 2)),
        ("swin_t", (1, 3)),
        ("timm/convnext_atto", (0, 1, 2, 3)),
        ("timm/resnet18", (2, 4)),
    ],
)
def test_maps_are_as_many_as_asked_for_and_as_the_neck_is_told(name: str, indices: tuple[int, ...]) -> None:
    backbone = _backbone(name, out_indices=indices).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 128, 64))
    assert isinstance(maps, tuple)
    assert len(maps) == len(indices)
    assert tuple(m.shape[1] for m in maps) == backbone.channels
    assert [tuple(m.shape[2:]) for m in maps] == [(128 // s, 64 // s) for s in backbone.strides]


@pytest.mark.parametrize(
    "name", ["biformer_tiny", "resnet18", "swin_t", "timm/convnext_atto", "timm/resnet18"]
)
def test_frozen_stages_do_not_train_and_stay_in_evaluation(name: str) -> None:
    options = {"norm": "batch"} if name == "resnet18" else {}
    backbone = _backbone(name, out_indices=(1, 2, 3), frozen_stages=1, **options).train()
    maps = backbone(torch.randn(2, 3, 64, 64))
    torch.stack([m.mean() for m in maps]).sum().backward()
    without = {key for key, p in backbone.named_parameters() if p.grad is None}
    assert without == {key for key, p in backbone.named_parameters() if not p.requires_grad}
    assert 0 < len(without) < len(list(backbone.parameters()))
    free = _backbone(name, out_indices=(1, 2, 3), frozen_stages=0, **options)
    stem = {key for key, p in free.named_parameters() if not p.requires_grad}
    assert stem < without, "the first stage comes after the stem"
    owners = {key.rpartition(".")[0] for key in without}
    assert not [key for key, module in backbone.named_modules() if key in owners and module.training]
    assert backbone.training


def test_norm_eval_keeps_statistics() -> None:
    for norm_eval in (True, False):
        backbone = _backbone("timm/resnet18", out_indices=(2,), norm_eval=norm_eval).train()
        norm = next(m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d))
        before = norm.running_mean.clone()  # pyright: ignore
        backbone(torch.randn(2, 3, 64, 64))
        assert torch.equal(before, norm.running_mean) == norm_eval  # pyright: ignore


def test_a_backbone_starts_from_files_of_every_kind(tmp_path: Path) -> None:
    whole = zoo.create_model("vision/efficientvit_m0", num_classes=7)
    save_model(whole, tmp_path / "own.safetensors")
    save_state_dict(zoo.to_official(whole), tmp_path / "official.pth", "model")
    x = torch.randn(1, 3, 96, 96)
    features = zoo.create_model("vision/efficientvit_m0", features_only=True).eval()
    features.load_state_dict(
        {key: value for key, value in whole.state_dict().items() if key in features.state_dict()}
    )
    with torch.no_grad():
        wanted = features(x)
    first = _start("efficientvit_m0", tmp_path / "own.safetensors")
    inside = {f"backbone.{key}": value for key, value in first.state_dict().items()}
    save_state_dict(inside | {"neck.weight": torch.ones(1)}, tmp_path / "detector.pth", "state_dict")
    starts = [first, _start("efficientvit_m0", tmp_path / "official.pth")]
    starts.append(_start("efficientvit_m0", tmp_path / "detector.pth", prefix="backbone."))
    for backbone in starts:
        with torch.no_grad():
            for found, expected in zip(backbone(x), wanted, strict=True):
                torch.testing.assert_close(found, expected)


def _start(name: str, file: Path, **more: str) -> Any:
    cfg = {"type": "Pretrained", "checkpoint": str(file), **more}
    backbone = _backbone(name, out_indices=(0, 1, 2), init_cfg=cfg)
    backbone.init_weights()
    return backbone.eval()


def test_a_resnet_starts_from_torchvision(tmp_path: Path) -> None:
    import torchvision

    whole = torchvision.models.resnet18().eval()
    torch.save(whole.state_dict(), tmp_path / "resnet18.pth")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "resnet18.pth")}
    backbone = _backbone("resnet18", out_indices=(3,), init_cfg=cfg)
    backbone.init_weights()
    x = torch.randn(1, 3, 64, 64)
    body = nn.Sequential(*list(whole.children())[:-2])
    with torch.no_grad():
        torch.testing.assert_close(backbone(x)[0], body(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "biformer_tinny"}, "There is no backbone 'biformer_tinny'.*Did you mean"),
        ({"name": "resnet18", "out_indices": (2, 1)}, "ascending stages"),
        ({"name": "resnet18", "out_indices": (3, 4)}, "resnet18 has stages 0 to 3"),
        ({"name": "efficientvit_m0", "out_indices": (0, 7)}, "efficientvit_m0"),
        ({"name": "resnet18", "frozen_stages": 5}, "resnet18 has 4 stages; frozen_stages is 5"),
    ],
)
def test_a_wrong_backbone_is_explained(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _backbone(**cfg)


def test_wrong_weights_are_explained(tmp_path: Path) -> None:
    torch.save({"state_dict": {"head.weight": torch.ones(1)}}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"no tensor below 'backbone\.'; its names are head\.weight"):
        _start("resnet18", tmp_path / "x.pth", prefix="backbone.")
    with pytest.raises(ConfigError, match="type='Pretrained'"):
        _backbone("resnet18", init_cfg={"type": "Kaiming"}).init_weights()


# ---- detectors ---------------------------------------------------------------------------------------------


def _detector(name: str = "group_detr_mini", **options: Any) -> Any:
    return _build(type="ZooDetector", name=name, num_classes=3, **(SMALL | options))


def _sample(
    size: tuple[int, int], boxes: Tensor | None = None, original: tuple[int, int] | None = None
) -> Any:
    from mmdet.structures import DetDataSample  # pyright: ignore[reportMissingImports]
    from mmengine.structures import InstanceData  # pyright: ignore[reportMissingImports]

    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": original or size, "img_path": "a.jpg"})
    boxes = torch.zeros(0, 4) if boxes is None else boxes
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(len(boxes)))
    return sample


BOXES = torch.tensor([[4.0, 6, 40, 50], [30, 10, 60, 60]])


def test_loss_is_the_weighted_sum_of_the_zoo() -> None:
    detector = _detector(dropout=0.0).train()
    x, samples = torch.randn(2, 3, 64, 96), [_sample((64, 96), BOXES), _sample((64, 64))]
    parts = detector.loss(x, samples)
    assert set(parts) == {f"loss_{n}{i}" for n in ("ce", "bbox", "giou") for i in ("", "_0")}
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = True
    outputs = detector.model(x, mask)
    corners = BOXES / torch.tensor([96, 64, 96, 64])
    boxes = torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1)
    empty = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    from domains.detection.models.detector import layers

    targets = [{"labels": torch.arange(2), "boxes": boxes}, empty]
    total, _ = detector.error(layers(outputs), targets, 2)
    torch.testing.assert_close(torch.stack(list(parts.values())).sum(), total)
    total.backward()


@pytest.mark.parametrize("rescale", [True, False])
def test_predictions_are_in_pixels_of_the_image(rescale: bool) -> None:
    detector = _detector(test_cfg={"max_per_img": 7}).eval()
    x = torch.randn(2, 3, 64, 96)
    samples = [_sample((64, 96), original=(128, 192)), _sample((48, 96), original=(96, 192))]
    found = detector.predict(x, samples, rescale=rescale)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:] = True
    with torch.no_grad():
        wanted = detector.model.postprocess(detector.model(x, mask), [(64, 96), (48, 96)], 7)
    for sample, one in zip(found, wanted, strict=True):
        torch.testing.assert_close(sample.pred_instances.bboxes, one["boxes"] * (2 if rescale else 1))
        assert torch.equal(sample.pred_instances.labels, one["labels"])
        assert sample.pred_instances.scores.tolist() == sorted(one["scores"].tolist(), reverse=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [("group_dab_mini", {}), ("group_deformable_mini", {}), ("group_deformable_mini", {"denoising": 4})],
)
def test_relatives_train_and_predict(name: str, options: dict[str, int]) -> None:
    detector = _build(type="ZooDetector", name=name, num_classes=3, **options).train()
    x = torch.randn(1, 3, 128, 128)
    losses = detector.loss(x, [_sample((128, 128), BOXES)])
    assert ("loss_denoising" in losses) == bool(options)
    sum(losses.values()).backward()
    assert len(detector.eval().predict(x, [_sample((128, 128))])[0].pred_instances) > 0


def test_the_three_modes_of_mmdet() -> None:
    detector = _detector().eval()
    logits, boxes = detector(torch.randn(1, 3, 64, 64), mode="tensor")
    assert logits.shape == (1, 6, 3)
    assert boxes.shape == (1, 6, 4)
    assert [m.shape[1] for m in detector.extract_feat(torch.randn(1, 3, 64, 64))] == [128]


def test_a_detector_starts_from_files_of_the_zoo_and_coco_classes_follow(tmp_path: Path) -> None:
    model = zoo.create_model("detection/group_detr_mini", num_classes=91, num_queries=6, groups=2)
    save_model(model, tmp_path / "coco.safetensors")
    cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "coco.safetensors")}
    built = {"type": "ZooDetector", "name": "group_detr_mini", "num_queries": 6, "groups": 2}
    detector = _build(**built, num_classes=80, init_cfg=cfg)
    detector.init_weights()
    head: Any = model.class_embed
    rows = detector.model.class_embed.weight
    torch.testing.assert_close(rows[[0, 10, 11, 79]], head.weight[[1, 11, 13, 90]])
    torch.testing.assert_close(detector.model.query_embed.weight, model.query_embed.weight)  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "group_pose_mini"}, "group_pose_mini predicts no boxes"),
        ({"num_quieries": 3}, "no argument 'num_quieries'.*num_queries"),
    ],
)
def test_a_wrong_detector_is_explained(options: dict[str, Any], message: str) -> None:
    cfg: dict[str, Any] = {"type": "ZooDetector", "name": "group_detr_mini", "num_classes": 2} | options
    with pytest.raises(ConfigError, match=message):
        _build(**cfg)


def test_a_box_without_area_is_named() -> None:
    flat = torch.tensor([[4.0, 6, 40, 50], [8, 9, 8, 20]])
    with pytest.raises(DataError, match=r"a\.jpg: object 1 has the box \[8\.0.*FilterAnnotations"):
        _detector().train().loss(torch.randn(1, 3, 64, 64), [_sample((64, 64), flat)])
