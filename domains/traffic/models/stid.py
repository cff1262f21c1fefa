"""STID: Spatial-Temporal Identity (Shao et al.; CIKM 2022): an MLP that knows which sensor and what time it
is.

Shapes: B windows, P steps of history, Q of horizon, N sensors, C channels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from domains.traffic.models.common import check_window
from zoo.registry import register_model


class ResidualMLP(nn.Module):
    """Two linear layers around a ReLU, plus the input."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width] -> [..., width]`"""
        return x + self.layers(x)


class STID(nn.Module):
    """Readings, sensor, time of day and day of week, each embedded, through residual MLPs, per sensor.

    Args:
        num_nodes: number of sensors N.
        history, horizon: steps P of input and Q of forecast.
        steps_per_day: time slots of a day.
        in_channels: channels of a reading.
        value_dim, node_dim, slot_dim, day_dim: widths of the four embeddings; 0 leaves one of the last three
            out.
        num_layers: residual blocks.
        dropout: inside them.
        add_last: forecast the difference to the last reading (first channel), which helps when data are few.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        history: int = 12,
        horizon: int = 12,
        steps_per_day: int = 288,
        in_channels: int = 1,
        value_dim: int = 32,
        node_dim: int = 32,
        slot_dim: int = 32,
        day_dim: int = 32,
        num_layers: int = 3,
        dropout: float = 0.15,
        add_last: bool = False,
    ) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        self.history = history
        self.horizon = horizon
        self.add_last = add_last
        self.value = nn.Linear(history * in_channels, value_dim)
        self.node = nn.Parameter(torch.empty(num_nodes, node_dim))
        self.slot = nn.Parameter(torch.empty(steps_per_day, slot_dim))
        self.day = nn.Parameter(torch.empty(7, day_dim))
        width = value_dim + node_dim + slot_dim + day_dim
        self.blocks = nn.Sequential(*(ResidualMLP(width, dropout) for _ in range(num_layers)))
        self.head = nn.Linear(width, horizon)
        for table in (self.node, self.slot, self.day):
            if table.numel():
                nn.init.xavier_uniform_(table)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scaled readings x `[B, P, N(, C)]`, time int64 `[B, P+Q, 2]` (weekday, slot) -> `[B, Q, N]`."""
        x = x[..., None] if x.ndim == 3 else x
        check_window(self, x, time)
        weekday, slot = time[:, self.history - 1, None].unbind(-1)
        identities = (self.node[None], self.slot[slot], self.day[weekday])
        value = self.value(x.transpose(1, 2).flatten(2))
        code = torch.cat([value, *(e.expand(*value.shape[:2], -1) for e in identities)], -1)
        forecast = self.head(self.blocks(code)).transpose(1, 2)
        return forecast + x[:, -1:, :, 0] if self.add_last else forecast


_register = partial(
    register_model,
    model=STID,
    paper="Shao et al., Spatial-Temporal Identity: A Simple yet Effective Baseline for Multivariate Time "
    "Series Forecasting, CIKM 2022",
    licence="not verified",
    source="https://github.com/GestaltCogTeam/STID",
    status="re-implementation",
    preprocessing={"scaling": "z-score by the mean and std of the training windows", "missing": "zero"},
)


@_register(summary="MLP with identity embeddings of sensor and time: the cheap baseline to compare with")
def stid(num_nodes: int, **kwargs) -> STID:
    return STID(num_nodes, **kwargs)
