"""Object detection and multi-person pose."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.detection import models as models
from zoo.registry import Domain, register_domain

EXAMPLE_SIZE = (480, 640)
"""Height and width of the image that operations are counted for."""


def example_inputs(**_: object) -> tuple[Tensor]:
    """One image `[1, 3, 480, 640]`."""
    return (torch.zeros(1, 3, *EXAMPLE_SIZE),)


register_domain(
    Domain(
        name="detection",
        summary="Object detection and multi-person pose",
        task="domains.detection.task:DetectionTask",
        data="domains.detection.data:DetectionData",
        predict="domains.detection.predict:predict",
        judge="domains.detection.judge:judge",
        detect="domains.detection.weights.detect:detect",
        example_inputs="domains.detection:example_inputs",
    )
)
