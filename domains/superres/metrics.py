"""PSNR and SSIM as the tables of super-resolution have them.

Two flavours. Rounded: the picture as it would be saved, clamped and rounded to 8 bits, as in most tables.
Raw: the output of the network as it is, with 1e-8 inside the logarithm (the validation of CATANet).

Pictures are `(H, W, C)`, uint8 or float in [0, 1]; the mean over pictures is unweighted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
from scipy.ndimage import correlate1d

from zoo.errors import DataError

PEAK = 255.0
LUMA = np.array([65.481, 128.553, 24.966])
"""BT.601 studio range, of R, G and B in [0, 1]; plus 16."""
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
WINDOW, SIGMA = 11, 1.5
RAW_EPSILON = 1e-8


@dataclass(frozen=True)
class Quality:
    """How near a picture is to its original."""

    psnr_y: float
    ssim_y: float
    psnr_rgb: float
    ssim_rgb: float
    psnr_y_raw: float
    """Of the unrounded picture, as `ssim_y_raw`."""
    ssim_y_raw: float


def judge(sr: np.ndarray, hr: np.ndarray, border: int) -> Quality:
    """Both flavours of every metric.

    Args:
        sr: `(H, W, 3)` float, the unclamped output in [0, 1], or uint8.
        hr: `(H, W, 3)` uint8.
        border: pixels that are left out on each side.

    Raises:
        DataError: the sizes differ, or nothing is left inside the border.
    """
    rounded = to_uint8(sr)
    return Quality(
        psnr_y=psnr(to_y(rounded), to_y(hr), border),
        ssim_y=ssim(to_y(rounded), to_y(hr), border),
        psnr_rgb=psnr(rounded, hr, border),
        ssim_rgb=ssim(rounded, hr, border),
        psnr_y_raw=psnr_raw(to_y(sr), to_y(hr), border),
        ssim_y_raw=ssim(to_y(sr), to_y(hr), border),
    )


def mean(rows: Iterable[Quality]) -> Quality:
    """The score of a data set."""
    values: list[Mapping[str, float]] = [asdict(row) for row in rows]
    return Quality(**{name: float(np.mean([row[name] for row in values])) for name in values[0]})


def to_uint8(image: np.ndarray) -> np.ndarray:
    """Clamped to [0, 1], times 255, rounded half to even: how pictures are saved."""
    if image.dtype == np.uint8:
        return image
    return np.round(np.clip(image, 0.0, 1.0) * PEAK).astype(np.uint8)


def to_y(image: np.ndarray) -> np.ndarray:
    """`(H, W)` float64 luma in 16 to 235, not rounded.

    Through float32, as the programs whose figures are published compute it.
    """
    scaled = image.astype(np.float32) / np.float32(PEAK) if image.dtype == np.uint8 else image
    y = (scaled.astype(np.float32) @ LUMA + 16.0) / PEAK
    return (y.astype(np.float32) * np.float32(PEAK)).astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """10 log10(255^2 / mse) in dB of values of 0 to 255; infinite where the pictures are equal."""
    error = _mse(a, b, border)
    return 10 * math.log10(PEAK**2 / error) if error else math.inf


def psnr_raw(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """10 log10(1 / (mse + 1e-8)) in dB of values of 0 to 255 that are scaled to [0, 1]; at most 80."""
    return 10 * math.log10(1 / (_mse(a, b, border) / PEAK**2 + RAW_EPSILON))


def ssim(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """Structural similarity (Wang et al. 2004) of values of 0 to 255, mean over the map and the channels.

    Gaussian window of 11 x 11, sigma 1.5, valid region only.

    Raises:
        DataError: less than 11 pixels are left inside the border.
    """
    a, b = (_inside(image, border).astype(np.float64) for image in _same_size(a, b))
    if min(a.shape[:2]) < WINDOW:
        raise DataError(
            f"SSIM needs {WINDOW} x {WINDOW} pixels inside a border of {border}; "
            f"{a.shape[1]} x {a.shape[0]} are left."
        )
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (var_a + var_b + C2)
    return float((luminance * structure).mean())


def _mse(a: np.ndarray, b: np.ndarray, border: int) -> float:
    a, b = (_inside(image, border).astype(np.float64) for image in _same_size(a, b))
    return float(((a - b) ** 2).mean())


def _blur(image: np.ndarray) -> np.ndarray:
    """Gaussian means, of the pixels whose window lies inside."""
    half = WINDOW // 2
    weights = np.exp(-(np.arange(-half, half + 1) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    blurred = correlate1d(correlate1d(image, weights, axis=0), weights, axis=1)
    return blurred[half:-half, half:-half]


def _inside(image: np.ndarray, border: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) <= 2 * border:
        raise DataError(f"Nothing is left of {width} x {height} pixels inside a border of {border}.")
    return image[border : height - border, border : width - border]


def _same_size(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise DataError(
            f"The pictures differ in size: {a.shape[1]} x {a.shape[0]} and {b.shape[1]} x {b.shape[0]}."
        )
    return a, b
