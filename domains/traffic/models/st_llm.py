"""ST-LLM: Spatial-Temporal Large Language Model for Traffic Prediction (Liu et al.; MDM 2024).

Every sensor is one token of a GPT-2 whose language is replaced by embeddings of recent readings, time and
sensor.
Shapes: B windows, P steps of history, Q of horizon, N sensors, C channels, D the width of GPT-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from domains.traffic.models.common import check_window, features_of_time
from domains.traffic.weights import STLLMOfficial, gpt2_start
from zoo.attention import Causal, attend
from zoo.attention.layers import AttentionLayer, create_attention
from zoo.attention.layers.multihead import MultiHead
from zoo.errors import CheckpointError, ConfigError
from zoo.layers.freeze import freeze_blocks
from zoo.registry import register_model
from zoo.weights.checkpoint import load_state, read_state_dict


class SensorTokens(nn.Module):
    """One token of width 3 E per sensor: embeddings of its readings, of the time, and of itself."""

    def __init__(self, num_nodes: int, inputs: int, steps_per_day: int, dim: int) -> None:
        super().__init__()
        self.value = nn.Linear(inputs, dim)
        self.time_of_day = nn.Parameter(torch.empty(steps_per_day, dim))
        self.day_of_week = nn.Parameter(torch.empty(7, dim))
        self.node = nn.Parameter(torch.empty(num_nodes, dim))
        for table in (self.time_of_day, self.day_of_week, self.node):
            nn.init.xavier_uniform_(table)

    def forward(self, readings: Tensor, slot: Tensor, weekday: Tensor) -> Tensor:
        """readings `[B, N, inputs]`, slot and weekday int64 `[B, N]` or `[B, 1]` -> `[B, N, 3 E]`."""
        value = self.value(readings)
        time = self.time_of_day[slot] + self.day_of_week[weekday]
        return torch.cat([value, time.expand_as(value), self.node.expand_as(value)], -1)


class GPT2Block(nn.Module):
    """Pre-norm causal self-attention and feed-forward layer (Radford et al. 2019)."""

    def __init__(
        self, width: int, num_heads: int, dropout: float, attention: str | Mapping[str, Any] | None
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ln_1 = nn.LayerNorm(width)
        self.attention: AttentionLayer | None = None
        if attention:
            self.attention = create_attention(attention, width, num_heads=num_heads, causal=True)
        else:
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.fc_1 = nn.Linear(width, 4 * width)
        self.fc_2 = nn.Linear(4 * width, width)
        self.act = nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`"""
        x = x + self.dropout(self._attend(self.ln_1(x)))
        return x + self.dropout(self.fc_2(self.act(self.fc_1(self.ln_2(x)))))

    def _attend(self, x: Tensor) -> Tensor:
        if self.attention is not None:
            return self.attention(x)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        dropout = self.dropout.p if self.training else 0.0
        out = attend(query, key, value, pattern=Causal(), dropout=dropout)
        return self.proj(out.transpose(1, 2).flatten(2))


