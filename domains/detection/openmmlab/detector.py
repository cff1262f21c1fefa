"""Detectors of the zoo as detectors of mmdet: its runner, pipelines, hooks and metrics train and judge them.

Shapes: B images, T objects of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from domains.detection.boxes import to_centres
from domains.detection.losses import Focal, box_terms
from domains.detection.matching import SetLoss
from domains.detection.models.detector import GroupDetector, layers
from domains.detection.openmmlab.backbone import fill
from domains.detection.openmmlab.reading import read_weights
from domains.detection.weights.classes import fit_classes
from domains.detection.weights.runner import telling
from zoo.create import create_model
from zoo.errors import ConfigError, DataError
from zoo.weights.exchange import load_weights
from zoo.weights.formats import TOLD

BaseDetector: Any = import_module("mmdet.models.detectors").BaseDetector
InstanceData: Any = import_module("mmengine.structures").InstanceData
box_tensor: Any = import_module("mmdet.structures.bbox").get_box_tensor


class ZooDetector(BaseDetector):
    """A box detector of the zoo: Group DETR, Conditional DETR and their relatives.

    Images come normalised and padded by `DetDataPreprocessor` (RGB, mean 123.675, 116.28, 103.53, std 58.395,
    57.12, 57.375 for published weights); labels are 0 to C - 1. Padding is told by `img_shape` of each image.

    Checkpoints of the runner tell how the model is built: they are checkpoints of the zoo as well
    (`zoo predict checkpoint=epoch_12.pth`, `zoo.load_model`).

    Args:
        name: a model of `zoo list "detection/*"` that predicts boxes.
        num_classes: C.
        ce, l1, giou: weights of the loss, and of the matching.
        backbone: `dict(name="resnet50")`, with its options, and perhaps an `init_cfg` as a `ZooBackbone` has
            it; by default that of the model.
        test_cfg: `dict(max_per_img=100)`: how many detections an image has.
        init_cfg: `dict(type="Pretrained", checkpoint=FILE)` reads a file of the zoo, of the official program,
            or of mmdet. A class head of COCO's 91 category ids gives its 80 classes.
        options: of the model, such as `groups` and `num_queries`.

    Raises:
        ConfigError: no such model, or one that predicts no boxes.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 80,
        *,
        ce: float = 2.0,
        l1: float = 5.0,
        giou: float = 2.0,
        backbone: Mapping[str, Any] | None = None,
        test_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Any = None,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        body = dict(backbone or {})
        self.backbone_cfg = body.pop("init_cfg", None)
        if "name" in body:
            options["backbone"] = body.pop("name")
        if body:
            options["backbone_options"] = body
        model = create_model(f"detection/{name}", num_classes=num_classes, **options)
        if not isinstance(model, GroupDetector):
            raise ConfigError(f"{name} predicts no boxes, which is what mmdet trains and judges.")
        self.model = model
        self.register_buffer(TOLD, telling(model.zoo_config))  # pyright: ignore
        self.max_per_img = int((test_cfg or {}).get("max_per_img", 100))
        self.error = SetLoss(box_terms(l1, giou), Focal(weight=ce, cost=ce))

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """The maps of the backbone."""
        return tuple(self.model.backbone(batch_inputs))  # pyright: ignore[reportCallIssue]

    def loss(self, batch_inputs: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """The weighted parts of the loss, `loss_ce`, `loss_bbox` and `loss_giou` of the last layer, those of
        layer i before it with the suffix `_i`, and `loss_denoising` of a model that has it."""
        targets = [_target(sample, batch_inputs.device) for sample in batch_data_samples]
        shown = {"targets": targets} if self.model.denoising else {}
        outputs = self.model(batch_inputs, _padding(batch_inputs, batch_data_samples), **shown)
        groups = self.model.active_groups
        _, parts = self.error(layers(outputs), targets, groups)
        weights = {"ce": self.error.focal.weight} | {term.name: term.weight for term in self.error.terms}
        losses = {name: weights[name.split("_")[1]] * part for name, part in parts.items()}
        if "denoised" in outputs:
            losses["loss_denoising"] = self.error.denoising(outputs["denoised"], targets)
        return losses

    @torch.no_grad()
    def predict(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[Any], rescale: bool = True
    ) -> Sequence[Any]:
        """Data samples with `pred_instances`: boxes in pixels of the original image, or of the input where
        `rescale` is off, scores and labels, best first."""
        outputs = self.model(batch_inputs, _padding(batch_inputs, batch_data_samples))
        which = "ori_shape" if rescale else "img_shape"
        sizes = [sample.metainfo[which][:2] for sample in batch_data_samples]
        found = self.model.postprocess(outputs, sizes, self.max_per_img)
        instances = [
            InstanceData(bboxes=one["boxes"], scores=one["scores"], labels=one["labels"]) for one in found
        ]
        return self.add_pred_to_datasample(batch_data_samples, instances)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: Sequence[Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits `(B, Q, C)` and boxes `(B, Q, 4)` of the last layer."""
        mask = _padding(batch_inputs, batch_data_samples) if batch_data_samples else None
        outputs = self.model(batch_inputs, mask)
        return outputs["logits"], outputs["boxes"]

    def init_weights(self) -> None:
        """Fill from `init_cfg`, and the backbone from its own, where there is one; the rest is drawn."""
        if self.is_init:
            return
        if cfg := self.backbone_cfg:
            backbone: Any = self.model.backbone
            fill(backbone, read_weights(cfg), str(cfg["checkpoint"]))
        if self.init_cfg:
            load_weights(self.model, fit_classes(read_weights(self.init_cfg), self.model.num_classes))
        self.is_init = True


def _padding(images: Tensor, samples: Sequence[Any]) -> Tensor | None:
    """Bool `(B, H, W)`, True = padding; None where no image has any."""
    sizes = [tuple(sample.metainfo["img_shape"][:2]) for sample in samples]
    if all(size == tuple(images.shape[2:]) for size in sizes):
        return None
    mask = torch.ones_like(images[:, 0], dtype=torch.bool)
    for i, (height, width) in enumerate(sizes):
        mask[i, :height, :width] = False
    return mask


def _target(sample: Any, device: torch.device) -> dict[str, Tensor]:
    """Labels `(T,)`, and boxes `(T, 4)` as cx, cy, w, h in parts of the image.

    Raises:
        DataError: a box without area; names the image.
    """
    height, width = sample.metainfo["img_shape"][:2]
    corners = box_tensor(sample.gt_instances.bboxes).to(device, torch.float32)
    if len(corners) and not bool((corners[:, 2:] > corners[:, :2]).all()):
        at = int((corners[:, 2:] <= corners[:, :2]).any(1).nonzero()[0])
        where = sample.metainfo.get("img_path", sample.metainfo.get("img_id", "?"))
        raise DataError(
            f"{where}: object {at} has the box {corners[at].tolist()}, which has no area. Put "
            "dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)) into the training pipeline."
        )
    scale = corners.new_tensor([width, height, width, height])
    return {"labels": sample.gt_instances.labels.to(device), "boxes": to_centres(corners / scale)}


def register() -> None:
    """Enter `ZooDetector` into the registry of mmdet."""
    models: Any = import_module("mmdet.registry").MODELS
    models.register_module(module=ZooDetector, force=True)
