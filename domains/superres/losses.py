"""What training minimises: differences of pixels and of spectra, alone or mixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from zoo.errors import ConfigError, did_you_mean

Loss = Callable[[Tensor, Tensor], Tensor]


def build_loss(*, name: str | None = "l1", eps: float = 1e-3) -> Loss:
    """A loss of `(B, 3, H, W)` pictures, 0-dimensional.

    Args:
        name: `l1`, `charbonnier`, `fft` or a mix such as `charbonnier+0.05*fft`; None is `l1`.
        eps: of Charbonnier.

    Raises:
        ConfigError: there is no such loss, or a weight is no positive number.
    """
    losses: dict[str, Loss] = {"l1": l1, "charbonnier": partial(charbonnier, eps=eps), "fft": fft}
    terms = [_term(text.strip(), name or "l1") for text in (name or "l1").split("+")]
    for _, term in terms:
        if term not in losses:
            raise ConfigError(
                f"There is no loss.name={term}.{did_you_mean(term, losses)} "
                f"Losses: {', '.join(losses)}, or a mix such as l1+0.05*fft."
            )
    if eps <= 0:
        raise ConfigError(f"loss.eps={eps}: a positive number is needed.")

    def mix(sr: Tensor, hr: Tensor) -> Tensor:
        return torch.stack([weight * losses[term](sr, hr) for weight, term in terms]).sum()

    return mix


def _term(text: str, whole: str) -> tuple[float, str]:
    """`0.05*fft` -> (0.05, "fft")."""
    factor, star, term = text.rpartition("*")
    try:
        weight = float(factor) if star else 1.0
    except ValueError:
        weight = -1.0
    if not weight > 0:
        raise ConfigError(f"loss.name={whole}: {factor!r} is no positive number.")
    return weight, term.strip()


def l1(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of |sr - hr|."""
    return (sr - hr).abs().mean()


def charbonnier(sr: Tensor, hr: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt((sr - hr)^2 + eps^2) (Lai et al. 2017)."""
    return ((sr - hr).square() + eps**2).sqrt().mean()


def fft(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean of |Re| and |Im| of the difference of the 2-D spectra (Cho et al. 2021), in float32."""
    spectrum = torch.fft.rfft2((sr - hr).float())
    return torch.view_as_real(spectrum).abs().mean()
