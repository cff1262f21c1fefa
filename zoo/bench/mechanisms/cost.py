"""Time and memory of a layer over the number of tokens, in the four patterns of CAB (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.attention.layers import AttentionLayer, auxiliary_loss, create_attention, find_layer
from zoo.bench.compare import scaling
from zoo.bench.report import Curve, Point
from zoo.bench.timing import Call

PATTERNS = {
    "NS": "noncausal self",
    "CS": "causal self",
    "NC": "noncausal cross",
    "CC": "causal cross",
}
"""Causal cross: no output depends on a later query, so that queries may come one by one."""
DIM, HEADS = 64, 4


@dataclass(frozen=True)
class Limits:
    """How far a curve is followed: a size is left out where the one before, grown as the square of the
    tokens, says that it takes more."""

    sizes: tuple[int, ...] = (256, 1024, 4096, 16_384)
    seconds: float = 60.0
    bytes: int = 6 * 2**30

    def allow(self, last: Point | None, size: int) -> bool:
        if last is None:
            return True
        growth = (size / last.size) ** 2
        return last.seconds * growth <= self.seconds and last.bytes * growth <= self.bytes


def patterns(attention: Mapping[str, Any]) -> list[str]:
    """Which of `PATTERNS` a layer does."""
    can = find_layer(str(attention["name"])).supports
    able = {"NS": can.bidirectional, "CS": can.causal, "NC": can.cross}
    found = [pattern for pattern, does in able.items() if does]
    return [*found, "CC"] if can.cross and queries_apart(attention) else found


def queries_apart(attention: Mapping[str, Any]) -> bool:
    """Whether a layer that reads a context answers each query without a look at later ones."""
    layer = build(attention, "NC", torch.device("cpu")).eval()
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(1, 12, DIM, generator=generator) for _ in range(2))
    changed = torch.cat([x[:, :-1], -x[:, -1:]], dim=1)
    with torch.no_grad():
        before, after = layer(x, context), layer(changed, context)
    return torch.allclose(before[:, :-1], after[:, :-1], atol=1e-5)


def build(attention: Mapping[str, Any], pattern: str, device: torch.device) -> AttentionLayer:
    """A layer for one of `PATTERNS`; causal cross attention is a noncausal layer over a known context."""
    torch.manual_seed(0)
    return create_attention(attention, DIM, num_heads=HEADS, causal=pattern == "CS").to(device)


def grown(
    name: str, attention: Mapping[str, Any], pattern: str, limits: Limits, repeats: int, device: torch.device
) -> Curve:
    """Forward and backward of one row of N tokens, with as many of context for cross attention.

    The median of `repeats` rounds; where one takes over a second, a single round.
    """
    layer = build(attention, pattern, device)

    def at(tokens: int) -> Call:
        x = torch.randn(1, tokens, DIM, device=device, requires_grad=True)
        context = torch.randn(1, tokens, DIM, device=device) if pattern in ("NC", "CC") else None

        def forward_and_backward() -> Tensor | float:
            layer.zero_grad()
            layer(x, context).sum().backward()
            return auxiliary_loss(layer)

        return forward_and_backward

    points: list[Point] = []
    for size in limits.sizes:
        last = points[-1] if points else None
        if not limits.allow(last, size):
            break
        long = last is not None and last.seconds * size / last.size > 1
        points += scaling(name, at, [size], repeats=1 if long else repeats, device=device).points
    return Curve(name, tuple(points))
