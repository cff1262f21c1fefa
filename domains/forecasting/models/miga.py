"""MIGA: a mixture of experts that attend to each other in groups, to rank the stocks of a day.

Yu et al. 2024, arXiv 2410.02241. There is no official code; this follows the paper's description.

Shapes: B days, N stocks of a day, T days of history, F features, d hidden channels, E experts in groups of g.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from zoo.attention import EqualGroups, attend
from zoo.errors import ConfigError
from zoo.registry import register_model

PAPER = (
    "Yu et al., MIGA: Mixture-of-Experts with Group Aggregation for Stock Market Prediction, "
    "arXiv 2410.02241, 2024"
)

Backbone = Literal["gru", "conv", "attention"]


class Ranking(NamedTuple):
    """What a ranking model says of the stocks of B days."""

    scores: Tensor
    """`(B, N)`, higher is better; comparable within a day only."""
    balance: Tensor
    """0-dim: the load-balancing loss, 1 when all experts are used alike; 0 of a model without experts."""
    gates: Tensor | None
    """`(B, N, E)` weight of each expert, k of them above 0 and adding up to 1."""


# ---- backbones: (M, T, F) -> (M, d) ------------------------------------------------------------------------


class GRU(nn.Module):
    """The last state of gated recurrent units (Cho et al. 2014), gates in the order of `torch.nn.GRU`.

    Written out, since `torch.compile` does not look into `torch.nn.GRU`.
    """

    def __init__(self, num_features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = nn.Linear(num_features, 3 * hidden)
        self.state = nn.Linear(hidden, 3 * hidden)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`(M, T, F) -> (M, d)`"""
        state = x.new_zeros(len(x), self.hidden)
        for given in self.input(x.transpose(0, 1)):
            reset, update, new = given.chunk(3, dim=-1)
            reset_h, update_h, new_h = self.state(state).chunk(3, dim=-1)
            update = torch.sigmoid(update + update_h)
            new = torch.tanh(new + torch.sigmoid(reset + reset_h) * new_h)
            state = new + update * (state - new)
        return state


class Convolution(nn.Module):
    """Residual causal convolutions over time, three days wide, reaching back twice as far in each layer."""

    def __init__(self, num_features: int, hidden: int, num_layers: int) -> None:
        super().__init__()
        self.input = nn.Linear(num_features, hidden)
        self.layers = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, dilation=2**i) for i in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """`(M, T, F) -> (M, d)`"""
        x = self.input(x).transpose(1, 2)
        for i, layer in enumerate(self.layers):
            x = x + layer(nn.functional.pad(nn.functional.gelu(x), (2 * 2**i, 0)))
        return x[..., -1]


class Transformer(nn.Module):
    """Pre-norm blocks of attention over time, with learned positions counted from the last day."""

    def __init__(self, num_features: int, hidden: int, num_layers: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.input = nn.Linear(num_features, hidden)
        self.position = nn.Parameter(0.02 * torch.randn(window, hidden))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [SelfAttention(hidden, num_heads), nn.Sequential(nn.LayerNorm(hidden), *_mlp(hidden))]
            )
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """`(M, T, F) -> (M, d)`"""
        x = self.input(x) + self.position[-x.shape[1] :]
        for attention, mlp in self.layers:  # pyright: ignore[reportGeneralTypeIssues]
            x = x + attention(x)
            x = x + mlp(x)
        return x[:, -1]


def _mlp(hidden: int) -> list[nn.Module]:
    return [nn.Linear(hidden, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden)]


class SelfAttention(nn.Module):
    """Layer norm and multi-head attention among tokens, or among those of each group of `group_size`."""

    def __init__(self, dim: int, num_heads: int, group_size: int | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ConfigError(f"width {dim} is not divisible by {num_heads} heads.")
        self.num_heads = num_heads
        self.pattern = None if group_size is None else EqualGroups(group_size)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """`(M, tokens, dim) -> (M, tokens, dim)`"""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attend(q, k, v, pattern=self.pattern).transpose(1, 2).flatten(2))


# ---- experts -----------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Chooses k of E experts for each stock: `softmax` over the k largest logits, 0 for the others.

    Shazeer et al. 2017, eq. 3 to 5, without the noise.
    """

    def __init__(self, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.logits = nn.Linear(hidden, num_experts)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights `(M, E)` of stocks `(M, d)`, and the load-balancing loss over those of the mask `(M,)`.

        The loss is `E sum_e P_e S_e` with the mean probability P_e of expert e, by a softmax over all, and
        its share S_e of the choices (Fedus et al. 2022, eq. 4): 1 when all are used alike.
        """
        logits = self.logits(h).float()
        best, chosen = logits.topk(self.top_k, dim=-1)
        weights = torch.zeros_like(logits).scatter(-1, chosen, best.softmax(-1))
        present = torch.ones_like(h[:, 0]) if mask is None else mask.to(logits.dtype)
        count = present.sum().clamp(min=1)
        probability = (present[:, None] * logits.softmax(-1)).sum(0) / count
        times = torch.zeros_like(logits).scatter(-1, chosen, present[:, None].expand(chosen.shape).to(logits))
        share = times.sum(0) / (count * self.top_k)
        return weights, logits.shape[-1] * (probability * share).sum()


