"""Single-image super-resolution: x2, x3 and x4 of pictures that were reduced by MATLAB's bicubic rule."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.superres import models as models
from zoo.registry import Domain, register_domain

EXAMPLE_SIZE = 64
"""Side of the low-resolution picture that operations are counted for."""


def example_inputs(**_: object) -> tuple[Tensor]:
    """One picture `[1, 3, 64, 64]`."""
    return (torch.zeros(1, 3, EXAMPLE_SIZE, EXAMPLE_SIZE),)


register_domain(
    Domain(
        name="superres",
        summary="Single-image super-resolution",
        task="domains.superres.task:SuperresTask",
        data="domains.superres.data:SuperresData",
        predict="domains.superres.predict:predict",
        verbs={"check": "domains.superres.seams:check"},
        detect="domains.superres.weights.detect:detect",
        example_inputs="domains.superres:example_inputs",
    )
)
