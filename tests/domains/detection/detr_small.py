"""A Group DETR small enough for tests, with weights that let every part have an effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import zoo
from domains.detection.models.group_detr import GroupDETR

FROZEN = {"norm": "frozen", "frozen_stages": 0}


def small_detr(**options: Any) -> GroupDETR:
    given = {"num_classes": 5, "num_queries": 4, "groups": 3, "embed_dim": 32, "backbone_options": FROZEN}
    model = zoo.create_model("detection/group_detr_mini", **(given | options))
    assert isinstance(model, GroupDETR)
    return lively(model).eval()


def lively(model: Any) -> Any:
    """Heads that start at zero give boxes that nothing but the reference points decides."""
    for name, parameter in model.named_parameters():
        if "bbox_embed" in name or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(3, *size) for size in sizes]


def targets(*counts: int, classes: int = 5) -> list[dict[str, Tensor]]:
    return [
        {
            "labels": torch.randint(classes, (count,)),
            "boxes": torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.3 * torch.rand(count, 2)], 1),
        }
        for count in counts
    ]
