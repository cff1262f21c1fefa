"""The spatio-temporal embedding of GMAN, and layers that read it.

Shapes: B windows, S steps, N sensors, D channels.

The embedding of sensor n at step t is a sum `space[n] + time[t]`, and so is every linear map of it: nothing
of size `[B, S, N, D]` is ever formed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.layers.norm import BatchNorm, Moments, NormLinear, local_covariance, pooled


class Embedding(NamedTuple):
    """The spatio-temporal embedding, `space[n] + time[b, t]`."""

    space: Tensor
    """`[N, D]`"""
    time: Tensor
    """`[B, S, D]`"""

    def steps(self, start: int, stop: int | None) -> Embedding:
        return Embedding(self.space, self.time[:, start:stop])

    def full(self) -> Tensor:
        """`[B, S, N, D]`, for inspection."""
        return self.space + self.time[:, :, None]

    def moments(self, h: Tensor | None = None) -> Moments:
        """Mean and covariance over all (b, t, n) of the embedding, or of `[h, embedding]` for h `[B, S, N,
        D]`.

        Space and time vary independently over the rows, so their covariances add.
        """
        space, time = local_covariance(self.space), local_covariance(self.time)
        mean, cov = space.mean + time.mean, space.second + time.second
        count = self.space.shape[0] * self.time.shape[0] * self.time.shape[1]
        if h is not None:
            own = local_covariance(h)
            cross = self._cross_covariance(h.float(), space.mean, time.mean)
            mean = torch.cat([own.mean, mean])
            cov = torch.cat([torch.cat([own.second, cross], 1), torch.cat([cross.T, cov], 1)])
        return pooled(Moments(mean, cov, count))

    def _cross_covariance(self, h: Tensor, space_mean: Tensor, time_mean: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            by_sensor = h.mean((0, 1)).T @ (self.space.float() - space_mean) / self.space.shape[0]
            by_step = h.mean(2).flatten(0, 1).T @ (self.time.float() - time_mean).flatten(0, 1)
            return by_sensor + by_step / (self.time.shape[0] * self.time.shape[1])


class EmbeddingLinear(NormLinear):
    """A `NormLinear` of `[h, embedding]`, or of the embedding alone, that never forms its input."""

    def forward(
        self, h: Tensor | None, embedding: Embedding, moments: Moments | None, *, by_sensor: bool
    ) -> Tensor:
        """h `[B, S, N, D]` or None -> `[B, S, N, out]`; `by_sensor`: `[B, N, S, D] -> [B, N, S, out]`.

        `moments` are those of the input (`Embedding.moments`), needed while training.
        """
        weight, bias = self.folded(moments if self.normalises_by_batch else None)
        weight_e = weight[:, -embedding.space.shape[1] :]
        space = F.linear(embedding.space, weight_e)
        time = F.linear(embedding.time, weight_e, bias)
        space, time = (space[:, None], time[:, None]) if by_sensor else (space, time[:, :, None])
        if h is None:
            return (space + time).relu_()
        return F.linear(h, weight[:, : h.shape[-1]]).add_(space).add_(time).relu_()


class Program(NamedTuple):
    """How one of the two published programs builds its layers."""

    norm: Callable[[int], BatchNorm] | None
    port: bool

    def dense(self, in_features: int, out_features: int, *, relu: bool, bias: bool = True) -> NormLinear:
        """The original normalises only before a ReLU, the port always."""
        norm = self.norm if relu or self.port else None
        return NormLinear(in_features, out_features, relu=relu, bias=bias, norm=norm)

    def attention_output(self, dim: int) -> nn.Module:
        """What follows the heads: two layers in the original, the first of them in the port."""
        first = self.dense(dim, dim, relu=True)
        return first if self.port else nn.Sequential(first, self.dense(dim, dim, relu=False))


class TimeLinear(NormLinear):
    """A `NormLinear` of the concatenated one-hot codes of weekday (7) and slot of day, as a table look-up."""

    def forward(self, time: Tensor) -> Tensor:
        """int64 `[..., 2]` (weekday 0 = Monday, slot) `-> [..., out]`"""
        weekday, slot = time.unbind(-1)
        table = self.weight.T
        y = F.embedding(weekday, table) + F.embedding(slot + 7, table)
        y = y if self.bias is None else y + self.bias
        return (y if self.norm is None else self.norm(y)).relu()


class SpatioTemporalEmbedding(nn.Module):
    """Embeds the sensors, from a constant table, and the times of the week."""

    spatial_embedding: Tensor

    def __init__(
        self, num_nodes: int, dim: int, steps_per_day: int, program: Program, smooth_time: bool
    ) -> None:
        super().__init__()
        self.register_buffer("spatial_embedding", torch.randn(num_nodes, dim))
        self.space = nn.Sequential(program.dense(dim, dim, relu=True), program.dense(dim, dim, relu=False))
        slots = TimeLinear(7 + steps_per_day, dim, norm=program.norm)
        self.time = nn.Sequential(slots, program.dense(dim, dim, relu=False))
        if smooth_time:
            with torch.no_grad():
                slots.weight[:, 7:] = daily_waves(dim, steps_per_day)

    def forward(self, time: Tensor) -> Embedding:
        """time int64 `[B, S, 2]`"""
        return Embedding(self.space(self.spatial_embedding), self.time(time))


def daily_waves(dim: int, steps_per_day: int) -> Tensor:
    """`[dim, steps_per_day]`: sines of the time of day, each frequency in four phases.

    Frequencies rise geometrically from once a day to once in six steps. Of opposite phases one passes where a
    ReLU cuts the other off.
    """
    wave = torch.arange(dim)
    level = (wave // 4) / max(1, (dim - 1) // 4)
    frequency = (max(1.0, steps_per_day / 6) ** level).round()
    day = torch.arange(steps_per_day) / steps_per_day
    return torch.sin(2 * torch.pi * (frequency[:, None] * day + (wave % 4)[:, None] / 4))
