"""What the models are told of geometry: directions, expanded distances, bond-orientational order.

Letters in shapes: N atoms, K slots of neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from domains.atoms.graph.harmonics import spherical_harmonics
from zoo.errors import ConfigError, did_you_mean

ZERO = 1e-12
"""Å^2: shorter vectors are those of an atom to itself, and have no direction."""
EXPANSIONS = ("gaussian", "sigmoid", "linear_sigmoid")


def lengths(vectors: Tensor) -> Tensor:
    """`(...)` of `(..., 3)`; of the zero vector 0, with gradient 0."""
    square = vectors.square().sum(-1)
    zero = square <= ZERO
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def directions(vectors: Tensor) -> Tensor:
    """Unit vectors `(..., 3)`; the zero vector stays what it is, with gradient 0."""
    square = vectors.square().sum(-1, keepdim=True)
    zero = square <= ZERO
    return (vectors / square.masked_fill(zero, 1.0).sqrt()).masked_fill(zero, 0.0)


def log_envelope(envelope: Tensor, smooth: bool = True) -> Tensor:
    """`-e^2 / (1 - e^2)` below 1, else -inf: what is added to the logits of a neighbour as key.

    Without `smooth` 0 below 1.
    """
    inside = envelope < 1
    square = envelope.masked_fill(~inside, 0.0).square()
    return (-square / (1 - square) if smooth else torch.zeros_like(square)).masked_fill(~inside, -torch.inf)


def bond_order(unit: Tensor, weights: Tensor, size: int) -> Tensor:
    """Bond-orientational order parameters `(N, size)` of degrees 0 to `size - 1` (Steinhardt et al. 1983).

    `B_l = |mean over neighbours of Y_l / sqrt(2l + 1)|`, at least 1e-3. The atom itself is among its
    neighbours, and counts for l = 0.

    Args:
        unit: `(N, K, 3)`.
        weights: `(N, K)`, how much a neighbour counts, or bool, which slots hold one.
    """
    weights = weights.to(unit) / weights.sum(1, keepdim=True).clamp(min=1)
    return order_parameters((weights[:, None] @ spherical_harmonics(unit, size - 1))[:, 0], size)


def order_parameters(means: Tensor, size: int) -> Tensor:
    """`bond_order` from the mean harmonics `(N, size^2)` of each atom's neighbours."""
    squares = means.square()
    orders = [squares[:, n * n : (n + 1) * (n + 1)].sum(1) / (2 * n + 1) for n in range(size)]
    return torch.stack(orders, 1).clamp(min=1e-6).sqrt()


class DistanceExpansion(nn.Module):
    """A distance as `count` numbers: bumps or steps at equal spacing from 0 to the cutoff.

    gaussian: `exp(-(r - mu)^2 / (2 (2 d)^2))`, d = spacing; sigmoid: `sigmoid(2 (r - mu) / d)`;
    linear_sigmoid: the same, plus 0.001 of its argument.

    Args:
        kind: one of `EXPANSIONS`.
    """

    centres: Tensor

    def __init__(self, kind: str, count: int, cutoff: float) -> None:
        super().__init__()
        if kind not in EXPANSIONS:
            hint = did_you_mean(kind, EXPANSIONS)
            raise ConfigError(f"distance_function is one of {', '.join(EXPANSIONS)}, not {kind!r}.{hint}")
        if count < 2:
            raise ConfigError(f"edge_distance_expansion_size is at least 2, not {count}.")
        self.kind, self.spacing = kind, cutoff / (count - 1)
        self.register_buffer("centres", torch.linspace(0.0, cutoff, count), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        """`(...)` in Å -> `(..., count)`."""
        offset = distance[..., None] - self.centres
        if self.kind == "gaussian":
            return (offset.square() * (-0.5 / (2 * self.spacing) ** 2)).exp()
        argument = offset * (2 / self.spacing)
        steps = argument.sigmoid()
        return steps if self.kind == "sigmoid" else steps + 0.001 * argument
