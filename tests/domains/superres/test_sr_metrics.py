"""PSNR and SSIM against their definitions; `tests/parity` holds them to recorded figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from domains.superres.metrics import judge, mean, psnr, ssim, to_uint8, to_y
from zoo.errors import DataError

DRAW = np.random.default_rng(0)
A = DRAW.integers(0, 256, (40, 50, 3)).astype(np.uint8)
B = np.clip(A + DRAW.integers(-20, 21, A.shape), 0, 255).astype(np.uint8)


def test_luma_of_black_and_white_is_16_and_235() -> None:
    assert to_y(np.zeros((1, 1, 3), np.uint8))[0, 0] == pytest.approx(16, abs=1e-5)
    assert to_y(np.full((1, 1, 3), 255, np.uint8))[0, 0] == pytest.approx(235, abs=1e-4)
    np.testing.assert_allclose(to_y(A), to_y(A / 255), atol=1e-4)


def test_psnr_is_of_what_lies_inside_the_border() -> None:
    c = A.copy()
    c[:3], c[-3:], c[:, :3], c[:, -3:] = 0, 0, 0, 0
    assert math.isinf(psnr(A, c, 3))
    assert math.isfinite(psnr(A, c, 2))
    assert psnr(A, A - np.minimum(A, 1), 0) > 48.1


def test_equal_pictures_are_infinitely_good_rounded_and_80_db_raw() -> None:
    quality = judge(A, A, 2)
    assert math.isinf(quality.psnr_y)
    assert quality.psnr_y_raw == pytest.approx(80)
    assert quality.ssim_y == pytest.approx(1)


def test_the_mean_over_pictures_is_unweighted() -> None:
    found = mean([judge(A, B, 2), judge(A[:20], B[:20], 2)])
    assert found.psnr_y == pytest.approx((judge(A, B, 2).psnr_y + judge(A[:20], B[:20], 2).psnr_y) / 2)


def test_raw_output_is_neither_clamped_nor_rounded() -> None:
    over = A / 255 + 0.3
    clamped = judge(over.clip(0, 1), A, 2)
    assert judge(over, A, 2).psnr_y == pytest.approx(clamped.psnr_y)
    assert judge(over, A, 2).psnr_y_raw < clamped.psnr_y_raw


def test_halves_are_rounded_to_even() -> None:
    assert to_uint8(np.array([0.5, 1.5, 2.5, -1, 300]) / 255).tolist() == [0, 2, 2, 0, 255]


def test_ssim_of_colours_is_the_mean_over_channels() -> None:
    assert ssim(A, B, 1) == pytest.approx(np.mean([ssim(A[..., i], B[..., i], 1) for i in range(3)]))


def test_ssim_of_one_window_is_its_definition() -> None:
    a, b = A[:11, :11, 0].astype(float), B[:11, :11, 0].astype(float)
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    covariance = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 6.5025, 58.5225
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    expected /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    assert ssim(a, b, 0) == pytest.approx(expected, abs=1e-10)


def test_sizes_that_differ_and_borders_that_leave_nothing_are_named() -> None:
    with pytest.raises(DataError, match="differ in size: 50 x 40 and 50 x 39"):
        judge(A, A[1:], 2)
    with pytest.raises(DataError, match="border of 20"):
        psnr(A, B, 20)
    with pytest.raises(DataError, match="11 x 11 pixels inside a border of 16"):
        ssim(A, B, 16)
