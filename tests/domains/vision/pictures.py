"""Small coloured images in class folders, for the tests of the vision domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (210, 50, 40)}


def picture(colour: str, seed: int, size: tuple[int, int] = (24, 28)) -> Image.Image:
    """Noise around a colour, `size` = height, width."""
    noise = np.random.default_rng(seed).normal(0, 40, (*size, 3))
    return Image.fromarray((noise + COLOURS[colour]).clip(0, 255).astype(np.uint8))


def folders(root: Path, counts: dict[str, int], first: int = 0) -> Path:
    """`root/class/class_number.png` for so many images of each colour."""
    for colour, count in counts.items():
        (root / colour).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + count):
            picture(colour, i).save(root / colour / f"{colour}_{i}.png")
    return root
