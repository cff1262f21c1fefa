"""Group Pose: predictions, activations, matches, losses, gradients and what is left after post-processing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import zoo
from domains.detection.keypoints import VISIBILITY, PoseLoss, default_skeleton
from domains.detection.losses import Focal
from domains.detection.matching import stack
from domains.detection.models.group_pose import GroupPose, PoseOutputs
from domains.detection.weights.group_pose import GroupPoseOfficial
from parity.adapters.detection.ranking import in_order_of
from parity.fixture import Fixture, official_gradients


def group_pose(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    known = inspect.signature(GroupPoseOfficial.config).parameters
    options = {name: value for name, value in config.items() if name in known}
    model = zoo.from_official("group_pose_r50", fixture.state_dict(), **options)
    assert isinstance(model, GroupPose)
    images, mask = fixture.inputs("image", "padding_mask")
    loss = PoseLoss(
        default_skeleton(model.num_keypoints),
        Focal(config["cls_loss_coef"], config["set_cost_class"], config["focal_alpha"]),
        l1=config["keypoints_loss_coef"],
        similarity=config["oks_loss_coef"],
        cost_l1=config["set_cost_keypoints"],
        cost_similarity=config["set_cost_oks"],
    )
    targets = [_target(fixture, i, model.num_keypoints) for i in range(len(images))]
    out = _evaluation(fixture, model, images, mask.bool())
    return out | _training(model, loss, images, mask.bool(), targets), {}


def _target(fixture: Fixture, image: int, count: int) -> dict[str, Tensor]:
    flat = fixture.tensors[f"input/target_keypoints_{image}"]
    return {
        "labels": torch.ones(len(flat), dtype=torch.long),
        "keypoints": flat[:, : 2 * count].unflatten(1, (count, 2)),
        "visible": flat[:, 2 * count :],
        "area": fixture.tensors[f"input/target_area_{image}"],
    }


def _every(full: Tensor, axis: int, expected: Tensor) -> Tensor:
    """Every n-th entry of an axis, so that as many are left as are expected."""
    step = -(-full.shape[axis] // expected.shape[axis])
    return full[(slice(None),) * axis + (slice(None, None, step),)]


def _evaluation(fixture: Fixture, model: GroupPose, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple, result: Tensor) -> None:
            kept[name] = result

        return hook

    def keep_references(_module: torch.nn.Module, args: tuple) -> None:
        kept["references"] = args[2]

    layers: list[Any] = list(model.decoder)
    handles = [
        model.encoder[0].register_forward_hook(keep("encoder_layer0")),
        model.encoder[-1].register_forward_hook(keep("memory")),
        model.enc_class_embed.register_forward_hook(keep("proposals")),
        layers[0].register_forward_hook(keep("decoder_layer0")),
        layers[0].cross_attn.output_proj.register_forward_hook(keep("cross_attn")),
        layers[1].register_forward_pre_hook(keep_references),
    ]
    with torch.no_grad():
        outputs = model(images, mask, auxiliary=True)
        plain = model(images, mask)
    for handle in handles:
        handle.remove()
    assert not plain["auxiliary"]
    assert torch.equal(plain["keypoints"], outputs["keypoints"])
    valid = torch.stack([(~mask[:, 0]).float().mean(1), (~mask[:, :, 0]).float().mean(1)], -1)
    scores = kept["proposals"].amax(-1)
    tokens = kept["decoder_layer0"]
    start = outputs["proposals"]["keypoints"]
    expected = {name.removeprefix("output/"): value for name, value in fixture.tensors.items()}
    out = {
        "encoder_layer0": _every(kept["encoder_layer0"], 1, expected["encoder_layer0"]),
        "memory": _every(kept["memory"], 1, expected["memory"]),
        "proposal_scores": scores,
        "topk_index": scores.topk(model.num_queries, dim=1).indices,
        "decoder_layer0": _every(tokens.transpose(0, 1), 0, expected["decoder_layer0"]),
        "decoder_layer0_cross_attn": _every(
            kept["cross_attn"].view_as(tokens), 1, expected["decoder_layer0_cross_attn"]
        ),
        "reference_points_0": torch.cat([start.mean(2, keepdim=True), start], 2).flatten(2),
        "reference_points_1": (kept["references"][:, :, 0] / valid[:, None]).unflatten(1, tokens.shape[1:3]),
        "interm_pred_logits": outputs["proposals"]["logits"],
        "interm_pred_keypoints": start.flatten(2),
    }
    out["reference_points_1"] = out["reference_points_1"].flatten(2)
    for prefix, prediction in (("", outputs), ("aux0_", outputs["auxiliary"][0])):
        out |= {
            f"{prefix}pred_logits": prediction["logits"],
            f"{prefix}pred_keypoints": _with_visibility(prediction["keypoints"]),
        }
    named = {f"output/{name}": value for name, value in out.items()}
    return named | in_order_of(fixture.tensors, _post(fixture, model, outputs))


def _with_visibility(keypoints: Tensor) -> Tensor:
    """`(..., K, 2)` to the official 3K numbers."""
    return torch.cat([keypoints.flatten(-2), torch.full_like(keypoints[..., 0], VISIBILITY)], -1)


def _post(fixture: Fixture, model: GroupPose, outputs: PoseOutputs) -> dict[str, Tensor]:
    k = fixture.tensors["output/post_scores"].shape[1]
    found = model.postprocess(outputs, fixture.spec["sizes"], k)
    triplets = [
        torch.cat([f["keypoints"], torch.full_like(f["keypoints"][..., :1], VISIBILITY)], -1) for f in found
    ]
    return {
        "output/post_scores": torch.stack([f["scores"] for f in found]),
        "output/post_labels": torch.stack([f["labels"] for f in found]),
        "output/post_keypoints": torch.stack(triplets).flatten(2),
    }


def _training(
    model: GroupPose, loss: PoseLoss, images: Tensor, mask: Tensor, targets: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    outputs = model(images, mask, auxiliary=True)
    total, parts = loss(outputs, targets)
    total.backward()
    final: Mapping[str, Any] = {name: outputs[name] for name in ("logits", "keypoints")}
    found = loss.losses.matcher(stack([final], ["logits", "keypoints"]), targets)
    matches = {
        f"output/match_{name}_{i}": indices[0, found.image == i]
        for i in range(len(targets))
        for name, indices in (("query", found.query), ("target", found.target))
    }
    named = {f"loss/{name}": part[None] for name, part in parts.items()}
    return matches | named | {"loss/total": total[None]} | official_gradients(model)


ADAPTERS = {"group_pose": group_pose}
