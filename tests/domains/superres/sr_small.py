"""Small pictures and a small model for the tests of super-resolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import zoo

TINY = {"dim": 6, "groups": 1, "num_heads": 3, "scale": 2}
"""Of `dlgsanet_mini`."""


def tiny(**changes: Any) -> nn.Module:
    """A DLGSANet of some 2,000 weights, in eval mode; zero where it learns, so that pictures look alike."""
    torch.manual_seed(0)
    return zoo.create_model("dlgsanet_mini", **(TINY | changes)).eval()


class Local(nn.Module):
    """Two convolutions: an output pixel depends on the five low-resolution pixels around it."""

    min_size = 1

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3 * scale**2, 3, padding=1)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(tuple(x.shape))
        return nn.functional.pixel_shuffle(self.last(self.first(x).relu()), self.scale)


class Repeat(nn.Module):
    """Every pixel s x s times."""

    min_size = 1

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def smooth(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """`(H, W, C)` uint8 of soft waves."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [
        np.sin(x / draw.uniform(5, 15) + 2 * c) + np.cos(y / draw.uniform(5, 15) - c) for c in range(channels)
    ]
    return np.round(127 + 55 * np.stack(waves, 2)).astype(np.uint8)


def write(path: Path, pixels: np.ndarray) -> Path:
    """A PNG (or what the suffix says) of `(H, W, C)` uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(cast(Any, pixels[..., 0] if pixels.shape[2] == 1 else pixels)).save(path)
    return path


def write_many(folder: Path, count: int, size: tuple[int, int] = (40, 44)) -> Path:
    """`p0.png`, `p1.png`, ... of different waves."""
    for i in range(count):
        write(folder / f"p{i}.png", smooth(*size, seed=i))
    return folder
