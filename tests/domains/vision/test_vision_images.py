"""Decoding: every kind of file a camera, scanner or satellite leaves becomes the same picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from domains.vision.images import check_image, read_image
from zoo.errors import DataError


def ramp(height: int = 24, width: int = 36) -> np.ndarray:
    """A smooth colour picture `(H, W, 3)` uint8, wider than high."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], 2).astype(np.uint8)


def grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))


@pytest.mark.parametrize(
    ("name", "mode", "tolerance"),
    [
        ("a.png", "RGB", 0),
        ("a.jpg", "RGB", 4),
        ("a.jpg", "CMYK", 4),
        ("a.tif", "CMYK", 1),
        ("a.webp", "RGB", 6),
    ],
)
def test_colour_files_keep_their_colours(name: str, mode: str, tolerance: int, tmp_path: Path) -> None:
    Image.fromarray(ramp()).convert(mode).save(tmp_path / name)
    picture = read_image(tmp_path / name)
    assert (picture.mode, picture.size) == ("RGB", (36, 24))
    assert np.abs(np.asarray(picture, int) - ramp()).mean() <= tolerance


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_not_clipped(name: str, tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 24 * 36).reshape(24, 36).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / name)
    read = np.asarray(read_image(tmp_path / name), int)
    assert np.abs(read[..., 0] - levels / 257).max() <= 1
    assert (read[..., 0] == read[..., 2]).all()


def test_max_value_says_what_is_full_scale(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2000, np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png", max_value=4000)).max() == 128
    Image.fromarray(np.full((4, 4), 8, np.uint8)).save(tmp_path / "b.png")
    assert np.asarray(read_image(tmp_path / "b.png", max_value=16)).max() == 128


def test_palette_grey_and_transparent_images_become_rgb_on_white(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30] + [0] * 765)
    palette.save(tmp_path / "p.png")
    assert read_image(tmp_path / "p.png").getpixel((0, 0)) == (10, 20, 30)
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    assert read_image(tmp_path / "l.png").getpixel((0, 0)) == (77, 77, 77)
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_photo_taken_sideways_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways = Image.fromarray(ramp()).transpose(Image.Transpose.ROTATE_90)
    sideways.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = read_image(tmp_path / "a.jpg")
    assert upright.size == (36, 24)
    assert np.abs(np.asarray(upright, int) - ramp()).mean() < 4


@pytest.mark.parametrize("first", [True, False], ids=["bands first", "bands last"])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
def test_many_bands_are_read_from_arrays_and_tiff(suffix: str, first: bool, tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 10000, (13, 8, 9)).astype(np.uint16)
    stored = bands if first else np.moveaxis(bands, 0, 2)
    if suffix == "npy":
        np.save(tmp_path / "a.npy", stored)
    else:
        tifffile.imwrite(tmp_path / "a.tif", stored)
    read = read_image(tmp_path / f"a.{suffix}", channels=13, max_value=10000)
    np.testing.assert_allclose(read, np.moveaxis(bands, 0, 2) / 10000, atol=1e-6)


def test_other_bands_than_the_model_takes_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 9, 4), np.uint8))
    with pytest.raises(DataError, match=r"a\.npy holds 8x9x4; 13 bands are expected \(data\.channels\)"):
        read_image(tmp_path / "a.npy", channels=13)


def test_integers_of_unknown_range_ask_for_one(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 9, 4), np.int32))
    with pytest.raises(DataError, match=r"int32: say what counts as full scale with data\.max_value"):
        read_image(tmp_path / "a.npy", channels=4)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_truncated_file_is_found_by_its_end(name: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    assert check_image(tmp_path / name) is None
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    assert check_image(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image: .*"):
        read_image(tmp_path / name)


def test_a_text_file_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no image")
    assert check_image(tmp_path / "a.jpg") == "no image format is recognised"
    with pytest.raises(DataError, match="no image format is recognised"):
        read_image(tmp_path / "a.jpg")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*missing\.jpg"):
        read_image(tmp_path / "missing.jpg")
