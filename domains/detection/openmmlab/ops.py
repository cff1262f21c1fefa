"""Stands in for the compiled operators of mmcv, as far as torchvision and this zoo have them.

The python side of mmcv calls `mmcv._ext` with tensors to be filled. The functions here have the names and
arguments that it calls by; a gradient is that of the same operator, computed again.

Shapes: N boxes, C classes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torchvision.ops
from torch import Tensor

from zoo.attention.deformable import deformable_attend
from zoo.errors import MissingExtra

MODULE = "mmcv._ext"


class StandIn(ModuleType):
    """`mmcv._ext` without a compiler: has every name, and knows some."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return OPERATORS.get(name) or _unavailable(name)


def _unavailable(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise MissingExtra(
            f"mmcv's operator {name!r} is compiled code, which mmcv-lite does not have, and nothing stands "
            "in for it. Build the full package instead: pip uninstall -y mmcv-lite; pip install wheel ninja "
            "packaging; MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary mmcv mmcv==2.1.0"
        )

    return refuse


def provide() -> None:
    """Enter the stand-in as `mmcv._ext`, unless a compiled one can be imported."""
    try:
        importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            raise
    else:
        return
    mmcv: Any = importlib.import_module("mmcv")
    sys.modules[MODULE] = mmcv._ext = stand_in = StandIn(MODULE)
    stand_in.__spec__ = ModuleSpec(MODULE, None)  # without a loader mmengine knows that it is not compiled
    attention: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    plain = attention.multi_scale_deformable_attn_pytorch
    attention.multi_scale_deformable_attn_pytorch = wraps(plain)(_deformable_attention)
    attention.MultiScaleDeformableAttnFunction.apply = _deformable_attention_compiled


# ---- multi-scale deformable attention ----------------------------------------------------------------------


def _deformable_attention(value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """What mmcv calls on a CPU: the zoo's, to `(B, Q, H D)`."""
    return deformable_attend(value, shapes.tolist(), locations, weights).flatten(2)


def _deformable_attention_compiled(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
) -> Tensor:
    """What mmcv calls on a GPU."""
    return _deformable_attention(value, shapes, locations, weights)


# ---- suppression of overlaps -------------------------------------------------------------------------------


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Boxes `(N, 4)` that are kept, best first. With offset 1, corners are pixels and not places."""
    wider = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(wider, scores, iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS (Bodla et al. 2017): scores fall by the overlap with better boxes.

    Args:
        dets: `(N, 5)`, filled with boxes and scores, best first.
        method: 0 = plain suppression, 1 = linear, 2 = Gaussian with `sigma`.

    Returns:
        Which boxes are kept, as many as rows are filled.
    """
    wider = boxes + boxes.new_tensor([0, 0, offset, offset])
    overlaps = torchvision.ops.box_iou(wider, wider)
    left, kept = scores.clone(), []
    while len(kept) < len(boxes):
        best = int(left.argmax())
        if kept and (left[best] < min_score or left[best] == -torch.inf):
            break
        dets[len(kept)] = torch.cat([boxes[best], left[best : best + 1]])
        kept.append(best)
        overlap = overlaps[best]
        if method == 2:
            left = left * torch.exp(-overlap.square() / sigma)
        else:
            left = torch.where(overlap >= iou_threshold, left * (1 - overlap) if method else 0.0, left)
        left[kept] = -torch.inf
    return torch.tensor(kept, dtype=torch.long)


# ---- operators with a gradient -----------------------------------------------------------------------------


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Of `function(*inputs)`, for each input."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        return list(torch.autograd.grad(function(*leaves), leaves, grad))


def _focal(target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Callable[[Tensor], Tensor]:
    """The focal loss of logits `(N, C)`; a target outside of the classes is background."""
    if weight.numel():
        _unavailable("sigmoid_focal_loss with weights of classes")()

    def loss(logits: Tensor) -> Tensor:
        classes = target[:, None] == torch.arange(logits.shape[1], device=logits.device)
        return torchvision.ops.sigmoid_focal_loss(logits, classes.to(logits.dtype), alpha, gamma)

    return loss


def sigmoid_focal_loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    output.copy_(_focal(target, weight, gamma, alpha)(logits))


def sigmoid_focal_loss_backward(
    logits: Tensor, target: Tensor, weight: Tensor, grad_logits: Tensor, gamma: float, alpha: float
) -> None:
    loss = _focal(target, weight, gamma, alpha)
    (found,) = _gradients(loss, [logits], torch.ones_like(logits))
    grad_logits.copy_(found)


def _roi_align(rois: Tensor, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    if not options["pool_mode"]:
        _unavailable("roi_align with pool_mode='max'")()
    align: Any = torchvision.ops.roi_align
    size = options["aligned_height"], options["aligned_width"]
    # 0 is mmcv's word for as many points as a cell is wide.
    ratio = options["sampling_ratio"] or -1
    return lambda maps: align(maps, rois, size, options["spatial_scale"], ratio, options["aligned"])


def roi_align_forward(
    maps: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor, argmax_x: Tensor, **options: Any
) -> None:
    output.copy_(_roi_align(rois, options)(maps))


def roi_align_backward(
    grad: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor, grad_maps: Tensor, **options: Any
) -> None:
    (found,) = _gradients(_roi_align(rois, options), [grad_maps], grad)
    grad_maps.copy_(found)


def _conv(options: dict[str, Any], bias: Tensor | None) -> Callable[..., Tensor]:
    """Deformable convolution of input, offset, weight and, in the second version, mask."""
    names = ("stride", "pad", "dilation")
    stride, padding, dilation = ((options[f"{name}_h"], options[f"{name}_w"]) for name in names)

    def convolve(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)

    return convolve


def modulated_deform_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    convolve = _conv(options, bias if options["with_bias"] else None)
    output.copy_(convolve(x, offset, weight, mask))


def modulated_deform_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad: Tensor,
    **options: Any,
) -> None:
    found = _gradients(_conv(options, None), [x, offset, weight, mask], grad)
    for place, value in zip((grad_x, grad_offset, grad_weight, grad_mask), found, strict=True):
        place.copy_(value)
    if options["with_bias"]:
        grad_bias.copy_(grad.sum((0, 2, 3)))


def _named_as_second(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the first version under the names of the second."""
    renamed = {"dH": "stride_h", "dW": "stride_w", "padH": "pad_h", "padW": "pad_w"}
    renamed |= {"dilationH": "dilation_h", "dilationW": "dilation_w"}
    return {renamed.get(name, name): value for name, value in options.items()}


def deform_conv_forward(
    x: Tensor, weight: Tensor, offset: Tensor, output: Tensor, columns: Tensor, ones: Tensor, **options: Any
) -> None:
    output.copy_(_conv(_named_as_second(options), None)(x, offset, weight))


def deform_conv_backward_input(
    x: Tensor,
    offset: Tensor,
    grad: Tensor,
    grad_x: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    convolve = _conv(_named_as_second(options), None)
    found = _gradients(lambda a, b: convolve(a, b, weight), [x, offset], grad)
    grad_x.copy_(found[0])
    grad_offset.copy_(found[1])


def deform_conv_backward_parameters(
    x: Tensor,
    offset: Tensor,
    grad: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **options: Any,
) -> None:
    convolve = _conv(_named_as_second(options), None)
    (found,) = _gradients(lambda w: convolve(x, offset, w), [grad_weight], grad)
    grad_weight.copy_(found * options["scale"])


OPERATORS: dict[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        nms,
        softnms,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
        roi_align_forward,
        roi_align_backward,
        modulated_deform_conv_forward,
        modulated_deform_conv_backward,
        deform_conv_forward,
        deform_conv_backward_input,
        deform_conv_backward_parameters,
    )
}
