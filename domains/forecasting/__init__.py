"""Probabilistic forecasting of time series, with covariates and related series."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.forecasting import hardware as hardware
from domains.forecasting import models as models
from domains.forecasting import ranking as ranking
from zoo.registry import Domain, register_domain


def example_inputs(*, context_length: int = 512, **_: object) -> tuple[Tensor]:
    """One series of 512 steps, or of the context where that is shorter."""
    return (torch.zeros(1, min(context_length, 512)),)


register_domain(
    Domain(
        name="forecasting",
        summary="Probabilistic forecasting of time series, with covariates and related series",
        task="domains.forecasting.task:ForecastTask",
        data="domains.forecasting.data:ForecastData",
        predict="domains.forecasting.predict:predict",
        example_inputs="domains.forecasting:example_inputs",
    )
)
