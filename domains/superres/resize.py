"""MATLAB's bicubic `imresize`, which made the low-resolution pictures of every published table.

Pictures are arrays `(H, W)` or `(H, W, C)`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np

from zoo.errors import DataError

KERNEL_WIDTH = 4
"""Taps of the cubic of Keys (1981) with a = -1/2."""


def imresize(image: np.ndarray, scale: float | Fraction) -> np.ndarray:
    """Resize a picture as MATLAB's `imresize(image, scale, 'bicubic')` does, antialiased when it shrinks.

    Integers are clipped and rounded half up after each of the two passes, height first, as MATLAB does for
    uint8; the result has their type. Floats are neither clipped nor rounded; the result is float64.

    Args:
        image: `(H, W)` or `(H, W, C)` of uint8, uint16 or floats.
        scale: output size over input size; sizes are rounded up.
    """
    exact = Fraction(scale).limit_denominator(1000)
    result = image
    for axis in (0, 1):
        result = _resize_axis(result, exact, axis)
        if image.dtype.kind == "u":
            top = np.iinfo(image.dtype).max
            result = np.floor(result.clip(0, top) + 0.5).astype(image.dtype)
    return result


def degrade(hr: np.ndarray, scale: int) -> np.ndarray:
    """The low-resolution picture of the benchmarks: cropped to a multiple of `scale`, then resized.

    Args:
        hr: `(H, W)` or `(H, W, C)`.

    Returns:
        `(H // scale, W // scale[, C])` of the same type; of floats, float64.

    Raises:
        DataError: the picture is smaller than `scale` pixels.
    """
    if min(hr.shape[:2]) < scale:
        raise DataError(f"A picture of {hr.shape[1]}x{hr.shape[0]} pixels cannot be reduced {scale} times.")
    return imresize(modcrop(hr, scale), Fraction(1, scale))


def modcrop(image: np.ndarray, scale: int) -> np.ndarray:
    """Without the rows and columns at bottom and right beyond a multiple of `scale`."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def _resize_axis(image: np.ndarray, scale: Fraction, axis: int) -> np.ndarray:
    """One pass, float64: the taps of all outputs are summed tap by tap."""
    indices, weights = _taps(image.shape[axis], scale)
    sources = np.ascontiguousarray(np.moveaxis(image, axis, 0)) if axis else image
    shape = (-1, *[1] * (image.ndim - 1))
    total = np.zeros((len(indices), *sources.shape[1:]))
    for tap in range(indices.shape[1]):
        total += sources[indices[:, tap]] * weights[:, tap].reshape(shape)
    return np.moveaxis(total, 0, axis) if axis else total


@lru_cache(maxsize=64)
def _taps(length: int, scale: Fraction) -> tuple[np.ndarray, np.ndarray]:
    """Places `(m, taps)` in an axis of `length` that each of the m outputs is a sum of, and their weights.

    Two taps more than the kernel is wide make a rounding error in the leftmost place harmless; taps whose
    weight is zero for every output are left out.
    """
    inverse, stretch = float(1 / scale), min(float(scale), 1.0)
    support = KERNEL_WIDTH / stretch
    outputs = np.arange(1, math.ceil(length * scale) + 1, dtype=np.float64)
    centres = outputs * inverse + 0.5 * (1 - inverse)
    left = np.floor(centres - support / 2)
    places = left[:, None] + np.arange(math.ceil(support) + 2)
    weights = _cubic(stretch * (centres[:, None] - places))
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = (places.astype(np.int64) - 1) % (2 * length)
    indices = np.where(mirrored < length, mirrored, 2 * length - 1 - mirrored)
    used = weights.any(axis=0)
    return indices[:, used], weights[:, used]


def _cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
