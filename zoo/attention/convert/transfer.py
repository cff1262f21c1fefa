"""Attention transfer: a few parameters of a new layer are trained to give what the old one gives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.attention.convert.calls import real_tokens
from zoo.attention.errors import AttentionError
from zoo.attention.layers.base import AttentionLayer, Inputs


@torch.no_grad()
def outputs(layer: AttentionLayer, calls: Sequence[Inputs]) -> list[Tensor]:
    """What the layer gives for the real tokens of each call, `(T, C)`, without dropout."""
    training, found = layer.training, []
    layer.eval()
    for call in calls:
        found.append(real_tokens(call, layer(*call)))
    layer.train(training)
    return found


def match(
    made: AttentionLayer,
    calls: Sequence[Inputs],
    targets: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    steps: int,
    lr: float,
) -> None:
    """Train `parameters` of `made` for the least mean square error of its outputs; one call a step, Adam, the
    rate falling to 0 as a cosine. What they were stays where training does not lower the error.

    Args:
        targets: for each call, those of the layer that `made` takes the place of, see `outputs`.
    """
    if steps < 0 or not lr > 0:
        raise AttentionError(f"attention transfer takes steps of a positive size, not {steps} of {lr}")
    power = max(sum(float(y.square().sum()) for y in targets) / sum(y.numel() for y in targets), 1e-30)
    first, start = [p.detach().clone() for p in parameters], _lost(made, calls, targets)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    made.eval()
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            call, target = calls[step % len(calls)], targets[step % len(calls)]
            loss = (real_tokens(call, made(*call)) - target).square().mean() / power
            found = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
    worse = not _lost(made, calls, targets) < start
    with torch.no_grad():
        for parameter, before in zip(parameters, first, strict=True):
            parameter.grad = None
            if worse:
                parameter.copy_(before)


def _lost(made: AttentionLayer, calls: Sequence[Inputs], targets: Sequence[Tensor]) -> float:
    """The sum of squares of what the outputs miss."""
    found = outputs(made, calls)
    return sum(float((y - target).square().sum()) for y, target in zip(found, targets, strict=True))
