"""Traffic forecasting on networks of road sensors."""

from __future__ import annotations

import torch
from torch import Tensor

from domains.traffic import models as models
from zoo.registry import Domain, register_domain


def example_inputs(
    *, num_nodes: int, history: int, horizon: int, in_channels: int = 1, **_: object
) -> tuple[Tensor, Tensor]:
    """One window for a model built with these arguments: readings `[1, P, N(, C)]` and time `[1, P+Q, 2]`."""
    channels = (in_channels,) if in_channels > 1 else ()
    time = torch.zeros(1, history + horizon, 2, dtype=torch.int64)
    return torch.zeros(1, history, num_nodes, *channels), time


register_domain(
    Domain(
        name="traffic",
        summary="Traffic forecasting on networks of road sensors",
        task="domains.traffic.task:TrafficTask",
        data="domains.traffic.data:TrafficData",
        predict="domains.traffic.predict:predict",
        bench="domains.traffic.bench:bench",
        example_inputs="domains.traffic:example_inputs",
        example_sizes={"num_nodes": 207},
    )
)
