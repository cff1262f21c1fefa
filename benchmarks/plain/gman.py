"""GMAN (Zheng et al., AAAI 2020) in the plain layout: the peer of `zoo bench domain=traffic`.

The same function as `domains.traffic.models.gman`, laid out the way the original program spends memory and
time: every query, key and value is a product of its own, the heads are chunks of the channels concatenated
along the batch axis, the N x N scores are kept for the backward pass, the time of day enters as a one-hot
vector of 7 + steps_per_day columns, and every activated layer has a standard batch norm. Dense layers act on
the last axis (the original's 1 x 1 convolutions, in the form that PyTorch runs fastest on a CPU).

Shapes: B batch, T steps, N sensors, D = num_heads * head_dim channels, P history, Q horizon.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -32767.0
"""What the original program writes over the scores of later steps."""


class Dense(nn.Module):
    """Linear layer; an activated one is followed by batch norm over all axes but the last, then ReLU."""

    def __init__(self, inputs: int, outputs: int, *, activated: bool, bias: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.norm = nn.BatchNorm1d(outputs, eps=1e-3) if activated else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y if self.norm is None else F.relu(self.norm(y.flatten(0, -2)).view_as(y))


def two_layers(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """The original's pair of layers: activated, then linear."""
    return nn.Sequential(Dense(inputs, width, activated=True), Dense(width, outputs, activated=False))


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[B, ..., D]` to `[num_heads * B, ..., D / num_heads]`."""
    return torch.cat(x.chunk(num_heads, dim=-1), dim=0)


def join_heads(x: Tensor, num_heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    return torch.cat(x.chunk(num_heads, dim=0), dim=-1)


class Attention(nn.Module):
    """Attention along axis 1 or 2 of `[B, T, N, D]` by explicit scores; its three inputs have any width."""

    def __init__(self, query: int, key: int, value: int, num_heads: int, head_dim: int, *, axis: int) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads, self.scale, self.axis = num_heads, head_dim**-0.5, axis
        self.query = Dense(query, width, activated=True)
        self.key = Dense(key, width, activated=True)
        self.value = Dense(value, width, activated=True)
        self.out = two_layers(width, width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool = False) -> Tensor:
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        scores = q @ k.transpose(-1, -2) * self.scale
        if causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = torch.where(later, MASKED, scores)
        context = scores.softmax(-1) @ v
        return self.out(join_heads(context.transpose(2, self.axis), self.num_heads))

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads).transpose(2, self.axis)


class GatedFusion(nn.Module):
    """z * spatial + (1 - z) * temporal with a learnt gate z, then two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = Dense(width, width, activated=False, bias=False)
        self.temporal = Dense(width, width, activated=False)
        self.out = two_layers(width, width, width)

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        gate = torch.sigmoid(self.spatial(spatial) + self.temporal(temporal))
        return self.out(gate * spatial + (1 - gate) * temporal)


class Block(nn.Module):
    """Spatial and temporal attention side by side, fused by the gate, with a residual."""

    def __init__(self, num_heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.causal = causal
        self.spatial = Attention(2 * width, 2 * width, 2 * width, num_heads, head_dim, axis=2)
        self.temporal = Attention(2 * width, 2 * width, 2 * width, num_heads, head_dim, axis=1)
        self.fusion = GatedFusion(width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        z = torch.cat([hidden, embedding], dim=-1)
        return hidden + self.fusion(self.spatial(z, z, z), self.temporal(z, z, z, causal=self.causal))


class PlainGMAN(nn.Module):
    """The whole network; layers are registered in the order in which the original program creates them.

    Args:
        spatial_embedding: `[N, D]`, a constant of the network.
        causal: mask later steps in the temporal attention (the METR-LA program).
        dropout: before each of the two output layers (0.1 in the METR-LA program).
    """

    spatial_embedding: Tensor

    def __init__(
        self,
        spatial_embedding: Tensor,
        *,
        num_layers: int = 1,
        num_heads: int = 8,
        head_dim: int = 8,
        history: int = 12,
        steps_per_day: int = 288,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.history, self.steps_per_day = history, steps_per_day
        self.register_buffer("spatial_embedding", spatial_embedding)
        self.input = two_layers(1, width, width)
        self.space = two_layers(width, width, width)
        self.time = two_layers(7 + steps_per_day, width, width)
        self.encoder = nn.ModuleList(Block(num_heads, head_dim, causal) for _ in range(num_layers))
        self.transform = Attention(width, width, width, num_heads, head_dim, axis=1)
        self.decoder = nn.ModuleList(Block(num_heads, head_dim, causal) for _ in range(num_layers))
        self.output = two_layers(width, width, 1)
        self.dropout = dropout

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scaled x `[B, P, N]`, time `[B, P + Q, 2]` (weekday, slot of day) -> forecast `[B, Q, N]`."""
        past, future = self.embed(time).split([self.history, time.shape[1] - self.history], dim=1)
        hidden = self.input(x.unsqueeze(-1))
        for block in self.encoder:
            hidden = block(hidden, past)
        hidden = self.transform(future, past, hidden)
        for block in self.decoder:
            hidden = block(hidden, future)
        for layer in self.output:
            hidden = layer(F.dropout(hidden, self.dropout, self.training))
        return hidden.squeeze(-1)

    def embed(self, time: Tensor) -> Tensor:
        """The spatio-temporal embedding `[B, P + Q, N, D]`."""
        weekday, slot = time.unbind(-1)
        one_hot = torch.cat([F.one_hot(weekday, 7), F.one_hot(slot, self.steps_per_day)], dim=-1)
        when = one_hot.unsqueeze(2).to(self.spatial_embedding.dtype)
        return self.space(self.spatial_embedding[None, None]) + self.time(when)

    def load_official(self, state: dict[str, Tensor]) -> None:
        """Copy weights under the original program's names: three counters that run in order of creation."""
        names = {kind: _counted(kind) for kind in ("kernel", "bias", "gamma", "beta", "moments")}
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, Dense):
                    _load_dense(layer, state, names)


def _counted(name: str) -> itertools.chain[str]:
    return itertools.chain([name], (f"{name}_{i}" for i in itertools.count(1)))


def _load_dense(layer: Dense, state: dict[str, Tensor], names: dict[str, itertools.chain[str]]) -> None:
    layer.linear.weight.copy_(state[next(names["kernel"])][0, 0].T)
    if layer.linear.bias is not None:
        layer.linear.bias.copy_(state[next(names["bias"])])
    if layer.norm is not None:
        moments = next(names["moments"])
        arrays = {
            "weight": state[next(names["gamma"])],
            "bias": state[next(names["beta"])],
            "running_mean": state[f"{moments}/Squeeze/ExponentialMovingAverage"],
            "running_var": state[f"{moments}/Squeeze_1/ExponentialMovingAverage"],
        }
        layer.norm.load_state_dict(arrays, strict=False)
