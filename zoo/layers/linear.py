"""The matrix of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def matrix(linear: nn.Linear) -> Tensor:
    """The weight `(out, in)` of a linear layer, with the low-rank updates that fine-tuning wraps it in."""
    if type(linear) is nn.Linear:
        return linear.weight
    unit = torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
    return (linear(unit) - linear(torch.zeros_like(unit[:1]))).mT
