"""Boxes: conversions, generalised IoU, degenerate ones."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import generalized_box_iou

from domains.detection.boxes import area, centred_giou, generalized_iou, to_centres, to_corners
from zoo.errors import DataError


def _corners(count: int) -> torch.Tensor:
    low = torch.rand(count, 2, dtype=torch.float64)
    return torch.cat([low, low + torch.rand(count, 2, dtype=torch.float64) + 0.01], 1)


def test_conversions_are_inverse() -> None:
    boxes = _corners(6)
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)
    torch.testing.assert_close(to_centres(torch.tensor([1.0, 2.0, 5.0, 4.0])), torch.tensor([3.0, 3, 4, 2]))


def test_generalised_iou_of_all_pairs_is_torchvisions() -> None:
    a, b = _corners(5), _corners(7)
    torch.testing.assert_close(generalized_iou(a[:, None], b), generalized_box_iou(a, b))
    torch.testing.assert_close(centred_giou(to_centres(a)[:, None], to_centres(b)), generalized_box_iou(a, b))


def test_generalised_iou_of_known_boxes() -> None:
    unit = torch.tensor([0.0, 0, 1, 1])
    assert float(generalized_iou(unit, unit)) == 1
    apart = torch.tensor([2.0, 0, 3, 1])  # hull 3, union 2
    torch.testing.assert_close(generalized_iou(unit, apart), torch.tensor(-1 / 3))
    assert float(area(apart)) == 1


@pytest.mark.parametrize("box", [[0.5, 0, 0.4, 1], [0, 1, 1, 0.9], [0, float("nan"), 1, 1]])
def test_a_degenerate_box_is_named(box: list[float]) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], box])
    with pytest.raises(DataError, match=r"Box \(1,\) is .*x1 <= x2"):
        generalized_iou(boxes, boxes[:1])
