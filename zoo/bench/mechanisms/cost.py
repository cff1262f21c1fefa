"""Time and memory of a layer over the number of tokens, in the four patterns of CAB (Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.attention.layers import AttentionLayer, auxiliary_loss, create_attention, find_layer
from zoo.bench.compare import scaling
from zoo.bench.memory import peak_memory
from zoo.bench.report import Curve, Point
from zoo.bench.timing import Call, stopwatch

PATTERNS = {
    "NS": "noncausal self",
    "CS": "causal self",
    "NC": "noncausal cross",
    "CC": "causal cross",
}
"""Causal cross: no output depends on a later query, so that queries may come one by one."""
DIM, HEADS = 64, 4
GIB = 2**30


@dataclass(frozen=True)
class Limits:
    """How far a curve is followed: a size is left out where the one before, grown as the square of the
    tokens, says that it may take more."""

    sizes: tuple[int, ...] = (256, 1024, 4096, 16_384)
    seconds: float = 60.0
    bytes: int = 6 * 2**30

    def forbids(self, last: Point | None, size: int) -> str:
        """Why a size is left out after this last one; empty where it is not."""
        if last is None:
            return ""
        growth = (size / last.size) ** 2
        if (seconds := last.seconds * growth) > self.seconds:
            return f"{size:,} tokens may take {seconds:,.0f} s, over {self.seconds:g} s"
        if (needed := last.bytes * growth) > self.bytes:
            return f"{size:,} tokens may take {needed / GIB:,.1f} GiB, over {self.bytes / GIB:,.2g} GiB"
        return ""


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
    name: str,
    attention: Mapping[str, Any],
    pattern: str,
    limits: Limits,
    repeats: int,
    device: torch.device,
    known: Sequence[Point] = (),
) -> tuple[Curve, str]:
    """Forward and backward of one row of N tokens, with as many of context for cross attention; and why the
    curve ends before the last size, if it does.

    The median of `repeats` rounds; where one takes over a second, a single one, in which its memory is
    followed, too.

    Args:
        known: of smaller sizes, measured earlier.
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

    points = list(known)
    for size in limits.sizes[len(points) :]:
        last = points[-1] if points else None
        if reason := limits.forbids(last, size):
            return Curve(name, tuple(points)), reason
        if last is not None and last.seconds * size / last.size > 1:
            points.append(_measured_once(at(size), size, device))
        else:
            points += scaling(name, at, [size], repeats=repeats, device=device).points
    return Curve(name, tuple(points)), ""


def _measured_once(call: Call, size: int, device: torch.device) -> Point:
    """Time and memory of the same call, which is long enough that following its memory costs nothing."""
    timer, seconds = stopwatch(device), []
    peak = peak_memory(lambda: seconds.append(timer(call)), device)
    return Point(size, seconds[0], peak)
