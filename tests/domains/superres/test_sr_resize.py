"""MATLAB's bicubic rule."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from domains.superres.resize import degrade, imresize, modcrop
from zoo.errors import DataError

NOISE = np.random.default_rng(0).integers(0, 256, (37, 50, 3)).astype(np.uint8)
SOFT = NOISE // 3 + 80
"""That overshoots do not clip."""


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["baby", "bird", "butterfly", "head", "woman"])
def test_low_resolution_of_set5_equals_the_published_files_in_every_byte(
    shared_data: Path, name: str, scale: int
) -> None:
    folder = shared_data / "superres" / "Set5"
    hr = np.asarray(Image.open(folder / "HR" / f"{name}.png").convert("RGB"))
    published = Image.open(folder / "LR_bicubic" / f"X{scale}" / f"{name}x{scale}.png").convert("RGB")
    np.testing.assert_array_equal(degrade(hr, scale), np.asarray(published))


@pytest.mark.parametrize("scale", [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4), 2, 3, 4])
def test_a_constant_stays_constant(scale: Fraction | int) -> None:
    grey = np.full((24, 36), 200, np.uint8)
    assert (imresize(grey, scale) == 200).all()


def test_sizes_are_rounded_up_by_imresize_and_down_by_degrade() -> None:
    assert imresize(NOISE, Fraction(1, 3)).shape == (13, 17, 3)
    assert degrade(NOISE, 3).shape == (12, 16, 3)
    assert modcrop(NOISE, 3).shape == (36, 48, 3)
    assert imresize(NOISE, 2).shape == (74, 100, 3)


def test_up_sampling_by_two_of_a_row_is_the_cubic_of_keys() -> None:
    """Between pixels at a quarter, the weights of a = -1/2 are (-9, 111, 29, -3) / 128."""
    row = np.array([[1.0, 5.0, 2.0, 8.0, 3.0, 7.0]])
    expected = (-9 * row[0, 1] + 111 * row[0, 2] + 29 * row[0, 3] - 3 * row[0, 4]) / 128
    assert imresize(row, 2)[0, 5] == pytest.approx(expected, abs=1e-12)


def test_integers_are_rounded_after_each_pass() -> None:
    """Height first: doing both passes in floats gives other samples."""
    floats = np.floor(imresize(SOFT.astype(float), Fraction(1, 2)) + 0.5)
    assert (imresize(SOFT, Fraction(1, 2)) != floats).any()
    assert np.abs(imresize(SOFT, Fraction(1, 2)) - floats).max() <= 1


def test_sixteen_bits_are_rounded_to_sixteen_bits() -> None:
    deep = SOFT.astype(np.uint16) * 257
    small = imresize(deep, Fraction(1, 2))
    assert small.dtype == np.uint16
    assert np.abs(small / 257 - imresize(SOFT, Fraction(1, 2))).max() <= 1.01


def test_floats_are_neither_clipped_nor_rounded() -> None:
    edge = np.zeros((8, 8))
    edge[:, 4:] = 1.0
    assert imresize(edge, 2).min() < -0.05
    assert imresize(edge, 2).max() > 1.05


def test_borders_are_mirrored_with_the_edge_sample() -> None:
    mirrored = np.concatenate([NOISE[::-1], NOISE, NOISE[::-1]])
    inside = imresize(mirrored.astype(float), 2)[2 * len(NOISE) : 4 * len(NOISE)]
    np.testing.assert_allclose(inside, imresize(NOISE.astype(float), 2), atol=1e-9)


def test_a_picture_below_the_scale_is_refused() -> None:
    with pytest.raises(DataError, match="50x3 pixels cannot be reduced 4 times"):
        degrade(NOISE[:3], 4)
