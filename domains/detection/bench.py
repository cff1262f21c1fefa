"""`zoo bench suite=detection`: deformable attention beside `grid_sample`; Group DETR and Group Pose beside
plain layouts: pictures, matching, training; where mmdet is installed, Conditional DETR beside mmdet's."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from domains.detection.losses import Focal, box_terms
from domains.detection.matching import Matcher, SetLoss, stack
from domains.detection.models.detector import layers
from zoo.bench.attention.deformable import SUITE as DEFORMABLE
from zoo.bench.compare import Job, gradient_norm
from zoo.bench.peer import load_peer
from zoo.bench.suite import Case, Suite
from zoo.create import create_model
from zoo.weights.exchange import to_official


def contestants(device: torch.device) -> tuple[Any, Any]:
    """Group DETR and its peer with the same weights, in evaluation, without dropout."""
    torch.manual_seed(0)
    model: Any = create_model("detection/group_detr_r50", dropout=0.0).eval()
    nn.init.normal_(model.bbox_embed.layers[-1].weight, std=0.02)
    _settle(model.backbone)
    peer = load_peer("group_detr").PlainGroupDETR().eval()
    peer.load_state_dict(to_official(model))
    return model.to(device), peer.to(device)


def _settle(backbone: nn.Module) -> None:
    """As trained norms do, keeps the maps of residual blocks from growing."""
    for key, buffer in backbone.named_buffers():
        if key.endswith(("bn3.weight", "downsample.1.weight")):
            buffer.fill_(0.5)


def pictures(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """`(B, 3, H, W)`, normalised."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def objects(images: int, count: int, device: torch.device) -> list[dict[str, Tensor]]:
    """Targets of so many images with so many objects each."""
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "labels": torch.randint(91, (count,), generator=draw).to(device),
            "boxes": (torch.rand(count, 4, generator=draw) * 0.4 + 0.1).to(device),
        }
        for _ in range(images)
    ]


def inference(height: int, width: int, *, target: float | None = None, rounds: int | None = None) -> Case:
    """One picture, to the boxes of the last layer."""

    def build(device: torch.device) -> Job:
        model, peer = contestants(device)
        model, x = model.fuse(), pictures((1, 3, height, width), device)
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
        ours = torch.inference_mode()(lambda: model(x))
        theirs = torch.inference_mode()(lambda: peer(x, mask)[-1])
        name = f"group_detr_r50, {width}x{height}"

        def results(run: Callable[[], Any], *keys: Any) -> Callable[[], Tensor]:
            return lambda: torch.cat([run()[key].flatten() for key in keys])

        return Job(name, ours, theirs, results(ours, "logits", "boxes"), results(theirs, 0, 1))

    return Case(f"group_detr_r50, {width}x{height} pixels", build, target, items=1, rounds=rounds)


def matching(batch: int, count: int, *, target: float | None = None) -> Case:
    """6 layers of 11 groups of 300 queries; what is compared are the pairs."""

    def build(device: torch.device) -> Job:
        groups, queries = 11, 11 * 300
        wanted, draw = objects(batch, count, device), torch.Generator().manual_seed(1)
        found = [
            {
                "logits": torch.randn(batch, queries, 91, generator=draw).to(device),
                "boxes": (torch.rand(batch, queries, 4, generator=draw) * 0.4 + 0.1).to(device),
            }
            for _ in range(6)
        ]
        matcher, peer = Matcher(box_terms(), Focal()), load_peer("group_detr").match

        def ours() -> Any:
            return matcher(stack(found, ["logits", "boxes"]), wanted, groups)

        def theirs() -> Any:
            return peer([(f["logits"], f["boxes"]) for f in found], wanted, groups)

        def our_pairs() -> Tensor:
            pairs = ours()
            return torch.stack([pairs.query, pairs.target]).double()

        def their_pairs() -> Tensor:
            sides = [[torch.cat([p[side] for p in layer]) for layer in theirs()] for side in (0, 1)]
            return torch.stack([torch.stack(side) for side in sides]).double().to(device)

        return Job("matching", ours, theirs, our_pairs, their_pairs)

    name = f"matching, {batch} images of {count} objects, 6 layers, 11 groups of 300"
    return Case(name, build, target, items=batch, tolerance=0.0)


def training(batch: int, height: int, width: int, *, target: float | None = None) -> Case:
    """Forward, matching, loss and backward of all groups; what is compared is the norm of all gradients."""

    def build(device: torch.device) -> Job:
        model, peer = contestants(device)
        model.train()
        peer.train()
        for part in (peer.backbone[0]["body"].conv1, peer.backbone[0]["body"].layer1):
            part.requires_grad_(False)
        x, wanted = pictures((batch, 3, height, width), device), objects(batch, 7, device)
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=device)
        loss, plain_loss = SetLoss(box_terms()), load_peer("group_detr").loss

        def ours() -> Tensor:
            return gradient_norm(model, loss(layers(model(x)), wanted, model.groups)[0])

        def theirs() -> Tensor:
            return gradient_norm(peer, plain_loss(peer(x, mask), wanted, model.groups))

        return Job("training", ours, theirs, ours, theirs)

    return Case(f"group_detr_r50, training step, {batch} x {width}x{height}", build, target, items=batch)


def pose_contestants(device: torch.device) -> tuple[Any, Any]:
    """Group Pose and its peer with the same weights, in evaluation; heads and offsets as if trained."""
    torch.manual_seed(0)
    model: Any = create_model("detection/group_pose_r50").eval()
    heads = [head.layers[-1] for head in (model.enc_pose_embed, *model.pose_embed)]
    for part in (*heads, *(layer.self_attn.sampling_offsets for layer in model.encoder)):
        nn.init.normal_(part.weight, std=0.02)
    _settle(model.backbone)
    peer = load_peer("group_pose").PlainGroupPose().eval()
    peer.load_state_dict(to_official(model))
    return model.to(device), peer.to(device)


def pose_inference(
    height: int, width: int, *, target: float | None = None, rounds: int | None = None
) -> Case:
    """One picture, to the keypoints of the last layer.

    What is compared are the values of each output in ascending order: instances whose scores are equal to
    rounding stand in any order.
    """

    def build(device: torch.device) -> Job:
        model, peer = pose_contestants(device)
        x = pictures((1, 3, height, width), device)
        mask = torch.zeros(1, height, width, dtype=torch.bool, device=device)
        ours = torch.inference_mode()(lambda: model(x))
        theirs = torch.inference_mode()(lambda: peer(x, mask)[-1])

        def results(run: Callable[[], Any], *keys: Any) -> Callable[[], Tensor]:
            return lambda: torch.cat([run()[key].flatten(2).sort(1).values for key in keys], -1)

        name = f"group_pose_r50, {width}x{height}"
        return Job(name, ours, theirs, results(ours, "logits", "keypoints"), results(theirs, 0, 1))

    return Case(f"group_pose_r50, {width}x{height} pixels", build, target, items=1, rounds=rounds)


def beside_mmdet() -> tuple[Case, ...]:
    """None where mmdet is not installed."""
    if find_spec("mmdet") is None:
        return ()
    from domains.detection.openmmlab.bench import CASES

    return CASES


SUITE = Suite(
    (
        *DEFORMABLE.cases,
        inference(480, 640, target=1.25),
        inference(800, 1333, rounds=3),
        matching(8, 7),
        matching(8, 30),
        training(2, 480, 640),
        pose_inference(480, 640, target=1.5, rounds=5),
        *beside_mmdet(),
    )
)
