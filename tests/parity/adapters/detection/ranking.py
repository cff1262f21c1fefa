"""Ranked results: entries of near-equal score may stand in another order."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

GAP = 1e-4
"""Scores that are closer have no defined order."""


def in_order_of(
    expected: dict[str, Tensor], found: dict[str, Tensor], *, scores: str = "output/post_scores"
) -> dict[str, Tensor]:
    """The found entries `(B, k, ...)`, of which those with scores within `GAP` are exchanged so that they
    stand where the expected entry is that they resemble most."""
    out = {name: value.clone() for name, value in found.items()}
    for i, (theirs, ours) in enumerate(zip(expected[scores], found[scores], strict=True)):
        cost = torch.zeros(len(theirs), len(ours), dtype=torch.float64)
        for name, value in found.items():
            a, b = (x[i].double().reshape(len(theirs), -1) for x in (expected[name], value))
            cost += torch.cdist(a, b) / a.abs().max().clamp(min=1e-9)
        cost = cost.masked_fill((theirs[:, None] - ours[None]).abs() > GAP, 1e9)
        _, order = linear_sum_assignment(cost.numpy())
        for name, value in found.items():
            out[name][i] = value[i][torch.from_numpy(order)]
    return out
