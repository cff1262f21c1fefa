"""Matching in groups and the loss over its pairs, against loops over all there is to choose from."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from detr_small import targets
from torch import Tensor
from torchvision.ops import generalized_box_iou

from domains.detection.boxes import to_corners
from domains.detection.losses import Focal, box_terms
from domains.detection.matching import Matcher, SetLoss, stack
from zoo.errors import ConfigError, DataError

GROUPS, QUERIES, LAYERS = 2, 4, 3


def _outputs(images: int = 2, classes: int = 5) -> list[dict[str, Tensor]]:
    count = GROUPS * QUERIES
    return [
        {"logits": torch.randn(images, count, classes), "boxes": torch.rand(images, count, 4) * 0.5 + 0.2}
        for _ in range(LAYERS)
    ]


def _cost(logits: Tensor, boxes: Tensor, target: dict[str, Tensor]) -> Tensor:
    """`(Q, T)` as the papers write it."""
    p = logits.sigmoid()
    focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    giou = generalized_box_iou(to_corners(boxes), to_corners(target["boxes"]))
    return 2 * focal[:, target["labels"]] + 5 * torch.cdist(boxes, target["boxes"], p=1) - 2 * giou


def _brute_force(cost: Tensor) -> list[tuple[int, int]]:
    """The cheapest one-to-one pairs, by query."""
    rows, columns = cost.shape
    best = min(
        permutations(range(rows), columns),
        key=lambda chosen: float(sum(cost[q, t] for t, q in enumerate(chosen))),
    )
    return sorted((q, t) for t, q in enumerate(best))


def test_matches_are_the_cheapest_of_all_in_every_output_image_and_group() -> None:
    outputs, wanted = _outputs(), targets(3, 2)
    found = Matcher(box_terms(), Focal())(stack(outputs, ["logits", "boxes"]), wanted, GROUPS)
    assert found.image.tolist() == [0] * 6 + [1] * 4
    for layer, output in enumerate(outputs):
        expected = []
        for i, target in enumerate(wanted):
            for group in range(GROUPS):
                part = slice(group * QUERIES, (group + 1) * QUERIES)
                cost = _cost(output["logits"][i, part], output["boxes"][i, part], target)
                expected += [(q + group * QUERIES, t) for q, t in _brute_force(cost)]
        assert list(zip(found.query[layer].tolist(), found.target[layer].tolist(), strict=True)) == expected


def test_more_objects_than_queries_leaves_some_unmatched() -> None:
    outputs = stack(_outputs(1), ["logits", "boxes"])
    found = Matcher(box_terms(), Focal())(outputs, targets(7), GROUPS)
    assert found.query.shape == (LAYERS, GROUPS * QUERIES)
    for group in found.target.view(LAYERS, GROUPS, QUERIES).flatten(0, 1):
        assert len(set(group.tolist())) == QUERIES


def test_loss_is_that_of_a_loop_over_pairs() -> None:
    outputs, wanted = _outputs(), targets(3, 2)
    loss = SetLoss(box_terms(), Focal())
    total, parts = loss(outputs, wanted, GROUPS)
    matches = loss.matcher(stack(outputs, ["logits", "boxes"]), wanted, GROUPS)
    expected = torch.zeros(())
    for layer, output in enumerate(outputs):
        onehot, l1, giou = torch.zeros_like(output["logits"]), [], []
        for image, query, t in zip(matches.image, matches.query[layer], matches.target[layer], strict=True):
            target = wanted[int(image)]
            onehot[image, query, target["labels"][t]] = 1
            box, true = output["boxes"][image, query], target["boxes"][t]
            l1.append((box - true).abs().sum())
            giou.append(1 - generalized_box_iou(to_corners(box)[None], to_corners(true)[None])[0, 0])
        p = output["logits"].sigmoid()
        right = torch.where(onehot > 0, p, 1 - p)
        alpha = torch.where(onehot > 0, 0.25, 0.75)
        bce = F.binary_cross_entropy_with_logits(output["logits"], onehot, reduction="none")
        focal = (alpha * (1 - right) ** 2 * bce).sum() / (5 * GROUPS)
        sums = [focal, torch.stack(l1).sum() / (5 * GROUPS), torch.stack(giou).sum() / (5 * GROUPS)]
        suffix = "" if layer == LAYERS - 1 else f"_{layer}"
        for name, value in zip(("ce", "bbox", "giou"), sums, strict=True):
            torch.testing.assert_close(parts[f"loss_{name}{suffix}"], value)
        expected = expected + 2 * sums[0] + 5 * sums[1] + 2 * sums[2]
    torch.testing.assert_close(total, expected)
    assert len(parts) == 3 * LAYERS


def test_scale_does_not_depend_on_the_number_of_groups() -> None:
    outputs, wanted = _outputs(), targets(3, 2)
    twice = [{name: torch.cat([x, x], 1) for name, x in output.items()} for output in outputs]
    loss = SetLoss(box_terms())
    torch.testing.assert_close(loss(twice, wanted, 2)[0], loss(outputs, wanted, 1)[0])


def test_cost_weights_may_differ_from_loss_weights() -> None:
    outputs, wanted = _outputs(), targets(3, 2)
    free = SetLoss(box_terms(0.0, 0.0, cost_l1=5.0, cost_giou=2.0), Focal(weight=1.0))
    total, parts = free(outputs, wanted, GROUPS)
    _, published = SetLoss(box_terms())(outputs, wanted, GROUPS)
    torch.testing.assert_close(parts, published)
    torch.testing.assert_close(total, sum(value for name, value in parts.items() if "_ce" in name))


def test_images_without_objects_train_the_classes_alone() -> None:
    outputs = _outputs()
    for output in outputs:
        output["logits"].requires_grad_()
    total, parts = SetLoss(box_terms())(outputs, targets(0, 0), GROUPS)
    total.backward()
    assert float(parts["loss_bbox"]) == float(parts["loss_giou"]) == 0
    assert float(parts["loss_ce"].detach()) > 0
    gradient = outputs[0]["logits"].grad
    assert gradient is not None
    assert (gradient > 0).all()


def test_gradients_reach_matched_boxes_only() -> None:
    outputs, wanted = _outputs(), targets(3, 2)
    outputs[0]["boxes"].requires_grad_()
    loss = SetLoss(box_terms())
    loss(outputs, wanted, GROUPS)[0].backward()
    matches = loss.matcher(stack(outputs, ["logits", "boxes"]), wanted, GROUPS)
    gradient = outputs[0]["boxes"].grad
    assert gradient is not None
    touched = {tuple(x) for x in gradient.abs().sum(-1).nonzero().tolist()}
    assert touched == set(zip(matches.image.tolist(), matches.query[0].tolist(), strict=True))


def test_half_precision_predictions_are_matched_in_float32() -> None:
    outputs = [{name: x.bfloat16() for name, x in output.items()} for output in _outputs()]
    wide = [{name: x.float() for name, x in output.items()} for output in outputs]
    wanted = targets(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = SetLoss(box_terms())(outputs, wanted, GROUPS)
    torch.testing.assert_close(total, SetLoss(box_terms())(wide, wanted, GROUPS)[0])


# ---- what is wrong is named --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "term"),
    [("logits", "nan", "class"), ("boxes", "nan", "bbox"), ("boxes", "inf", "bbox")],
)
def test_a_cost_out_of_range_names_image_and_term(field: str, value: str, term: str) -> None:
    outputs = _outputs()
    outputs[1][field][1, 2] = float(value)
    with pytest.raises(DataError, match=rf"cost '{term}' of image 1 .*\(output 1, query 2, target 0\)"):
        SetLoss(box_terms())(outputs, targets(3, 2), GROUPS)


def test_queries_that_are_no_groups() -> None:
    with pytest.raises(ConfigError, match="8 queries cannot be shared out evenly to 3 groups"):
        SetLoss(box_terms())(_outputs(), targets(3, 2), 3)


def test_a_class_that_the_model_does_not_have() -> None:
    wanted = targets(3, 2)
    wanted[1]["labels"][1] = 5
    with pytest.raises(DataError, match="Image 1 has an object of class 5, but the model has classes 0 to 4"):
        SetLoss(box_terms())(_outputs(), wanted, GROUPS)


@pytest.mark.parametrize("size", [0.0, -0.1, float("nan")])
def test_a_box_without_size(size: float) -> None:
    wanted = targets(3, 2)
    wanted[0]["boxes"][2, 3] = size
    with pytest.raises(DataError, match="Object 2 of image 0 has the box"):
        SetLoss(box_terms())(_outputs(), wanted, GROUPS)


def test_targets_that_lack_a_field_or_rows_of_it() -> None:
    wanted = targets(3, 2)
    del wanted[1]["boxes"]
    with pytest.raises(DataError, match="target of image 1 has no 'boxes'"):
        SetLoss(box_terms())(_outputs(), wanted, GROUPS)
    wanted = targets(3, 2)
    wanted[0]["boxes"] = wanted[0]["boxes"][:2]
    with pytest.raises(DataError, match="Image 0 has 3 labels and 2 of 'boxes'"):
        SetLoss(box_terms())(_outputs(), wanted, GROUPS)
