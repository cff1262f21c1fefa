"""Picture files: what is read, what is kept, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, ImageOps
from sr_small import smooth, write

from domains.superres.images import ORIENTATION, Picture, picture_size, read_picture, read_rgb, write_picture
from zoo.errors import ConfigError, DataError, ZooError

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = PROFILE[:16] + b"GRAY" + PROFILE[20:]


def _noise(dtype: type, channels: int) -> np.ndarray:
    top = np.iinfo(dtype).max + 1
    return np.random.default_rng(0).integers(0, top, (19, 23, channels)).astype(dtype)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_formats_keep_every_sample_and_the_profile(
    dtype: type, channels: int, suffix: str, tmp_path: Path
) -> None:
    pixels, icc = _noise(dtype, channels), PROFILE if channels > 2 else GREY_PROFILE
    write_picture(Picture(pixels, icc), tmp_path / f"a{suffix}")
    found = read_picture(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.pixels.dtype == dtype
    assert found.icc == icc


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats_are_near_and_keep_profile_and_exif(suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0110] = "camera"
    write_picture(Picture(smooth(40, 50), PROFILE, exif.tobytes()), tmp_path / f"a{suffix}")
    found = read_picture(tmp_path / f"a{suffix}")
    assert np.abs(found.pixels.astype(int) - smooth(40, 50)).mean() < 2
    assert found.icc == PROFILE
    loaded = Image.Exif()
    loaded.load(found.exif or b"")
    assert loaded[0x0110] == "camera"


def test_webp_of_quality_100_is_lossless(tmp_path: Path) -> None:
    write_picture(Picture(_noise(np.uint8, 4)), tmp_path / "a.webp", quality=100)
    alpha = _noise(np.uint8, 4)[..., 3]
    found = read_picture(tmp_path / "a.webp").pixels
    np.testing.assert_array_equal(found[alpha > 0], _noise(np.uint8, 4)[alpha > 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(_noise(np.uint8, 3)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    found = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(found.pixels, upright)
    assert picture_size(tmp_path / "a.png") == found.size
    assert found.exif is None


def test_palettes_are_colours_and_transparent_where_they_say_so(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(20, 24)).quantize(8)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").pixels, np.asarray(image.convert("RGB")))
    image.save(tmp_path / "b.png", transparency=0)
    found = read_picture(tmp_path / "b.png")
    np.testing.assert_array_equal(found.pixels[..., 3] == 0, np.asarray(image) == 0)


def test_a_colour_key_in_rgb_is_transparency(tmp_path: Path) -> None:
    pixels = smooth(8, 8)
    pixels[0, 0] = (1, 2, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png", transparency=(1, 2, 3))
    alpha = read_picture(tmp_path / "a.png").alpha
    assert alpha is not None
    assert alpha[0, 0, 0] == 0
    assert (alpha == 0).sum() == 1


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    Image.fromarray(smooth(20, 24)).convert("CMYK").save(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg").pixels.shape == (20, 24, 3)


def test_cmyk_of_sixteen_bits_is_refused(tmp_path: Path) -> None:
    """Its four channels are not RGB and alpha."""
    tifffile.imwrite(tmp_path / "a.tif", _noise(np.uint16, 4), photometric="separated")
    with pytest.raises(DataError, match=r"a\.tif holds 16-bit SEPARATED, not grey or RGB"):
        read_picture(tmp_path / "a.tif")


def test_planar_tiff_of_sixteen_bits(tmp_path: Path) -> None:
    pixels = _noise(np.uint16, 3)
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate"
    )
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, pixels)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_what_is_no_picture_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.png cannot be read as a picture"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(("suffix", "dtype"), [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint16)])
def test_truncated_files_are_named(suffix: str, dtype: type, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_picture(Picture(_noise(dtype, 3)), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\{suffix} cannot be read as a picture"):
        read_picture(path)


def test_floats_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.float32), photometric="rgb")
    with pytest.raises(DataError, match=r"a\.tif holds float32, not 8 or 16 bits"):
        read_picture(tmp_path / "a.tif")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*gone\.png"):
        read_picture(tmp_path / "gone.png")


@pytest.mark.parametrize(
    ("pixels", "name", "reason"),
    [
        (_noise(np.uint16, 3), "a.jpg", "JPEG holds 8 bits"),
        (_noise(np.uint16, 3), "a.webp", "WEBP holds 8 bits"),
        (_noise(np.uint8, 4), "a.jpg", "JPEG knows no transparency"),
        (_noise(np.uint8, 3), "a.gif", r"cannot write \.gif"),
        (np.zeros((1, 16384, 3), np.uint8), "a.webp", "at most 16383 pixels a side"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    pixels: np.ndarray, name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        write_picture(Picture(pixels), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(Picture(smooth(8, 8)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ZooError, match="No space left on device"):
        write_picture(Picture(smooth(9, 9)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_training_takes_opaque_pictures_of_eight_bits(tmp_path: Path) -> None:
    assert read_rgb(write(tmp_path / "grey.png", smooth(8, 9, 1))).shape == (8, 9, 3)
    opaque = np.concatenate([smooth(8, 9), np.full((8, 9, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(read_rgb(write(tmp_path / "opaque.png", opaque)), smooth(8, 9))
    opaque[0, 0, 3] = 0
    with pytest.raises(DataError, match="transparent in places"):
        read_rgb(write(tmp_path / "clear.png", opaque))
    write_picture(Picture(_noise(np.uint16, 3)), tmp_path / "deep.png")
    with pytest.raises(DataError, match="16 bits a sample"):
        read_rgb(tmp_path / "deep.png")
