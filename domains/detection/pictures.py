"""Image files of any kind as RGB, in the orientation that their annotations mean."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from zoo.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
TAIL = 4096
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
"""What stands near the end of a file that is complete."""
TURNED = range(5, 9)
"""EXIF orientations that exchange height and width."""
ORIENTATION = 0x0112


def is_picture(path: Path) -> bool:
    """Whether the suffix is one of an image, and the file not hidden."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_rgb(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode a file to 8-bit RGB: grey is repeated, 16 bits are scaled, transparent places become white.

    Args:
        size: height and width that annotations give. A file that EXIF turns is turned where that agrees with
            them; without a size, always.

    Raises:
        DataError: no image, or a damaged one; names the file and the reason.
    """
    with opened(Path(path)) as image:
        image.load()
        turned = image.getexif().get(ORIENTATION, 1) in TURNED
        if size is None or not turned or (image.height, image.width) != size:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def stored_sizes(path: Path) -> tuple[tuple[int, int], ...]:
    """Height and width as stored, and as EXIF turns them where that differs; the file's end is looked at.

    Raises:
        DataError: no complete image.
    """
    with opened(path) as image:
        height, width = image.height, image.width
        turned = image.getexif().get(ORIENTATION, 1) in TURNED
        if not _has_end(path, image.format):
            image.load()
    if not height or not width:
        raise DataError(f"{path} is an image without pixels.")
    return ((height, width), (width, height)) if turned else ((height, width),)


def picture_size(path: Path) -> tuple[int, int]:
    """Height and width, upright.

    Raises:
        DataError: no complete image.
    """
    return stored_sizes(path)[-1]


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file; a `DataError` that names it for whatever its decoder raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no image {path}.") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{path} cannot be read as an image: {_reason(error)}.") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image, np.float32)
        pixels = pixels * 255 if image.mode == "F" else pixels / 257
        return Image.fromarray((pixels.clip(0, 255) + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        pixels = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")
    return image.convert("RGB")


def _has_end(path: Path, kind: str | None) -> bool:
    if kind not in ENDS:
        return True
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        return ENDS[kind] in file.read()


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format is recognised"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
