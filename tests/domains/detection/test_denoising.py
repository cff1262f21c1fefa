"""DINO on groups: denoising, look forward twice, scores that know the overlap."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detr_small import FROZEN, images, lively
from torch import Tensor

import zoo
from domains.detection.boxes import centred_iou, to_corners
from domains.detection.keypoints import Skeleton
from domains.detection.losses import Focal, IoUAware, box_terms
from domains.detection.matching import SetLoss, own_objects
from domains.detection.models.common import ImageBatch
from domains.detection.models.denoising import noised_objects
from domains.detection.models.detector import layers
from domains.detection.task import build_loss
from zoo.errors import ConfigError, DataError

TARGETS = [
    {
        "labels": torch.tensor([3, 0, 4]),
        "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.4, 0.2], [0.7, 0.2, 0.1, 0.1]]),
    },
    {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.4, 0.4, 0.3, 0.3]])},
]


def _small(**options: Any) -> Any:
    given = {"num_classes": 5, "num_queries": 4, "groups": 2, "embed_dim": 32, "backbone_options": FROZEN}
    given |= {"denoising": 6, "look_forward_twice": True}
    return lively(zoo.create_model("detection/group_deformable_mini", **(given | options)))


def _batch() -> ImageBatch:
    return ImageBatch.pad(images((64, 48), (48, 96)))


def test_objects_are_noised_little_and_more() -> None:
    torch.manual_seed(0)
    targets = [{"labels": torch.full((50,), 2), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]]).expand(50, 4)}]
    noised = noised_objects(targets, 10, 1000)
    assert (noised.groups, noised.labels.shape) == (20, (1, 2000))
    little, more = to_corners(noised.boxes).view(20, 2, 50, 4).unbind(1)
    corners = torch.tensor([0.4, 0.4, 0.6, 0.6])
    assert 0.09 < float((little - corners).abs().max()) <= 0.1
    assert 0.045 < float((little - corners).abs().mean()) < 0.055
    assert 0.19 < float((more - corners).abs().max()) <= 0.2
    assert (noised.boxes[..., 2:] >= 0).all()
    kept = float((noised.labels == 2).float().mean())
    assert abs(kept - (0.75 + 0.25 / 10)) < 0.03


def test_what_fills_up_is_not_real_and_each_query_has_its_own_object() -> None:
    noised = noised_objects(TARGETS, 5, 6)
    assert noised.groups == 2
    assert noised.real.view(2, 2, 2, 3).sum(-1).tolist() == [[[3, 3], [3, 3]], [[1, 1], [1, 1]]]
    matches = own_objects(noised, 2)
    assert matches.image.tolist() == [0] * 6 + [1] * 2
    assert matches.query[1].tolist() == [0, 1, 2, 6, 7, 8, 0, 6]
    assert matches.target[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_without_objects_there_is_nothing_to_find_and_no_loss() -> None:
    empty = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    model, batch = _small().train(), _batch()
    outputs = model(batch.images, batch.mask, targets=[empty, empty])
    assert not outputs["denoised"]["noised"].real.any()
    assert SetLoss(box_terms()).denoising(outputs["denoised"], [empty, empty]).item() < 1e-6


def test_matched_queries_do_not_see_the_noised_objects() -> None:
    model, batch = _small().train(), _batch()
    torch.manual_seed(0)
    first = model(batch.images, batch.mask, targets=TARGETS)
    torch.manual_seed(1)
    other = model(batch.images, batch.mask, targets=TARGETS)
    plain = _small(denoising=0).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "label_embed.weight"})
    for a, b, c in zip(layers(first), layers(other), layers(plain(batch.images, batch.mask)), strict=True):
        for name, value in a.items():
            torch.testing.assert_close(value, b[name])
            torch.testing.assert_close(value, c[name], rtol=1e-4, atol=1e-5)
    noised = [outputs["denoised"]["outputs"][-1]["boxes"] for outputs in (first, other)]
    assert not torch.allclose(*noised)


def test_groups_of_noised_objects_do_not_see_each_other() -> None:
    """What the first group finds has gradients of its own classes only."""
    model, batch = _small(num_classes=40).train(), _batch()
    torch.manual_seed(0)
    outputs = model(batch.images, batch.mask, targets=TARGETS)["denoised"]
    noised, logits = outputs["noised"], outputs["outputs"][-1]["logits"]
    real = noised.real[:, :6]
    grad = torch.autograd.grad(logits[:, :6][real].sum(), model.label_embed.weight)[0]
    seen = set(noised.labels[:, :6][real].tolist())
    assert set(noised.labels[noised.real].tolist()) - seen
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == seen


def test_the_loss_is_that_of_objects_known_beforehand() -> None:
    """Per image and layer by hand: focal loss of all real queries, distances of the first halves."""
    model, batch, loss = _small().train(), _batch(), SetLoss(box_terms())
    outputs = model(batch.images, batch.mask, targets=TARGETS)["denoised"]
    noised, expected = outputs["noised"], 0.0
    for layer in outputs["outputs"]:
        for i, target in enumerate(TARGETS):
            for q in range(noised.labels.shape[1]):
                group_member = q % 6
                if not noised.real[i, q]:
                    continue
                classes = torch.zeros(5)
                if group_member < 3:
                    classes[target["labels"][group_member]] = 1
                    pair = (
                        {"boxes": layer["boxes"][i, q]},
                        {"boxes": target["boxes"][group_member]},
                    )
                    expected += sum(term.weight * term.distance(*pair).item() for term in loss.terms)
                expected += 2 * Focal().loss(layer["logits"][i, q], classes).sum().item()
    total = loss.denoising(outputs, TARGETS)
    assert math.isclose(total.item(), expected / (4 * noised.groups), rel_tol=1e-4)


def test_the_box_of_a_layer_trains_the_layer_before() -> None:
    """The last boxes give the first layer another gradient when its step reaches them, too."""

    def gradient(twice: bool) -> Tensor:
        torch.manual_seed(0)
        model = _small(look_forward_twice=twice, denoising=0).train()
        batch = _batch()
        boxes = model(batch.images, batch.mask)["boxes"]
        return torch.autograd.grad(boxes.sum(), model.decoder[0].ffn.fc2.weight)[0]

    once, twice = gradient(False), gradient(True)
    assert not torch.allclose(once, twice, rtol=1e-2)


def test_look_forward_twice_changes_no_value() -> None:
    model, batch = _small(denoising=0).eval(), _batch()
    once = _small(denoising=0, look_forward_twice=False).eval()
    once.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        model(batch.images, batch.mask)["boxes"], once(batch.images, batch.mask)["boxes"]
    )


def test_evaluation_takes_no_targets_and_training_needs_them() -> None:
    model, batch = _small().train(), _batch()
    with pytest.raises(DataError, match="targets"):
        model(batch.images, batch.mask)
    assert "denoised" not in model.eval()(batch.images, batch.mask)
    with pytest.raises(ConfigError, match="denoising"):
        _small(denoising=-1)


def test_scores_aim_at_the_overlap() -> None:
    """LW-DETR's loss entry by entry."""
    loss = SetLoss(box_terms(), IoUAware())
    torch.manual_seed(0)
    outputs = {"logits": torch.randn(2, 4, 5, requires_grad=True), "boxes": torch.rand(2, 4, 4) * 0.3 + 0.2}
    total, parts = loss([outputs], TARGETS)
    stacked = {name: value[None] for name, value in outputs.items()}
    matches = loss.matcher(stacked, TARGETS)
    p, expected = outputs["logits"].detach().sigmoid(), 0.0
    pairs = {
        (int(i), int(q)): int(t)
        for i, q, t in zip(matches.image, matches.query[0], matches.target[0], strict=True)
    }
    for i in range(2):
        for q in range(4):
            for c in range(5):
                at = pairs.get((i, q))
                if at is not None and TARGETS[i]["labels"][at] == c:
                    fit = float(centred_iou(outputs["boxes"][i, q], TARGETS[i]["boxes"][at]))
                    aim = max(float(p[i, q, c]) ** 0.25 * fit**0.75, 0.01)
                    expected -= aim * math.log(p[i, q, c]) + (1 - aim) * math.log(1 - p[i, q, c])
                else:
                    expected -= float(p[i, q, c]) ** 2 * math.log(1 - p[i, q, c])
    assert math.isclose(parts["loss_ce"].item(), expected / 4, rel_tol=1e-5)
    total.backward()
    assert bool(outputs["logits"].grad.isfinite().all())  # pyright: ignore[reportOptionalMemberAccess]


def test_the_loss_is_chosen_by_the_config() -> None:
    assert isinstance(build_loss(iou_aware=True).focal, IoUAware)  # pyright: ignore[reportAttributeAccessIssue]
    assert not isinstance(build_loss().focal, IoUAware)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="iou_aware"):
        build_loss(Skeleton(("nose",), (0.026,)), iou_aware=True)
