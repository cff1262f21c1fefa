"""A memory whose weights learn at test time (Behrouz et al. 2025, Titans, section 3).

Shapes: B batch, H heads of the memory, D width of a head; T chunks of tokens. Weights are lists of tensors
`(B, H, ...)`.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.scan import scan

Weights = list[Tensor]


class MemoryState(NamedTuple):
    """What a memory is after `length` tokens."""

    weights: Weights
    momentum: Weights
    anchor: Weights
    """Where gradients are taken: the weights at the last refresh."""
    rest: Tensor
    """Tokens `(B, r, C)` of the chunk that is not full yet."""
    length: int


def nbytes(state: MemoryState) -> int:
    """Bytes that a state holds; weights that it still shares with the layer count too."""
    held = [*state.weights, *state.momentum, *state.anchor, state.rest]
    return sum(x.numel() * x.element_size() for x in held)


def detached(state: MemoryState) -> MemoryState:
    """The same without gradients."""
    weights, momentum, anchor = ([w.detach() for w in part] for part in state[:3])
    return MemoryState(weights, momentum, anchor, state.rest.detach(), state.length)


class MemoryNet(nn.Module):
    """`f(x) = GELU(GELU(x W_1) W_2) ...`, or `x + LN(f(x)) (gamma + 1)`, whose weights are arguments.

    Args:
        dim: D.
        depth: number of matrices; with one, the memory is linear.
        expansion: width between the matrices over D.
        residual: the second form; its norm has no weights but gamma, which comes first.
    """

    def __init__(self, dim: int, depth: int, expansion: float, *, residual: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        if depth < 1 or hidden < 1:
            raise AttentionError(f"a memory has at least one matrix and one channel: not {depth}, {hidden}")
        widths = [dim, *[hidden] * (depth - 1), dim]
        self.shapes = [(dim,)] if residual else []
        self.shapes += [*pairwise(widths)]
        self.residual = residual

    def forward(self, weights: Weights, x: Tensor) -> Tensor:
        """x `(..., n, D)`, with weights `(..., D)` and `(..., D, E)`."""
        first, *others = weights[1:] if self.residual else weights
        y = x @ first
        for matrix in others:
            y = F.gelu(y) @ matrix
        return x + _normed(y)[0] * (weights[0][..., None, :] + 1) if self.residual else y

    def surprise(self, weights: Weights, k: Tensor, v: Tensor, rate: Tensor) -> Weights:
        """`- grad sum_t rate_t mean_d (f(k_t) - v_t)^2` for each chunk, `(B, H, T, ...)`.

        Written out, so that it works without autograd, in inference mode too, and multiplies all tokens by
        the weights that they share.

        Args:
            weights: `(B, H, ...)`, the same for all chunks.
            k, v: `(B, H, T, chunk, D)`.
            rate: `(B, H, T, chunk)`.
        """
        chunks, (k, v) = k.shape[2:4], (x.flatten(2, 3) for x in (k, v))
        matrices = weights[1:] if self.residual else weights
        before, inputs = [], [k]
        for matrix in matrices[:-1]:
            before.append(inputs[-1] @ matrix)
            inputs.append(F.gelu(before[-1]))
        y, updates = inputs[-1] @ matrices[-1], []
        descent = rate.flatten(2)[..., None] * (2 / v.shape[-1])  # times the error: - the gradient of y
        if self.residual:
            gain = weights[0][..., None, :] + 1
            unit, inverse = _normed(y)
            descent = descent * (v - k - unit * gain)
            updates.append((descent * unit).unflatten(2, chunks).sum(3))
            descent = descent * gain
            along = (descent * unit).mean(-1, keepdim=True)
            descent = (descent - descent.mean(-1, keepdim=True) - unit * along) * inverse
        else:
            descent = descent * (v - y)
        of_matrices = []
        for i in range(len(matrices) - 1, -1, -1):
            of_matrices.append(inputs[i].unflatten(2, chunks).mT @ descent.unflatten(2, chunks))
            if i:
                descent = (descent @ matrices[i].mT) * _gelu_slope(before[i - 1])
        return updates + of_matrices[::-1]


def _normed(y: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """LayerNorm without weights over the channels, and one over the standard deviation.

    Not `F.layer_norm`: its third derivatives, which gradients of gradients of a memory need, are wrong in
    torch 2.11.
    """
    centred = y - y.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def _gelu_slope(x: Tensor) -> Tensor:
    density = (-0.5 * x.square()).exp() * (2 * math.pi) ** -0.5
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density


def running(updates: Weights, log_keep: Tensor, before: Weights) -> Weights:
    """`S_c = exp(log_keep_c) S_{c-1} + u_c`, all of them, `(B, H, T, ...)`.

    Args:
        updates: u, `(B, H, T, ...)`.
        log_keep: `(B, H, T)`.
        before: S_0, `(B, H, ...)`.
    """
    one = torch.ones_like(log_keep)[..., None]
    return [
        scan(one, one, u.flatten(3), log_decay=log_keep, state=s.flatten(2)[:, :, None], scale=1.0)[0].view(
            u.shape
        )
        for u, s in zip(updates, before, strict=True)
    ]