class GPT2(nn.Module):
    """The first blocks of a GPT-2 on embeddings in place of words, with its positions and last norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_layers: int,
        max_positions: int,
        dropout: float,
        attention: str | Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(max_positions, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            GPT2Block(width, num_heads, dropout, attention) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self._init(num_layers)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, D] -> [B, N, D]`"""
        x = self.dropout(x + self.positions[: x.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def _init(self, num_layers: int) -> None:
        """As GPT-2: std 0.02, and less where a branch is added to the residual."""
        nn.init.normal_(self.positions, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".attention." not in name:
                into_residual = name.endswith(("proj", "fc_2"))
                nn.init.normal_(module.weight, std=0.02 / (2 * num_layers) ** 0.5 if into_residual else 0.02)
                nn.init.zeros_(module.bias)


class STLLM(nn.Module):
    """Spatial-temporal large language model.

    Args:
        num_nodes: number of sensors N.
        history, horizon: steps P of input and Q of forecast.
        steps_per_day: time slots of a day.
        in_channels: channels of a reading (the two of the time are added here).
        llm_layers: blocks of GPT-2 that are kept.
        trainable_layers: in this many last blocks attention trains beside the norms, in the others the norms
            alone (all else outside the blocks trains); None trains everything, for a start without pretrained
            weights.
        width, num_heads: of GPT-2; 768 and 12 in GPT-2 small.
        max_positions: rows of its position table.
        dropout: of GPT-2, in training.
        attention: a layer of the zoo in place of GPT-2's own, trained from the start: a name, or a mapping
            with its name and arguments (`zoo list attention`), `causal: false` among them where sensors shall
            see all others.

    Raises:
        ConfigError: widths that do not divide, more sensors than positions, or another attention that is to
            stay frozen.
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
        llm_layers: int = 6,
        trainable_layers: int | None = 1,
        width: int = 768,
        num_heads: int = 12,
        max_positions: int = 1024,
        dropout: float = 0.1,
        attention: str | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if width % 3 or width % num_heads:
            raise ConfigError(
                f"Width {width} of ST-LLM must be divisible by 3 and by num_heads = {num_heads}."
            )
        if num_nodes > max_positions:
            raise ConfigError(
                f"{num_nodes} sensors need as many positions, but max_positions is {max_positions}. "
                "Pretrained GPT-2 has 1024; without it, set max_positions to the number of sensors."
            )
        if attention and trainable_layers is not None:
            raise ConfigError(
                "Another attention starts from random numbers, which cannot stay frozen: "
                "set trainable_layers=null."
            )
        self.num_nodes = num_nodes
        self.history = history
        self.horizon = horizon
        self.steps_per_day = steps_per_day
        self.attention = attention
        self.tokens = SensorTokens(num_nodes, (in_channels + 2) * history, steps_per_day, width // 3)
        self.fusion = nn.Linear(width, width)
        self.gpt2 = GPT2(width, num_heads, llm_layers, max_positions, dropout, attention)
        self.head = nn.Linear(width, horizon)
        if trainable_layers is not None:
            freeze_blocks(
                self.gpt2.blocks, norms=("ln_1", "ln_2"), tuned=("qkv", "proj"), num_tuned=trainable_layers
            )

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Scaled readings x `[B, P, N(, C)]`, time int64 `[B, P+Q, 2]` (weekday, slot) -> `[B, Q, N]`."""
        x = x[..., None] if x.ndim == 3 else x
        check_window(self, x, time)
        past = features_of_time(time[:, : self.history], self.steps_per_day)
        past = past[:, :, None].expand(*x.shape[:3], 2).to(x.dtype)
        channels = torch.cat([x, past], -1).permute(0, 3, 2, 1)
        weekday, slot = time[:, self.history - 1, None].unbind(-1)
        return self._forecast(channels, slot, weekday)

    def forward_official(self, x: Tensor) -> Tensor:
        """The official program's input `[B, C + 2, N, P]`, whose last two channels are the time of day as a
        fraction and the day of the week, to its output `[B, Q, N, 1]`."""
        slot = (x[:, -2, :, -1] * self.steps_per_day).long()
        return self._forecast(x, slot, x[:, -1, :, -1].long())[..., None]

    def _forecast(self, channels: Tensor, slot: Tensor, weekday: Tensor) -> Tensor:
        readings = channels.transpose(1, 2).flatten(2)
        tokens = self.fusion(self.tokens(readings, slot, weekday))
        return self.head(self.gpt2(tokens)).transpose(1, 2)

    @torch.no_grad()
    def core_layers(self) -> dict[str, MultiHead]:
        """GPT-2's attention as layers of the core, by the name of the module that holds another."""
        layers = {}
        for i, block in enumerate(self.gpt2.blocks):
            own = cast(GPT2Block, block)
            options: dict[str, Any] = {"causal": True, "dropout": own.dropout.p}
            layer = MultiHead(
                own.proj.in_features, own.num_heads, qkv_bias=True, out_bias=True, **options
            ).to(own.proj.weight)
            parts = (layer.q_proj, layer.k_proj, layer.v_proj)
            for key in ("weight", "bias"):
                for part, rows in zip(parts, getattr(own.qkv, key).chunk(3), strict=True):
                    getattr(part, key).copy_(rows)
            layer.o_proj.load_state_dict(own.proj.state_dict())
            layers[f"gpt2.blocks.{i}.attention"] = layer.train(self.training)
        return layers

    def load_backbone(self, path: str | Path) -> None:
        """Start from pretrained GPT-2 weights: a file of the transformers library (`model.safetensors`).

        Raises:
            CheckpointError: the file is no GPT-2 of this width with as many blocks.
        """
        if self.attention:
            raise CheckpointError("GPT-2 weights are for its own attention: leave out `attention`.")
        tensors = gpt2_start(read_state_dict(path), self)
        kept = [name for name in self.state_dict() if name not in tensors]
        load_state(self, tensors, skip=kept, source=str(path))


_register = partial(
    register_model,
    model=STLLM,
    paper="Liu et al., Spatial-Temporal Large Language Model for Traffic Prediction, MDM 2024",
    licence="S-Lab License 1.0 (non-commercial); GPT-2 weights MIT",
    source="https://github.com/ChenxiLiu-HNU/ST-LLM",
    status="official parity",
    official=STLLMOfficial,
    weights=("gpt2",),
    preprocessing={"scaling": "z-score by the mean and std of the training windows", "missing": "zero"},
)


@_register(
    summary="Sensors as tokens of a partly frozen GPT-2",
    notes="pretrained=gpt2 starts from language weights; trainable_layers=null trains a small one from "
    "scratch. The causal mask of GPT-2 stays on: sensor n sees sensors up to n only, as officially.",
)
def st_llm(num_nodes: int, **kwargs) -> STLLM:
    return STLLM(num_nodes, **kwargs)
