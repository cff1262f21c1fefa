"""What EScAIP and AllScAIP have in common: activations, norms, linear maps, angular attention logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError, did_you_mean

RMS_EPS = 1.1920928955078125e-07
"""Machine epsilon of float32, in any precision."""
LAYER_NORM_EPS = 1e-5


def squared_relu(x: Tensor) -> Tensor:
    """`relu(x)^2` (So et al. 2021)."""
    return x.relu().square()


def star_relu(x: Tensor) -> Tensor:
    """`0.8944 relu(x)^2 - 0.4472` (Yu et al. 2022)."""
    return 0.8944 * x.relu().square() - 0.4472


def smelu(x: Tensor) -> Tensor:
    """x above 2, `(x + 2)^2 / 8` from -2 to 2, 0 below (Shamir et al. 2020)."""
    return torch.where(x >= 2, x, (x + 2).clamp(min=0).square() / 8)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "squared_relu": squared_relu,
    "star_relu": star_relu,
    "smelu": smelu,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rmsnorm": lambda width: nn.RMSNorm(width, eps=RMS_EPS),
    "layernorm": lambda width: nn.LayerNorm(width, eps=LAYER_NORM_EPS),
    "skip": lambda width: nn.Identity(),
}


def check_choice(name: str, value: str, known: Mapping[str, object] | Sequence[str]) -> None:
    """A ConfigError where an option is none of those known."""
    if value not in known:
        raise ConfigError(f"{name} is one of {', '.join(known)}, not {value!r}.{did_you_mean(value, known)}")


def check_heads(width: int, heads: int, groups: Sequence[int] | None) -> None:
    """A ConfigError where heads do not share the width, or groups of channels do not fill a head."""
    if heads < 1 or width % heads:
        raise ConfigError(f"hidden_size={width} is not divisible by num_heads={heads}.")
    if groups is not None and sum(groups) != width // heads:
        raise ConfigError(
            f"frequency_list={list(groups)} adds up to {sum(groups)}, but a head has "
            f"hidden_size / num_heads = {width // heads} channels."
        )


class Dense(nn.Linear):
    """A linear map, its activation and dropout."""

    def __init__(self, width: int, out: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__(width, out)
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, input: Tensor) -> Tensor:
        return self.finish(super().forward(input))

    def finish(self, x: Tensor) -> Tensor:
        """What follows the products, for those who compute them in parts."""
        return F.dropout(self.activation(x), self.dropout, self.training)


class FeedForward(nn.Module):
    """`fc2(activation(fc1(x)))`, with `multiplier` times the width inside; one linear map for 0."""

    def __init__(
        self, width: int, multiplier: int, activation: str, dropout: float = 0.0, out: int | None = None
    ) -> None:
        super().__init__()
        out = width if out is None else out
        self.fc1 = nn.Linear(width, multiplier * width if multiplier else out)
        self.fc2 = nn.Linear(multiplier * width, out) if multiplier else None
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.fc2 is not None:
            x = self.fc2(F.dropout(self.activation(x), self.dropout, self.training))
        return F.dropout(x, self.dropout, self.training)


def turned_logits(
    q: Tensor, k: Tensor, groups: Sequence[int], planes: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose channels turn with the harmonics of their neighbours' directions.

    Channels of degree l are multiplied by `Y_lm / sqrt(2l + 1)` for all m. By the addition theorem the logits
    are `sum_l (q_l . k_l) P_l(cos angle)`: the products stay as wide as a head.

    Args:
        q, k: `(N, h, n, c)`, before the scale.
        groups: channels of each degree, together c.
        planes: `(N, 1, n, n)`, the Legendre polynomials of degree 1 and up.

    Returns:
        The channels of degree 0 of queries and keys, which no direction turns, and the scaled logits
        `(N, h, n, n)` of the others.
    """
    (q0, *queries), (k0, *keys) = q.split(list(groups), -1), k.split(list(groups), -1)
    turned = q.new_zeros(())
    for q_l, k_l, plane in zip(queries, keys, planes, strict=True):
        if q_l.shape[-1]:
            turned = turned + (q_l * scale) @ k_l.mT * plane[:, :, : q.shape[2]]
    if not groups[0]:
        q0, k0 = q.new_zeros(*q.shape[:-1], 1), k.new_zeros(*k.shape[:-1], 1)
    return q0, k0, turned
