"""GMAN: A Graph Multi-Attention Network for Traffic Prediction (Zheng, Fan, Wang, Qi; AAAI 2020).

Shapes: B windows, P steps of history, Q steps of horizon, S = P or Q, N sensors, K heads of width d, D = K d.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from domains.traffic.models.common import check_window
from domains.traffic.models.gman_embedding import (
    Embedding,
    EmbeddingLinear,
    Program,
    SpatioTemporalEmbedding,
)
from domains.traffic.weights import GMANOfficial, GMANPortOfficial
from zoo.attention import Causal, Groups, attend
from zoo.attention.layers import AttentionLayer, create_attention
from zoo.errors import ConfigError
from zoo.layers.norm import BatchNorm, Moments
from zoo.registry import register_model

if TYPE_CHECKING:
    from domains.traffic.graph import SensorGraph


class SpatialAttention(nn.Module):
    """Attention over the N sensors of one step."""

    def __init__(self, num_heads: int, head_dim: int, program: Program) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.qkv = EmbeddingLinear(2 * dim, 3 * dim, norm=program.norm)
        self.out = program.attention_output(dim)

    def forward(self, h: Tensor, embedding: Embedding, moments: Moments | None) -> Tensor:
        """`[B, S, N, D] -> [B, S, N, D]`"""
        qkv = self.qkv(h, embedding, moments, by_sensor=False)
        return self.out(self_attention(qkv, self.num_heads))


class GroupSpatialAttention(SpatialAttention):
    """Attention over the sensors of one group, then over the groups (paper, section "Group Spatial
    Attention").

    The groups are a random partition into near-equal parts, drawn once by `seed`. A group is represented by
    the maximum of its members' results, and what it gathers from the other groups is added to each of them.
    (The paper leaves open whether the two attentions share weights; here they do not.)
    """

    groups: Tensor
    members: Tensor

    def __init__(
        self, num_heads: int, head_dim: int, program: Program, num_nodes: int, num_groups: int, seed: int
    ) -> None:
        super().__init__(num_heads, head_dim, program)
        self.group_qkv = program.dense(num_heads * head_dim, 3 * num_heads * head_dim, relu=True)
        generator = torch.Generator("cpu").manual_seed(seed)
        groups = torch.randperm(num_nodes, generator=generator, device="cpu") % num_groups
        self.pattern = Groups(groups)
        self.register_buffer("groups", groups, persistent=False)
        self.register_buffer("members", _members(groups), persistent=False)

    def forward(self, h: Tensor, embedding: Embedding, moments: Moments | None) -> Tensor:
        """`[B, S, N, D] -> [B, S, N, D]`"""
        qkv = self.qkv(h, embedding, moments, by_sensor=False)
        local = self_attention(qkv, self.num_heads, self.pattern)
        pooled = local[:, :, self.members].amax(3)
        between = self_attention(self.group_qkv(pooled), self.num_heads)
        return self.out(local + between[:, :, self.groups])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupSpatialAttention:
        """Moves to another device; the pattern's plan follows the buffers."""
        super()._apply(fn, recurse)
        if self.groups.device != self.pattern.ids.device:
            self.pattern = Groups(self.groups)
        return self


def _members(groups: Tensor) -> Tensor:
    """`[G, M]` sensors of each group, the short rows filled up with one of their own."""
    rows = [(groups == g).nonzero()[:, 0] for g in range(int(groups.max()) + 1)]
    width = max(len(row) for row in rows)
    return torch.stack([torch.cat([row, row[:1].expand(width - len(row))]) for row in rows])


class TemporalAttention(nn.Module):
    """Attention over the S steps of one sensor."""

    def __init__(self, num_heads: int, head_dim: int, program: Program, causal: bool) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.causal = causal
        self.qkv = EmbeddingLinear(2 * dim, 3 * dim, norm=program.norm)
        self.out = program.attention_output(dim)

    def forward(self, h: Tensor, embedding: Embedding, moments: Moments | None) -> Tensor:
        """`[B, S, N, D] -> [B, S, N, D]`"""
        h = h.transpose(1, 2).contiguous()
        qkv = self.qkv(h, embedding, moments, by_sensor=True)
        out = self.out(self_attention(qkv, self.num_heads, Causal() if self.causal else None))
        return out.transpose(1, 2)


class LayerAttention(nn.Module):
    """Any layer of the zoo over the N sensors of one step, or over the S steps of one sensor."""

    def __init__(self, layer: AttentionLayer, program: Program, *, by_sensor: bool) -> None:
        super().__init__()
        self.by_sensor = by_sensor
        self.qkv = EmbeddingLinear(2 * layer.dim, layer.dim, norm=program.norm)
        self.layer = layer
        self.out = program.attention_output(layer.dim)

    def forward(self, h: Tensor, embedding: Embedding, moments: Moments | None) -> Tensor:
        """`[B, S, N, D] -> [B, S, N, D]`"""
        h = h.transpose(1, 2).contiguous() if self.by_sensor else h
        tokens = self.qkv(h, embedding, moments, by_sensor=self.by_sensor)
        out = self.out(self.layer(tokens.flatten(0, 1)).view_as(tokens))
        return out.transpose(1, 2) if self.by_sensor else out


class GatedFusion(nn.Module):
    """`H_S` and `H_T` weighed against each other, element by element."""

    def __init__(self, dim: int, program: Program) -> None:
        super().__init__()
        self.gate_spatial = program.dense(dim, dim, relu=False, bias=False)
        self.gate_temporal = program.dense(dim, dim, relu=False)
        self.out = nn.Sequential(program.dense(dim, dim, relu=True), program.dense(dim, dim, relu=False))

    def forward(self, spatial: Tensor, temporal: Tensor) -> Tensor:
        """Both `[B, S, N, D]`."""
        gate = (self.gate_spatial(spatial) + self.gate_temporal(temporal)).sigmoid_()
        return self.out(torch.lerp(temporal, spatial, gate))


class Block(nn.Module):
    """Spatial and temporal attention side by side, fused, plus the residual."""

    def __init__(
        self,
        spatial: SpatialAttention | LayerAttention,
        temporal: TemporalAttention | LayerAttention,
        fusion: GatedFusion,
    ) -> None:
        super().__init__()
        self.spatial = spatial
        self.temporal = temporal
        self.fusion = fusion

    def forward(self, h: Tensor, embedding: Embedding) -> Tensor:
        """`[B, S, N, D] -> [B, S, N, D]`"""
        moments = embedding.moments(h) if self.spatial.qkv.normalises_by_batch else None
        return h + self.fusion(self.spatial(h, embedding, moments), self.temporal(h, embedding, moments))


class TransformAttention(nn.Module):
    """From P steps of history to Q steps ahead: each future step attends to the past steps of its sensor.

    The weights depend on the embedding alone, the values on the data alone.
    """

    def __init__(self, num_heads: int, head_dim: int, program: Program) -> None:
        super().__init__()
        dim = num_heads * head_dim
        self.num_heads = num_heads
        self.query = EmbeddingLinear(dim, dim, norm=program.norm)
        self.key = EmbeddingLinear(dim, dim, norm=program.norm)
        self.value = program.dense(dim, dim, relu=True)
        self.out = program.attention_output(dim)

    def forward(self, h: Tensor, past: Embedding, future: Embedding) -> Tensor:
        """`[B, P, N, D] -> [B, Q, N, D]`"""
        by_batch = self.query.normalises_by_batch
        query = self.query(None, future, future.moments() if by_batch else None, by_sensor=True)
        key = self.key(None, past, past.moments() if by_batch else None, by_sensor=True)
        value = self.value(h.transpose(1, 2).contiguous())
        query, key, value = (split_heads(t, self.num_heads) for t in (query, key, value))
        out = attend(query, key, value).transpose(1, 2).reshape(*h.shape[:1], h.shape[2], -1, h.shape[3])
        return self.out(out).transpose(1, 2)


def self_attention(qkv: Tensor, num_heads: int, pattern: Causal | Groups | None = None) -> Tensor:
    """`[A, B, L, 3 D] -> [A, B, L, D]`: each row of (A, B) attends over its L entries."""
    query, key, value = (split_heads(part, num_heads) for part in qkv.chunk(3, -1))
    out = attend(query, key, value, pattern=pattern)
    return out.transpose(1, 2).reshape(*qkv.shape[:3], -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """`[A, B, L, D] -> [A B, K, L, d]`, heads being contiguous slices of channels; a view."""
    return x.flatten(0, 1).unflatten(-1, (num_heads, -1)).transpose(1, 2)


class GMAN(nn.Module):
    """Graph multi-attention network: an encoder and a decoder of spatio-temporal attention blocks.

    The only graph information is the spatial embedding, a constant buffer: `bind` fills it, and it is saved
    with the weights. Until then it is random.

    Args:
        num_nodes: number of sensors N.
        history, horizon: steps P of input and Q of forecast.
        steps_per_day: time slots of a day.
        in_channels: channels of a reading.
        num_layers: blocks in the encoder, and in the decoder.
        num_heads, head_dim: K and d; the width is D = K d.
        causal: a step sees only itself and earlier steps in temporal attention.
        dropout: before each of the two output layers.
        norm: batch norm in the layers with an activation.
        norm_eps: added to its variances.
        norm_momentum: weight of the newest batch in its running statistics. (They start at mean 0, variance
            1, not at the 0, 0 of the original program, with which a first evaluation overflows.)
        norm_decay_epochs: epochs after which `norm_momentum` halves in training, see `set_norm_decay`; a
            short training needs less than the published 5.
        spatial_groups: attend over the sensors within this many random groups and between the groups instead
            of all to all, for large N; 0 for all to all, as both programs do.
        group_seed: draws the groups.
        attention: a layer of the zoo over the sensors in place of GMAN's own: a name, or a mapping with its
            name and arguments (`zoo list attention`). It reads `[h, embedding]`, projected to width D.
        temporal_attention: likewise over the steps, causal where `causal` says so.
        from_last: see the readings (first channel) also as changes since the last one, and forecast the
            change since the last one. GMAN itself knows how old a reading is by its time slot alone, which
            takes months of data to learn; neither program does this.
        smooth_time: start the embedding of the time slots from sines of the time of day, so that neighbouring
            slots are alike, not from random numbers; for data of weeks.
        variant: `"original"`, or `"port"` for the PyTorch port that the authors name: another function, see
            `gman_port`.

    Raises:
        ConfigError: the port with `num_heads != head_dim`, for which it is not defined; more groups than
            sensors, or groups for another attention.
        UnknownName, AttentionError: an attention that does not exist, or cannot do what is asked of it.
    """

    def __init__(
        self,
        num_nodes: int,
        *,
        history: int = 12,
        horizon: int = 12,
        steps_per_day: int = 288,
        in_channels: int = 1,
        num_layers: int = 1,
        num_heads: int = 8,
        head_dim: int = 8,
        causal: bool = False,
        dropout: float = 0.0,
        norm: bool = True,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.5,
        norm_decay_epochs: float = 5.0,
        spatial_groups: int = 0,
        group_seed: int = 0,
        attention: str | Mapping[str, Any] | None = None,
        temporal_attention: str | Mapping[str, Any] | None = None,
        from_last: bool = False,
        smooth_time: bool = False,
        variant: Literal["original", "port"] = "original",
    ) -> None:
        super().__init__()
        if variant == "port" and num_heads != head_dim:
            raise ConfigError(
                "The port of GMAN is defined for num_heads = head_dim only (it splits channels into slices "
                f"of num_heads); got {num_heads} and {head_dim}. Use variant=original."
            )
        if not 0 <= spatial_groups <= num_nodes:
            raise ConfigError(
                f"spatial_groups must lie in 0 .. {num_nodes}, the number of sensors, not {spatial_groups}."
            )
        if attention and spatial_groups:
            raise ConfigError("spatial_groups are groups of GMAN's own attention: leave out one of the two.")
        self.num_nodes = num_nodes
        self.history = history
        self.horizon = horizon
        self.variant = variant
        self.from_last = from_last
        unpublished = {
            "spatial_groups": spatial_groups,
            "attention": attention,
            "temporal_attention": temporal_attention,
            "from_last": from_last,
        }
        self.unpublished = [name for name, chosen in unpublished.items() if chosen]
        self.norm = norm
        self.norm_decay_epochs = norm_decay_epochs
        dim = num_heads * head_dim
        port = variant == "port"
        make_norm = partial(BatchNorm, eps=norm_eps, momentum=norm_momentum, unbiased=port)
        program = Program(make_norm if norm else None, port)

        def spatial() -> SpatialAttention | LayerAttention:
            if attention:
                layer = create_attention(attention, dim, num_heads=num_heads, causal=False)
                return LayerAttention(layer, program, by_sensor=False)
            if spatial_groups:
                return GroupSpatialAttention(
                    num_heads, head_dim, program, num_nodes, spatial_groups, group_seed
                )
            return SpatialAttention(num_heads, head_dim, program)

        def temporal() -> TemporalAttention | LayerAttention:
            if temporal_attention:
                layer = create_attention(temporal_attention, dim, num_heads=num_heads, causal=causal)
                return LayerAttention(layer, program, by_sensor=True)
            return TemporalAttention(num_heads, head_dim, program, causal)

        def block() -> Block:
            return Block(spatial(), temporal(), GatedFusion(dim, program))

        self.embedding = SpatioTemporalEmbedding(num_nodes, dim, steps_per_day, program, smooth_time)
        self.input = nn.Sequential(
            program.dense(in_channels + from_last, dim, relu=True), program.dense(dim, dim, relu=False)
        )
        self.encoder = nn.ModuleList(block() for _ in range(num_layers))
        self.transform = TransformAttention(num_heads, head_dim, program)
        self.decoder = nn.ModuleList(block() for _ in range(num_layers))
        self.output = nn.Sequential(
            nn.Dropout(dropout),
            program.dense(dim, dim, relu=True),
            nn.Dropout(dropout),
            program.dense(dim, 1, relu=False),
        )
        if from_last:  # start from the last reading itself
            nn.init.zeros_(self.output[-1].weight)  # type: ignore[union-attr]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scaled readings x `[B, P, N(, C)]`, time int64 `[B, P+Q, 2]` (weekday, slot) -> `[B, Q, N]`."""
        x = x[..., None] if x.ndim == 3 else x
        check_window(self, x, time)
        embedding = self.embedding(time)
        past, future = embedding.steps(0, self.history), embedding.steps(self.history, None)
        last = x[:, -1:, :, :1]
        h = self.input(torch.cat([x, x[..., :1] - last], -1) if self.from_last else x)
        for block in self.encoder:
            h = block(h, past)
        h = self.transform(h, past, future)
        for block in self.decoder:
            h = block(h, future)
        forecast = self.output(h)
        return (forecast + last if self.from_last else forecast).squeeze(-1)

    def bind(self, graph: SensorGraph) -> None:
        """Take the spatial embedding of a sensor graph."""
        table = self.embedding.spatial_embedding
        table.copy_(graph.spatial_embedding(table.shape[1]).to(table))

    def set_norm_decay(self, step: int, period: int) -> None:
        """Set the decay of the running statistics as the original program does before each training step.

        `min(0.99, 1 - 0.5 * 0.5 ** floor(step / period))`; the published `period` is the number of batches in
        5 epochs. The port keeps its constant momentum.
        """
        if self.variant == "port":
            return
        decay = min(0.99, 1 - 0.5 * 0.5 ** (step // period))
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.momentum.fill_(1 - decay)


PAPER = "Zheng et al., GMAN: A Graph Multi-Attention Network for Traffic Prediction, AAAI 2020"
"""Of all variants."""

_register = partial(
    register_model,
    model=GMAN,
    paper=PAPER,
    licence="Apache-2.0",
    source="https://github.com/zhengchuanpan/GMAN",
    status="official parity",
    official=GMANOfficial,
    preprocessing={"scaling": "z-score by the mean and std of the training windows", "missing": "zero"},
)


@_register(summary="GMAN as its PEMS-BAY program: one block each way, no temporal mask")
def gman(num_nodes: int, **kwargs) -> GMAN:
    return GMAN(num_nodes, **kwargs)


@_register(summary="GMAN as its METR-LA program: five blocks each way, causal, dropout at the output")
def gman_metr_la(
    num_nodes: int, *, num_layers: int = 5, causal: bool = True, dropout: float = 0.1, **kwargs
) -> GMAN:
    return GMAN(num_nodes, num_layers=num_layers, causal=causal, dropout=dropout, **kwargs)


@_register(summary="GMAN as the paper describes it: three blocks each way, causal")
def gman_paper(num_nodes: int, *, num_layers: int = 3, causal: bool = True, **kwargs) -> GMAN:
    return GMAN(num_nodes, num_layers=num_layers, causal=causal, **kwargs)


@_register(
    summary="The PyTorch port of GMAN: batch norm in every layer, one layer after each attention, no mask",
    licence="none stated",
    source="https://github.com/VincLee8188/GMAN-PyTorch",
    official=GMANPortOfficial,
)
def gman_port(
    num_nodes: int,
    *,
    variant: Literal["original", "port"] = "port",
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    **kwargs,
) -> GMAN:
    return GMAN(num_nodes, variant=variant, norm_eps=norm_eps, norm_momentum=norm_momentum, **kwargs)