class MIGA(nn.Module):
    """Mixture of experts with inner-group attention (Yu et al. 2024).

    A backbone reads the window of each stock into h. Expert e is a linear layer of h; the experts of a group
    attend to each other: LayerNorm, multi-head attention without positions, residual. One head turns each
    into a score, and the score of the stock is their sum, weighted by the gate. The attention and the head
    are shared by all groups, which the paper leaves open. Stocks do not see each other.

    Args:
        num_features: F.
        hidden: d.
        backbone: what reads the window: `gru`, `conv`, or `attention`.
        num_layers: of the convolutional and the attention backbone.
        window: days of history at most; for the attention backbone.
        num_groups: groups of experts.
        group_size: g, experts of a group.
        top_k: k, experts that a stock uses.
        expert_dim: channels of an expert's output.
        num_heads: of all attention.
        dropout: on h.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: int = 64,
        backbone: Backbone = "gru",
        num_layers: int = 2,
        window: int = 20,
        num_groups: int = 7,
        group_size: int = 9,
        top_k: int = 8,
        expert_dim: int = 16,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        experts = num_groups * group_size
        if min(num_groups, group_size) < 1 or not 1 <= top_k <= experts:
            raise ConfigError(
                f"top_k={top_k}: 1 to {experts} of {num_groups} groups of {group_size} experts."
            )
        self.expert_dim = expert_dim
        self.backbone = build_backbone(backbone, num_features, hidden, num_layers, num_heads, window)
        self.dropout = nn.Dropout(dropout)
        self.gate = Gate(hidden, experts, top_k)
        self.experts = nn.Linear(hidden, experts * expert_dim)
        self.attention = SelfAttention(expert_dim, num_heads, group_size)
        self.head = nn.Linear(expert_dim, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Ranking:
        """Rank the stocks of B days.

        Args:
            x: `(B, N, T, F)` the last T days of each stock.
            mask: bool `(B, N)`, False where a stock is padding; it does not count for the balance.
        """
        h = self.dropout(self.backbone(x.flatten(0, 1)))
        weights, balance = self.gate(h, None if mask is None else mask.flatten())
        experts = self.experts(h).unflatten(-1, (-1, self.expert_dim))
        refined = experts + self.attention(experts)
        scores = (weights * self.head(refined)[..., 0]).sum(-1)
        return Ranking(scores.view(x.shape[:2]), balance, weights.view(*x.shape[:2], -1))


class WindowRanker(nn.Module):
    """The backbone of MIGA with one linear head: what the experts are compared with.

    Args:
        num_features: F.
        hidden: d.
        backbone: what reads the window: `gru`, `conv`, or `attention`.
        num_layers, num_heads: of the convolutional and the attention backbone.
        window: days of history at most; for the attention backbone.
        dropout: on h.
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: int = 64,
        backbone: Backbone = "gru",
        num_layers: int = 2,
        num_heads: int = 4,
        window: int = 20,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone, num_features, hidden, num_layers, num_heads, window)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Ranking:
        """As `MIGA.forward`."""
        scores = self.head(self.dropout(self.backbone(x.flatten(0, 1))))
        return Ranking(scores.view(x.shape[:2]), scores.new_zeros(()), None)


def build_backbone(
    name: str, num_features: int, hidden: int, num_layers: int, num_heads: int, window: int
) -> nn.Module:
    """`(M, T, F) -> (M, d)`

    Raises:
        ConfigError: no backbone has this name.
    """
    if name == "gru":
        return GRU(num_features, hidden)
    if name == "conv":
        return Convolution(num_features, hidden, num_layers)
    if name == "attention":
        return Transformer(num_features, hidden, num_layers, num_heads, window)
    raise ConfigError(f"backbone={name} is none of gru, conv, attention.")


@register_model(
    model=MIGA,
    summary="Mixture of 63 experts with attention in groups of 9, 8 chosen for each stock, to rank stocks",
    paper=PAPER,
    licence="none: there is no official code",
    source="none",
    status="re-implementation",
    problem="ranking",
    preprocessing={"features": "robust z-scores", "label": "z-scores of the day"},
    notes="From the paper's description alone, which was submitted to ICLR 2025 and withdrawn; there are no "
    "official code and weights. What it leaves open: see the class. Its reviewers found that the attention "
    "gives little in the ablation and that more experts do not help.",
)
def miga(num_features: int, **kwargs) -> nn.Module:
    return MIGA(num_features, **kwargs)


@register_model(
    model=WindowRanker,
    summary="The recurrent backbone of MIGA with one linear head: a baseline without experts",
    paper="Cho et al., Learning Phrase Representations using RNN Encoder-Decoder, arXiv 1406.1078, 2014",
    licence="none: there is no official code",
    source="none",
    status="re-implementation",
    problem="ranking",
    preprocessing={"features": "robust z-scores", "label": "z-scores of the day"},
)
def gru_ranker(num_features: int, **kwargs) -> nn.Module:
    return WindowRanker(num_features, **kwargs)
