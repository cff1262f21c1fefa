"""Ranking the stocks of a day by the return that comes next."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.registry import Domain, register_domain


def example_inputs(*, num_features: int, window: int = 20, **_: object) -> tuple[Tensor]:
    """One stock on one day."""
    return (torch.zeros(1, 1, window, num_features),)


register_domain(
    Domain(
        name="forecasting/ranking",
        summary="Ranking the stocks of a day by the return that comes next",
        task="domains.forecasting.ranking.task:RankingTask",
        data="domains.forecasting.ranking.data:RankingData",
        predict="domains.forecasting.ranking.predict:predict",
        example_inputs="domains.forecasting.ranking:example_inputs",
        example_sizes={"num_features": 34},
    )
)
