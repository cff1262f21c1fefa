"""YaRN: rotary positions stretched beyond the trained length (Peng et al. 2023, arXiv 2309.00071)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.attention.errors import AttentionError


@dataclass(frozen=True)
class Yarn:
    """Slow frequencies are divided by `factor`, fast ones kept, and a linear ramp lies between (section 3.2).

    Args:
        factor: how much longer than `original_length` sequences may become, at least 1.
        original_length: tokens that the model was trained on.
        beta_fast, beta_slow: turns within `original_length` from which a frequency is kept, and up to which
            it is divided.
        mscale, mscale_all_dim: coefficients of the attention temperature, as in DeepSeek: 0 leaves it out.
        truncate: the ends of the ramp are whole channels.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1 or self.beta_fast <= self.beta_slow:
            raise AttentionError(f"YaRN needs factor >= 1, a length, and beta_fast > beta_slow, not {self}")

    def tables(self, positions: Tensor, width: int, *, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
        """Cosine and sine `(..., N, width / 2)` of positions `(..., N)`, times the table's temperature."""
        angles = positions.float()[..., None] * self.frequencies(width, theta, positions.device)
        return angles.cos() * self.table_scale, angles.sin() * self.table_scale

    def frequencies(self, width: int, theta: float, device: torch.device) -> Tensor:
        """Angles per token `(width / 2,)`."""
        if width < 2 or width % 2:
            raise AttentionError(f"rotary width must be even and positive, not {width}")
        own = theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        low, high = (self._pair(turns, width, theta) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        place = torch.arange(width // 2, device=device, dtype=torch.float32)
        divided = ((place - low) / max(high - low, 1e-3)).clamp(0, 1)
        return own * (1 - divided) + own / self.factor * divided

    def _pair(self, turns: float, width: int, theta: float) -> float:
        """The (real-valued) pair of channels that turns so often within the original length."""
        return width * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))

    def _temperature(self, coefficient: float) -> float:
        return 0.1 * coefficient * math.log(self.factor) + 1

    @property
    def table_scale(self) -> float:
        """What cosine and sine are multiplied with."""
        if self.mscale and self.mscale_all_dim:
            return self._temperature(self.mscale) / self._temperature(self.mscale_all_dim)
        return self._temperature(1.0)

    @property
    def score_scale(self) -> float:
        """What all scores are multiplied with (DeepSeek-V2)."""
        return self._temperature(self.mscale_all_dim) ** 2
