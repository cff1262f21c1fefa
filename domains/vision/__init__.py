"""Image classification and backbones for dense prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.vision import models as models
from domains.vision import timm_registry
from zoo.registry import Domain, register_domain


def example_inputs(*, in_chans: int = 3, img_size: int | tuple[int, int] = 224, **_: object) -> tuple[Tensor]:
    """One image `[1, C, H, W]` for a model built with these arguments."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    return (torch.zeros(1, in_chans, *size),)


register_domain(
    Domain(
        name="vision",
        summary="Image classification and backbones for dense prediction",
        task="domains.vision.task:VisionTask",
        data="domains.vision.data:VisionData",
        predict="domains.vision.predict:predict",
        explain="domains.vision.explain:explain",
        example_inputs="domains.vision:example_inputs",
    )
)
timm_registry.register()
