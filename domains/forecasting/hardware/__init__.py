"""Benchmark scores of computers from tables that describe their hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from zoo.registry import Domain, register_domain


def example_inputs(
    *, numeric: Mapping[str, int], text: Mapping[str, Sequence[int]], **_: object
) -> tuple[Tensor, Tensor]:
    """One row: the numbers of all groups, and the characters of all texts."""
    characters = sum(sum(lengths) for lengths in text.values())
    return torch.zeros(1, sum(numeric.values())), torch.zeros(1, characters, dtype=torch.long)


register_domain(
    Domain(
        name="forecasting/hardware",
        summary="Benchmark scores of computers from what describes them",
        task="domains.forecasting.hardware.task:HardwareTask",
        data="domains.forecasting.hardware.data:HardwareData",
        predict="domains.forecasting.hardware.predict:predict",
        example_inputs="domains.forecasting.hardware:example_inputs",
    )
)
