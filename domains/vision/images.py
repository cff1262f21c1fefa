"""Image files of any kind to pictures of known channels: what a photo album, a scanner or a satellite leaves.

A picture is a PIL image of mode RGB, or for other than 1 and 3 channels an array `(H, W, C)` float32 whose 1
is full scale.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from zoo.errors import DataError

EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .bmp .gif .webp .tif .tiff .ppm .pgm .pbm .npy".split()  # noqa: SIM905
)
"""Suffixes of files that count as images."""

Picture = Image.Image | np.ndarray

FULL_SCALE = {"u1": 255.0, "u2": 65535.0, "f2": 1.0, "f4": 1.0, "f8": 1.0, "b1": 1.0}
TAIL = 4096
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What stands near the end of a file that is complete."""


def is_image(path: Path) -> bool:
    """Whether the suffix is one of an image, and the file not hidden."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def read_image(path: str | Path, *, channels: int = 3, max_value: float | None = None) -> Picture:
    """Decode a file, upright as its EXIF tag says, first frame only.

    For 1 or 3 channels: grey, palette, CMYK and the like become RGB, transparent places white, and 16-bit and
    floating-point pixels are scaled to 8 bits. Otherwise: TIFF or `.npy`, `(H, W, C)` or `(C, H, W)`.

    Args:
        channels: bands that the model takes.
        max_value: pixel value that is full scale; by default 255 of 8 bits, 65535 of 16 bits, 1 of floats.

    Raises:
        DataError: no image, or a damaged one, or one of other bands; names the file and the reason.
    """
    path = Path(path)
    try:
        if channels not in (1, 3):
            return _bands(_array(path), path, channels, max_value)
        if path.suffix.lower() == ".npy":
            return _from_array(_bands(_array(path), path, channels, max_value))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                image.load()
                return to_rgb(image, max_value)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{path} cannot be read as an image: {_reason(error)}") from None


def to_rgb(image: Image.Image, max_value: float | None = None) -> Image.Image:
    """A PIL image of any mode, upright and as 8-bit RGB.

    Raises:
        DataError: integers of 32 bits without `max_value`.
    """
    upright = ImageOps.exif_transpose(image)
    image = upright if upright is not None else image
    if image.mode.startswith("I") or image.mode == "F":
        return _from_array(_scaled(image, max_value)[..., None])
    if max_value is not None and image.mode in ("L", "RGB"):
        return _from_array(np.atleast_3d(np.asarray(image, np.float32) / max_value))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def check_image(path: Path, channels: int = 3) -> str | None:
    """Why a file is no complete image, as far as its first and last bytes tell; None if they tell nothing."""
    try:
        if path.suffix.lower() == ".npy" or channels not in (1, 3):
            _array(path, lazily=True)
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                if not _has_end(path, image.format):
                    image.load()
    except Exception as error:  # as above
        return _reason(error)
    return None


def to_picture(value: Any, max_value: float | None = None) -> Picture:
    """What a data set of torchvision gives as an image, a PIL image or an array, as a picture."""
    if isinstance(value, Image.Image):
        return to_rgb(value, max_value)
    return _from_array(np.asarray(value, np.float32))


def _has_end(path: Path, kind: str | None) -> bool:
    if kind not in ENDS:
        return True
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return ENDS[kind] in file.read()


def _scaled(image: Image.Image, max_value: float | None) -> np.ndarray:
    """`(H, W)` float32 of a grey image of more than 8 bits."""
    pixels = np.asarray(image)
    if image.mode == "I" and max_value is None:
        if image.format not in ("PNG", "PPM"):
            raise DataError(
                f"{getattr(image, 'filename', 'An image')} has 32-bit integers: say what counts as full "
                "scale with data.max_value."
            )
        max_value = 65535.0  # how older Pillow opens 16-bit PNG
    return pixels.astype(np.float32) / (max_value or (1.0 if image.mode == "F" else 65535.0))


def _from_array(pixels: np.ndarray) -> Image.Image:
    """`(H, W, 1 or 3)`, 1 being full scale, to RGB."""
    eight = (pixels.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(np.repeat(eight, 3, axis=2) if eight.shape[2] == 1 else eight)


def _array(path: Path, lazily: bool = False) -> np.ndarray:
    """The bands of a `.npy` or TIFF file, in its own layout and type; lazily: pixels may stay on disk."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return np.load(path, mmap_mode="r" if lazily else None, allow_pickle=False)
    if suffix in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as file:
            return np.empty(file.series[0].shape, file.series[0].dtype) if lazily else file.asarray()
    with Image.open(path) as image:
        return np.asarray(image)


def _bands(pixels: np.ndarray, path: Path, channels: int, max_value: float | None) -> np.ndarray:
    """`(H, W, C)` float32, 1 being full scale."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim == 3 and pixels.shape[2] != channels and pixels.shape[0] == channels:
        pixels = np.moveaxis(pixels, 0, 2)
    if pixels.ndim != 3 or pixels.shape[2] != channels:
        raise DataError(
            f"{path} holds {'x'.join(map(str, pixels.shape))}; {channels} bands are expected "
            "(data.channels), before or behind height and width."
        )
    kind = pixels.dtype.str[1:]
    if max_value is None and kind not in FULL_SCALE:
        raise DataError(f"{path} holds {pixels.dtype}: say what counts as full scale with data.max_value.")
    scaled = pixels.astype(np.float32) / (FULL_SCALE[kind] if max_value is None else max_value)
    return np.nan_to_num(scaled, nan=0.0)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format is recognised"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
