"""MIGA in the plain layout: the peer of `zoo bench domain=forecasting`.

The same function as `domains.forecasting.models.miga`, laid out as the paper tells it: every expert is a
layer of its own, the experts of one group after the other are stacked and attend to each other by explicit
scores, with a product each for queries, keys and values. The backbone is `torch.nn.GRU`.

Shapes: B days, N stocks of a day, T days of history, F features, d hidden channels, g experts of a group, c
channels of an expert, h heads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class GroupAttention(nn.Module):
    """Layer norm and attention among the experts of a group."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, experts: Tensor) -> Tensor:
        """`(M, g, c) -> (M, g, c)`"""
        x = self.norm(experts)
        q, k, v = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        weights = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """`(M, g, c) -> (M, h, g, c / h)`"""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class PlainMIGA(nn.Module):
    """63 experts in 7 groups of 9, 8 chosen, unless given."""

    def __init__(
        self,
        num_features: int,
        *,
        hidden: int = 64,
        num_groups: int = 7,
        group_size: int = 9,
        top_k: int = 8,
        expert_dim: int = 16,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.backbone = nn.GRU(num_features, hidden, batch_first=True)
        self.gate = nn.Linear(hidden, num_groups * group_size)
        self.groups = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden, expert_dim) for _ in range(group_size)) for _ in range(num_groups)
        )
        self.attention = GroupAttention(expert_dim, num_heads)
        self.head = nn.Linear(expert_dim, 1)

    def load_zoo(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the weights of the zoo's model, of which there are no official names."""
        found = {}
        for kind, name in (("weight", "input"), ("bias", "input"), ("weight", "state"), ("bias", "state")):
            found[f"backbone.{kind}_{'ih' if name == 'input' else 'hh'}_l0"] = state_dict[
                f"backbone.{name}.{kind}"
            ]
        for kind in ("weight", "bias"):
            found[f"gate.{kind}"] = state_dict[f"gate.logits.{kind}"]
            for layer in ("head", "attention.norm"):
                found[f"{layer}.{kind}"] = state_dict[f"{layer}.{kind}"]
            found[f"attention.out.{kind}"] = state_dict[f"attention.proj.{kind}"]
            parts = state_dict[f"attention.qkv.{kind}"].chunk(3)
            for layer, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"attention.{layer}.{kind}"] = part
            layers = [f"groups.{i}.{e}" for i, group in enumerate(self.groups) for e in range(len(group))]  # pyright: ignore[reportArgumentType]
            for layer, part in zip(layers, state_dict[f"experts.{kind}"].chunk(len(layers)), strict=True):
                found[f"{layer}.{kind}"] = part
        self.load_state_dict(found)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `(B, N)` of windows `(B, N, T, F)`, and the load-balancing loss."""
        h = self.backbone(x.flatten(0, 1))[1][0]
        weights, balance = self._gates(h)
        scores = []
        for group in self.groups:
            experts = torch.stack([expert(h) for expert in group], dim=1)  # pyright: ignore[reportGeneralTypeIssues]
            scores.append(self.head(experts + self.attention(experts))[..., 0])
        return (weights * torch.cat(scores, dim=1)).sum(-1).view(x.shape[:2]), balance

    def _gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(h)
        chosen = logits >= logits.topk(self.top_k, dim=-1).values[:, -1:]
        weights = torch.softmax(logits.masked_fill(~chosen, -torch.inf), dim=-1)
        share = chosen.float().mean(0) / self.top_k
        return weights, logits.shape[-1] * (torch.softmax(logits, dim=-1).mean(0) * share).sum()
