"""Group DETR: predictions, activations, matches, losses, gradients and what is left after post-processing."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor

import zoo
from domains.detection.losses import Focal, box_terms
from domains.detection.matching import Matcher, SetLoss, stack
from domains.detection.models.detector import Detections, Outputs, layers
from domains.detection.models.group_detr import GroupDETR
from domains.detection.weights.group_detr import GroupDETROfficial
from parity.adapters.detection.ranking import in_order_of
from parity.fixture import Fixture, official_gradients


def group_detr(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = fixture.spec["config"]
    known = inspect.signature(GroupDETROfficial.config).parameters
    options = {name: value for name, value in config.items() if name in known}
    model = zoo.from_official("group_detr_r50", fixture.state_dict(), **options)
    assert isinstance(model, GroupDETR)
    images, mask = fixture.inputs("image", "padding_mask")
    targets = _targets(fixture, len(images))
    terms = box_terms(
        config["bbox_loss_coef"],
        config["giou_loss_coef"],
        cost_l1=config["set_cost_bbox"],
        cost_giou=config["set_cost_giou"],
    )
    loss = SetLoss(terms, Focal(config["cls_loss_coef"], config["set_cost_class"], config["focal_alpha"]))
    out = _evaluation(fixture, model, images, mask.bool())
    out |= _losses(fixture, model, loss, images, mask.bool(), targets)
    return out, {}


def _targets(fixture: Fixture, count: int) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": fixture.tensors[f"input/target_boxes_{i}"],
            "labels": fixture.tensors[f"input/target_labels_{i}"].long(),
        }
        for i in range(count)
    ]


def _step(fixture: Fixture, pattern: str) -> int:
    """The step of a subsampled axis, from the description of the outputs."""
    found = re.search(pattern + r"\s?\[::(\d+)\]", fixture.spec["outputs"])
    return 1 if found is None else int(found[1])


def _evaluation(fixture: Fixture, model: GroupDETR, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: tuple, result: Any) -> None:
            kept[name] = result[-1] if isinstance(result, list) else result

        return hook

    decoder: Any = model.decoder
    handles = [
        model.backbone.register_forward_hook(keep("backbone_last")),
        model.encoder[0].register_forward_hook(keep("encoder_layer0")),
        model.encoder[-1].register_forward_hook(keep("memory")),
        decoder.layers[0].register_forward_hook(keep("decoder_layer0")),
    ]
    with torch.no_grad():
        outputs = model(images, mask, auxiliary=True)
        plain = model(images, mask)
    for handle in handles:
        handle.remove()
    assert not plain["auxiliary"]
    assert torch.equal(plain["boxes"], outputs["boxes"])
    queries = _step(fixture, r"decoder_layer0 is \(queries")
    return {
        "output/backbone_last": kept["backbone_last"][:, :: _step(fixture, "backbone_last: channels")],
        "output/encoder_layer0": kept["encoder_layer0"].transpose(0, 1),
        "output/memory": kept["memory"].transpose(0, 1),
        "output/decoder_layer0": kept["decoder_layer0"].transpose(0, 1)[::queries],
        "output/pred_logits": outputs["logits"][:, :: _step(fixture, "pred_logits queries")],
        "output/pred_boxes": outputs["boxes"],
        "output/aux0_pred_boxes": outputs["auxiliary"][0]["boxes"],
        **in_order_of(fixture.tensors, _post(model.postprocess(outputs, fixture.spec["sizes"]))),
    }


def _post(found: list[Detections]) -> dict[str, Tensor]:
    return {
        "output/post_scores": torch.stack([image["scores"] for image in found]),
        "output/post_labels": torch.stack([image["labels"] for image in found]),
        "output/post_boxes": torch.stack([image["boxes"] for image in found]),
    }


def _losses(
    fixture: Fixture, model: GroupDETR, loss: SetLoss, images: Tensor, mask: Tensor, targets: Any
) -> dict[str, Tensor]:
    with torch.no_grad():
        evaluated: Outputs = model(images, mask, auxiliary=True)
        out = {"loss/eval_total": loss(layers(evaluated), targets)[0]}
    model.train()
    outputs: Outputs = model(images, mask)
    total, parts = loss(layers(outputs), targets, model.active_groups)
    total.backward()
    out |= {"loss/total": total, **{f"loss/{name}": value for name, value in parts.items()}}
    step = _step(fixture, r"train_\*: training mode[^\[]*queries")
    out |= {"output/train_pred_logits": outputs["logits"][:, ::step]}
    out |= {"output/train_pred_boxes": outputs["boxes"][:, ::step]}
    out |= _matches(loss.matcher, outputs, targets, model.groups)
    out = {name: value.reshape(1) if name.startswith("loss/") else value for name, value in out.items()}
    out |= official_gradients(model)
    rows = _step(fixture, "query_embed rows")
    out["grad/query_embed.weight"] = out["grad/query_embed.weight"][::rows]
    return out


def _matches(matcher: Matcher, outputs: Outputs, targets: Any, groups: int) -> dict[str, Tensor]:
    """Of the final layer."""
    found = matcher(stack(layers(outputs)[-1:], ["logits", "boxes"]), targets, groups)
    return {
        f"output/match_{name}_{i}": indices[0, found.image == i]
        for i in range(len(targets))
        for name, indices in (("query", found.query), ("target", found.target))
    }


ADAPTERS = {"group_detr": group_detr}
