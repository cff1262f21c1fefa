"""ST-LINK: a language model whose rotary positions carry the sensor graph (CIKM 2025, arXiv 2509.13753).

A re-implementation from the paper's abstract and method outline; the official program was not available. What
the paper states: a spatial rotation of queries and keys inside attention (SE-Attention), and a feed-forward
layer that retrieves stored patterns (MRFFN). All numbers, and the way the two are built here, are choices of
ours.

Shapes: B windows, P steps of history, Q of horizon, N sensors, C channels, D width, H heads of width h.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domains.traffic.models.common import check_window
from domains.traffic.models.st_llm import SensorTokens
from domains.traffic.weights import llama_start
from zoo.attention import Causal, TopKSoftmax, attend, rotary
from zoo.errors import CheckpointError, ConfigError
from zoo.layers.freeze import freeze_blocks
from zoo.registry import register_model
from zoo.weights.checkpoint import load_state, read_state_dict

if TYPE_CHECKING:
    from domains.traffic.graph import SensorGraph


class SpatialRotaryAttention(nn.Module):
    """SE-Attention: the first `position_pairs` rotary pairs of a head turn with the place in the sequence,
    the others by angles that are linear in the graph's eigenvectors, so that scores depend on their
    difference.

    Args:
        width, num_heads, num_kv_heads: of the decoder.
        position_pairs: pairs that keep their rotation by position; `h / 2` makes it a plain Llama attention.
        num_eigenvectors: of the graph, per sensor.
        rope_theta: base of the rotation by position.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        position_pairs: int,
        num_eigenvectors: int,
        rope_theta: float,
    ) -> None:
        super().__init__()
        head_dim = width // num_heads
        self.widths = [width, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.head_dim = head_dim
        self.position_pairs = position_pairs
        self.rope_theta = rope_theta
        self.qkv = nn.Linear(width, sum(self.widths), bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.spatial = nn.Parameter(0.02 * torch.randn(num_eigenvectors, head_dim // 2 - position_pairs))

    def forward(self, x: Tensor, eigenvectors: Tensor, causal: bool) -> Tensor:
        """x `[B, N, D]`, eigenvectors `[N, m]` -> `[B, N, D]`"""
        parts = self.qkv(x).split(self.widths, -1)
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)
        angles = self._angles(eigenvectors)
        cos, sin = angles.cos(), angles.sin()
        query, key = rotary(query, cos, sin), rotary(key, cos, sin)
        out = attend(query, key, value, pattern=Causal() if causal else None)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _angles(self, eigenvectors: Tensor) -> Tensor:
        """`[N, h / 2]`"""
        places = torch.arange(len(eigenvectors), device=eigenvectors.device, dtype=torch.float32)
        pairs = torch.arange(self.position_pairs, device=eigenvectors.device, dtype=torch.float32)
        by_position = places[:, None] * self.rope_theta ** (-2 * pairs / self.head_dim)
        with torch.autocast(eigenvectors.device.type, enabled=False):
            return torch.cat([by_position, eigenvectors @ self.spatial], -1)


class GatedMLP(nn.Module):
    """The feed-forward layer of Llama: `down(silu(gate x) * up x)` (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D] -> [..., D]`"""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PatternMemory(nn.Module):
    """The retrieval of MRFFN: attention over the k best of S stored patterns, behind a gate that starts
    nearly shut.

    The stored values start at zero, so that a pretrained decoder starts as it is.
    """

    def __init__(self, width: int, num_patterns: int, key_dim: int, topk: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, key_dim, bias=False)
        self.keys = nn.Parameter(torch.randn(num_patterns, key_dim))
        self.values = nn.Parameter(torch.zeros(num_patterns, width))
        self.gate = nn.Linear(width, 1)
        self.kernel = TopKSoftmax(topk)
        nn.init.constant_(self.gate.bias, -2.0)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`"""
        query = self.query(x).flatten(0, 1)[None, None]
        keys, values = self.keys[None, None].to(query.dtype), self.values[None, None].to(query.dtype)
        retrieved = attend(query, keys, values, kernel=self.kernel)
        return self.gate(x).sigmoid() * retrieved.view(x.shape)


class Block(nn.Module):
    """A Llama block with SE-Attention and MRFFN."""

    def __init__(
        self, attention: SpatialRotaryAttention, width: int, hidden: int, memory: PatternMemory, eps: float
    ) -> None:
        super().__init__()
        self.norm_1 = nn.RMSNorm(width, eps)
        self.attention = attention
        self.norm_2 = nn.RMSNorm(width, eps)
        self.mlp = GatedMLP(width, hidden)
        self.memory = memory

    def forward(self, x: Tensor, eigenvectors: Tensor, causal: bool) -> Tensor:
        """x `[B, N, D]`, eigenvectors `[N, m]` -> `[B, N, D]`"""
        x = x + self.attention(self.norm_1(x), eigenvectors, causal)
        y = self.norm_2(x)
        return x + self.mlp(y) + self.memory(y)


class Decoder(nn.Module):
    """Blocks and the last norm: with full rotation by position and an empty memory, a Llama decoder."""

    def __init__(self, blocks: list[Block], width: int, eps: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(width, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Tensor, eigenvectors: Tensor, causal: bool) -> Tensor:
        """x `[B, N, D]`, eigenvectors `[N, m]` -> `[B, N, D]`"""
        for block in self.blocks:
            x = block(x, eigenvectors, causal)
        return self.norm(x)


class STLink(nn.Module):
    """Sensors as tokens of a Llama-type decoder with graph-spectral rotary attention and pattern retrieval.

    Args:
        num_nodes: number of sensors N.
        history, horizon: steps P of input and Q of forecast.
        steps_per_day: time slots of a day.
        in_channels: channels of a reading.
        width, num_layers, num_heads, num_kv_heads, hidden: of the decoder; hidden is the feed-forward width.
        rope_theta, norm_eps: of the decoder.
        position_pairs: rotary pairs of a head that turn with the place in the sequence; None for half of
            them.
        num_eigenvectors: m of the graph's Laplacian; `bind` fills them in, and they are saved with the
            weights.
        num_patterns, pattern_dim, topk: S stored patterns with keys of this width, k of which a token
            retrieves.
        causal: keep the decoder's causal mask; sensors have no order, so the default is off.
        trainable_layers: in this many last blocks attention trains beside norms, spatial angles and memory,
            in the others only those (for pretrained decoders); None trains everything.

    Raises:
        ConfigError: widths that do not divide.
    """

    eigenvectors: Tensor

    def __init__(
        self,
        num_nodes: int,
        *,
        history: int = 12,
        horizon: int = 12,
        steps_per_day: int = 288,
        in_channels: int = 1,
        width: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        hidden: int = 688,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-6,
        position_pairs: int | None = None,
        num_eigenvectors: int = 16,
        num_patterns: int = 64,
        pattern_dim: int = 64,
        topk: int = 8,
        causal: bool = False,
        trainable_layers: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if width % (2 * num_heads) or num_heads % num_kv_heads:
            raise ConfigError(
                f"ST-LINK needs heads of even width and num_heads divisible by num_kv_heads; "
                f"got width {width}, num_heads {num_heads}, num_kv_heads {num_kv_heads}."
            )
        pairs = width // num_heads // 2
        position_pairs = pairs // 2 if position_pairs is None else position_pairs
        if not 0 <= position_pairs <= pairs:
            raise ConfigError(f"position_pairs must lie in 0 .. {pairs}, not {position_pairs}.")
        self.num_nodes = num_nodes
        self.history = history
        self.horizon = horizon
        self.causal = causal
        token_dim = width // 3
        self.tokens = SensorTokens(num_nodes, history * in_channels, steps_per_day, token_dim)
        self.fusion = nn.Linear(3 * token_dim, width)
        self.register_buffer("eigenvectors", torch.zeros(num_nodes, num_eigenvectors))
        blocks = [
            Block(
                SpatialRotaryAttention(
                    width, num_heads, num_kv_heads, position_pairs, num_eigenvectors, rope_theta
                ),
                width,
                hidden,
                PatternMemory(width, num_patterns, pattern_dim, topk),
                norm_eps,
            )
            for _ in range(num_layers)
        ]
        self.llama = Decoder(blocks, width, norm_eps)
        self.head = nn.Linear(width, horizon)
        if trainable_layers is not None:
            always = ("norm_1", "norm_2", "spatial", "memory")
            freeze_blocks(self.llama.blocks, norms=always, tuned=("attention",), num_tuned=trainable_layers)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scaled readings x `[B, P, N(, C)]`, time int64 `[B, P+Q, 2]` (weekday, slot) -> `[B, Q, N]`."""
        x = x[..., None] if x.ndim == 3 else x
        check_window(self, x, time)
        weekday, slot = time[:, self.history - 1, None].unbind(-1)
        readings = x.permute(0, 2, 3, 1).flatten(2)
        tokens = self.fusion(self.tokens(readings, slot, weekday))
        return self.head(self.llama(tokens, self.eigenvectors, self.causal)).transpose(1, 2)

    def bind(self, graph: SensorGraph) -> None:
        """Take the eigenvectors of a sensor graph."""
        table = graph.laplacian_eigenvectors(self.eigenvectors.shape[1])
        self.eigenvectors.copy_(table.to(self.eigenvectors))

    def load_backbone(self, path: str | Path) -> None:
        """Start from pretrained Llama weights of the same shape: a safetensors file, or a folder of them.

        Raises:
            CheckpointError: no such weights, or of another shape.
        """
        files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
        if not files:
            raise CheckpointError(f"The folder {path} holds no *.safetensors.")
        state = {name: tensor for file in files for name, tensor in read_state_dict(file).items()}
        tensors = llama_start(state, self)
        kept = [name for name in self.state_dict() if name not in tensors]
        load_state(self, tensors, skip=kept, source=str(path))


_register = partial(
    register_model,
    model=STLink,
    paper="ST-LINK, CIKM 2025, arXiv 2509.13753",
    licence="none: the official code was not available",
    source="none",
    status="re-implementation",
    preprocessing={"scaling": "z-score by the mean and std of the training windows", "missing": "zero"},
)


@_register(
    summary="Sensors as tokens of a Llama with graph-spectral rotary attention and pattern retrieval",
    notes="Written from the paper's description; sizes and details are choices of this zoo.",
)
def st_link(num_nodes: int, **kwargs) -> STLink:
    return STLink(num_nodes, **kwargs)
