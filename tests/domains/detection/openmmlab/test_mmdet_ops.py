"""The operators that stand in for compiled ones, through the modules of mmcv and mmdet that call them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo.errors import MissingExtra

pytestmark = pytest.mark.usefixtures("mmdet")


def _gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel()).view_as(out)))


def _same(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- deformable attention ----------------------------------------------------------------------------------


def _samples() -> tuple[list[tuple[int, int]], Tensor, Tensor, Tensor]:
    shapes = [(9, 7), (4, 5)]
    value = torch.randn(2, sum(h * w for h, w in shapes), 4, 8, requires_grad=True)
    locations = (torch.rand(2, 11, 4, 2, 3, 2) * 1.4 - 0.2).requires_grad_()
    weights = torch.rand(2, 11, 4, 2, 3, requires_grad=True)
    return shapes, value, locations, weights


@pytest.mark.parametrize("device", ["cpu", "compiled"])
def test_deformable_attention_is_that_of_mmcv_forward_and_backward(device: str) -> None:
    from mmcv.ops import multi_scale_deform_attn as mmcv  # pyright: ignore[reportMissingImports]

    shapes, value, locations, weights = _samples()
    sizes = torch.tensor(shapes)
    starts = torch.tensor([0, 63])
    if device == "cpu":
        out = mmcv.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
    else:  # what mmcv calls for tensors on a GPU
        out = mmcv.MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    plain = mmcv.multi_scale_deformable_attn_pytorch.__wrapped__(value, shapes, locations, weights)
    inputs = (value, locations, weights)
    _same([out, *_gradients(out, *inputs)], [plain, *_gradients(plain, *inputs)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_deformable_attention_on_a_gpu() -> None:
    from mmcv.ops import MultiScaleDeformableAttention  # pyright: ignore[reportMissingImports]

    module = MultiScaleDeformableAttention(embed_dims=32, num_heads=4, num_levels=2, batch_first=True)
    module.init_weights()
    shapes, *_ = _samples()
    arguments = {
        "query": torch.randn(2, 11, 32),
        "value": torch.randn(2, 83, 32),
        "reference_points": torch.rand(2, 11, 2, 2),
        "spatial_shapes": torch.tensor(shapes),
        "level_start_index": torch.tensor([0, 63]),
    }
    wanted = module(**arguments)
    found = module.cuda()(**{name: value.cuda() for name, value in arguments.items()})
    _same([found.cpu()], [wanted], 1e-4)


# ---- suppression -------------------------------------------------------------------------------------------


def _boxes(count: int = 30) -> tuple[Tensor, Tensor]:
    corners = torch.rand(count, 2) * 40
    return torch.cat([corners, corners + 5 + torch.rand(count, 2) * 25], 1), torch.rand(count)


def _overlap(a: Tensor, b: Tensor, offset: int) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2]) + offset).clamp(min=0)
    area = float(sides.prod())
    whole = float((a[2:] - a[:2] + offset).prod() + (b[2:] - b[:2] + offset).prod()) - area
    return area / whole


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_its_definition_keeps(offset: int) -> None:
    from mmcv.ops import nms  # pyright: ignore[reportMissingImports]

    boxes, scores = _boxes()
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if all(_overlap(boxes[i], boxes[k], offset) <= 0.4 for k in kept):
            kept.append(i)
    found, index = nms(boxes, scores, 0.4, offset=offset)
    assert index.tolist() == kept
    assert len(kept) < len(boxes)
    torch.testing.assert_close(found, torch.cat([boxes, scores[:, None]], 1)[kept])


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
def test_soft_nms_lowers_scores_by_its_definition(method: str) -> None:
    from mmcv.ops import soft_nms  # pyright: ignore[reportMissingImports]

    boxes, scores = _boxes()
    left, wanted = dict(enumerate(scores.tolist())), []
    while left:
        best = max(left, key=left.__getitem__)
        wanted.append((best, left.pop(best)))
        for i in list(left):
            overlap = _overlap(boxes[best], boxes[i], 0)
            if method == "gaussian":
                left[i] *= float(torch.tensor(-(overlap**2) / 0.5).exp())
            elif overlap >= 0.3:
                left[i] *= 1 - overlap if method == "linear" else 0
            if left[i] < 0.05:
                del left[i]
    found, index = soft_nms(boxes, scores, 0.3, sigma=0.5, min_score=0.05, method=method)
    assert index.tolist() == [i for i, _ in wanted]
    torch.testing.assert_close(found[:, 4], torch.tensor([score for _, score in wanted]))
    assert len(wanted) < len(boxes)


# ---- operators with a gradient -----------------------------------------------------------------------------


def test_focal_loss_is_that_of_mmdet_in_python() -> None:
    from mmcv.ops import sigmoid_focal_loss  # pyright: ignore[reportMissingImports]
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss  # pyright: ignore[reportMissingImports]

    logits, target = torch.randn(9, 4, requires_grad=True), torch.tensor([0, 1, 2, 3, 4, 4, 0, 2, 4])
    found = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, "none")
    classes = torch.nn.functional.one_hot(target, 5)[:, :4]
    wanted = py_sigmoid_focal_loss(logits, classes, reduction="none")
    _same([found, *_gradients(found, logits)], [wanted, *_gradients(wanted, logits)])


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_align_is_that_of_torchvision(ratio: int, aligned: bool) -> None:
    from mmcv.ops import RoIAlign  # pyright: ignore[reportMissingImports]

    maps = torch.randn(2, 3, 16, 12, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 2, 30, 40], [1, 5, 5, 40, 60], [1, -4, 0, 9, 9]])
    ours, theirs = (RoIAlign(5, 0.25, ratio, "avg", aligned, use_torchvision=x)(maps, rois) for x in (0, 1))
    _same([ours, *_gradients(ours, maps)], [theirs, *_gradients(theirs, maps)])


def _sampled(x: Tensor, y_at: Tensor, x_at: Tensor) -> Tensor:
    """Bilinear values `(C,)` of a map `(C, H, W)` at one place, zeros outside."""
    low, out = (int(y_at.floor()), int(x_at.floor())), x.new_zeros(x.shape[0])
    for row, column in itertools.product((0, 1), (0, 1)):
        i, j = low[0] + row, low[1] + column
        if 0 <= i < x.shape[1] and 0 <= j < x.shape[2]:
            out = out + x[:, i, j] * (1 - (y_at - i).abs()) * (1 - (x_at - j).abs())
    return out


def _deformable(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
    """Equation 1 of Zhu et al. 2019 as a loop: 3 x 3, stride 2, padding 1, one group."""
    height, width = offset.shape[2:]
    out = []
    for b, i, j in itertools.product(range(len(x)), range(height), range(width)):
        total = x.new_zeros(weight.shape[0])
        for k, (row, column) in enumerate(itertools.product(range(3), range(3))):
            y_at = 2 * i - 1 + row + offset[b, 2 * k, i, j]
            x_at = 2 * j - 1 + column + offset[b, 2 * k + 1, i, j]
            value = weight[:, :, row, column] @ _sampled(x[b], y_at, x_at)
            total = total + (value if mask is None else value * mask[b, k, i, j])
        out.append(total)
    return torch.stack(out).view(len(x), height, width, -1).permute(0, 3, 1, 2)


def _conv_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = ((2, 3, 6, 5), (2, 18, 3, 3), (4, 3, 3, 3), (2, 9, 3, 3))
    return tuple(torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes)  # pyright: ignore


def test_deformable_convolution_is_its_definition() -> None:
    from mmcv.ops import deform_conv2d  # pyright: ignore[reportMissingImports]

    x, offset, weight, _ = _conv_inputs()
    found, wanted = deform_conv2d(x, offset, weight, 2, 1), _deformable(x, offset, weight, None)
    inputs = (x, offset, weight)
    _same([found, *_gradients(found, *inputs)], [wanted, *_gradients(wanted, *inputs)], 1e-9)


def test_modulated_deformable_convolution_is_its_definition() -> None:
    from mmcv.ops import modulated_deform_conv2d  # pyright: ignore[reportMissingImports]

    x, offset, weight, mask = _conv_inputs()
    bias = torch.randn(4, dtype=torch.double, requires_grad=True)
    found = modulated_deform_conv2d(x, offset, mask, weight, bias, 2, 1)
    wanted = _deformable(x, offset, weight, mask) + bias[:, None, None]
    inputs = (x, offset, weight, mask, bias)
    _same([found, *_gradients(found, *inputs)], [wanted, *_gradients(wanted, *inputs)], 1e-9)


@pytest.mark.parametrize("kind", ["DCN", "DCNv2"])
def test_layers_of_deformable_convolution_run_in_groups(kind: str) -> None:
    from mmcv.cnn import build_conv_layer  # pyright: ignore[reportMissingImports]

    layer = build_conv_layer({"type": kind, "deform_groups": 2}, 8, 6, 3, padding=1, bias=False, groups=2)
    x = torch.randn(1, 8, 7, 7, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0


# ---- what there is not -------------------------------------------------------------------------------------


def test_an_operator_that_nothing_stands_in_for_is_named() -> None:
    from mmcv.ops import CornerPool, RoIPool, sigmoid_focal_loss  # pyright: ignore[reportMissingImports]

    with pytest.raises(MissingExtra, match=r"'roi_pool_forward'.*MMCV_WITH_OPS=1"):
        RoIPool(3)(torch.randn(1, 2, 8, 8), torch.tensor([[0, 1.0, 1, 5, 5]]))
    with pytest.raises(MissingExtra, match="with weights of classes"):
        sigmoid_focal_loss(torch.randn(2, 3), torch.tensor([0, 1]), 2.0, 0.25, torch.ones(3))
    assert CornerPool("top")(torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)  # mmcv has it in python


def test_mmengine_knows_that_nothing_is_compiled() -> None:
    from mmengine.utils.dl_utils import mmcv_full_available  # pyright: ignore[reportMissingImports]

    assert not mmcv_full_available()


def test_a_compiled_extension_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    from domains.detection.openmmlab import ops

    compiled = ModuleType(ops.MODULE)
    monkeypatch.setitem(sys.modules, ops.MODULE, compiled)
    ops.provide()
    assert sys.modules[ops.MODULE] is compiled
