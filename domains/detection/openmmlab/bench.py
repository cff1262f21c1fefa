"""Conditional DETR of the zoo beside that of mmdet, with equal weights."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.detection.boxes import to_corners
from domains.detection.losses import box_terms
from domains.detection.matching import SetLoss
from domains.detection.models.detector import layers
from domains.detection.openmmlab import enable_mmdet
from zoo.bench.compare import Job, gradient_norm
from zoo.bench.suite import Case
from zoo.weights.exchange import from_official

CONFIG = Path(".mim/configs/conditional_detr/conditional-detr_r50_8xb2-50e_coco.py")
"""Of R50, below the package."""
NAME = "conditional_detr_r50 beside mmdet"


def contestants(device: torch.device) -> tuple[Any, Any]:
    """Ours and mmdet's in evaluation, without dropout; heads and norms as if trained."""
    enable_mmdet()
    package: Any = import_module("mmdet")
    import_module("mmdet.utils").register_all_modules()
    cfg = import_module("mmengine.config").Config.fromfile(Path(package.__file__).parent / CONFIG).model
    cfg.backbone.init_cfg = None
    encoder, decoder = cfg.encoder.layer_cfg, cfg.decoder.layer_cfg
    encoder.self_attn_cfg.dropout = 0.0
    decoder.self_attn_cfg.attn_drop = decoder.cross_attn_cfg.attn_drop = 0.0
    encoder.ffn_cfg.ffn_drop = decoder.ffn_cfg.ffn_drop = 0.0
    torch.manual_seed(0)
    theirs = import_module("mmdet.registry").MODELS.build(cfg).eval()
    with torch.no_grad():
        theirs.bbox_head.fc_reg.weight.normal_(std=0.02)
        for key, value in theirs.backbone.named_parameters():
            if key.endswith(("bn3.weight", "downsample.1.weight")):
                value.fill_(0.5)
    ours = from_official("detection/conditional_detr_r50", theirs.state_dict(), dropout=0.0)
    return ours.to(device), theirs.to(device)


def samples(images: int, height: int, width: int, wanted: list[dict[str, Tensor]] | None = None) -> list[Any]:
    """What mmdet is told of images without padding, and of the objects on them."""
    structures = import_module("mmdet.structures")
    instances = import_module("mmengine.structures").InstanceData
    size = (height, width)
    facts = {"img_shape": size, "ori_shape": size, "batch_input_shape": size, "scale_factor": (1.0, 1.0)}
    found = [structures.DetDataSample(metainfo=facts | {"pad_shape": size}) for _ in range(images)]
    for sample, objects in zip(found, wanted or [], strict=bool(wanted)):
        scale = objects["boxes"].new_tensor([width, height, width, height])
        boxes = to_corners(objects["boxes"]) * scale
        sample.gt_instances = instances(bboxes=boxes, labels=objects["labels"])
    return found


def inference(height: int, width: int, *, rounds: int) -> Case:
    """One picture, to the boxes of the last layer."""

    def build(device: torch.device) -> Job:
        from domains.detection.bench import pictures

        model, peer = contestants(device)
        model, x = model.fuse(), pictures((1, 3, height, width), device)
        told = samples(1, height, width)

        @torch.inference_mode()
        def ours() -> tuple[Tensor, Tensor]:
            outputs = model(x)
            return outputs["logits"], outputs["boxes"]

        @torch.inference_mode()
        def theirs() -> tuple[Tensor, Tensor]:
            logits, boxes = peer.bbox_head(**peer.forward_transformer(peer.extract_feat(x), told))
            return logits[-1], boxes[-1]

        def flat(run: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
            return lambda: torch.cat([part.flatten() for part in run()])

        return Job(NAME, ours, theirs, flat(ours), flat(theirs))

    return Case(f"{NAME}, {width}x{height} pixels", build, items=1, rounds=rounds)


def training(batch: int, height: int, width: int) -> Case:
    """Forward, matching, loss and backward; what is compared is the norm of all gradients."""

    def build(device: torch.device) -> Job:
        from domains.detection.bench import objects, pictures

        model, peer = (part.train() for part in contestants(device))
        x, wanted = pictures((batch, 3, height, width), device), objects(batch, 7, device)
        wanted = [{**one, "labels": one["labels"] % model.num_classes} for one in wanted]
        told, loss = samples(batch, height, width, wanted), SetLoss(box_terms())

        def ours() -> Tensor:
            return gradient_norm(model, loss(layers(model(x)), wanted)[0])

        def theirs() -> Tensor:
            return gradient_norm(peer, peer.parse_losses(peer.loss(x, told))[0])

        return Job(f"{NAME}, training", ours, theirs, ours, theirs)

    return Case(f"{NAME}, training step, {batch} x {width}x{height}", build, items=batch, rounds=3)


CASES = (
    inference(480, 640, rounds=5),
    inference(800, 1333, rounds=3),
    training(2, 480, 640),
    training(1, 800, 1333),
)
