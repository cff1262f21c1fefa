"""Picture files of any kind: 8 or 16 bits, grey, transparent, turned, with a colour profile."""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo.errors import ConfigError, DataError
from zoo.files import atomic_path

EXTENSIONS = frozenset(".png .jpg .jpeg .jfif .webp .tif .tiff .bmp .ppm .pgm .gif".split())  # noqa: SIM905
"""Suffixes of files that are taken for pictures."""
WRITABLE = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}
ORIENTATION = 0x0112
ICC_TAG = 34675
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_COLOUR = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> colour type of a PNG file."""
DEEP_COLOURS = (0, 1, 2)
"""Of a TIFF file: white is zero, black is zero, RGB."""
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Picture:
    """A picture, upright, with what its file says of its colours and its origin.

    Args:
        pixels: `(H, W, C)` uint8 or uint16; 1 channel is grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
        icc: the colour profile.
        exif: the EXIF block, without orientation.
    """

    pixels: np.ndarray
    icc: bytes | None = None
    exif: bytes | None = None

    @property
    def colour(self) -> np.ndarray:
        """`(H, W, 1 or 3)`, without alpha."""
        return self.pixels[..., : 1 if self.pixels.shape[2] < 3 else 3]

    @property
    def alpha(self) -> np.ndarray | None:
        """`(H, W, 1)`."""
        return None if self.pixels.shape[2] % 2 else self.pixels[..., -1:]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]


def is_picture(path: Path) -> bool:
    """Whether the suffix is one of a picture, and the file not hidden."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


# ---- reading -----------------------------------------------------------------------------------------------


def read_picture(path: str | Path) -> Picture:
    """Decode a file: PNG, JPEG, WebP, TIFF, BMP, PNM, GIF; the first frame of several.

    Palettes become RGB, or RGBA where they have a transparent colour; CMYK becomes RGB.

    Raises:
        DataError: no picture, a damaged one, or one of floats or 32-bit integers; names file and reason.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if head[:4] in TIFF_SIGNATURES and (deep := _deep_tiff(path)):
                return deep
            with Image.open(path) as image:
                return _deep_png(path, image) if _is_deep_png(head) else _from_pillow(image, path)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except Exception as error:  # decoders raise almost anything on damaged files
        raise DataError(f"{path} cannot be read as a picture: {_reason(error)}") from None


def read_rgb(path: str | Path) -> np.ndarray:
    """`(H, W, 3)` uint8 of a file for training or judging; grey is repeated.

    Raises:
        DataError: what `read_picture` raises, or a picture with transparency or of 16 bits.
    """
    picture = read_picture(path)
    if picture.alpha is not None and (picture.alpha != 255).any():
        raise DataError(f"{path} is transparent in places: training and benchmarks need opaque pictures.")
    if picture.pixels.dtype != np.uint8:
        raise DataError(f"{path} has 16 bits a sample: training and benchmarks are defined for 8 bits.")
    return np.ascontiguousarray(np.broadcast_to(picture.colour, (*picture.size, 3)))


def picture_size(path: str | Path) -> tuple[int, int]:
    """Height and width of an upright picture, from the header of its file.

    Raises:
        DataError: the file is no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = image.getexif().get(ORIENTATION, 1) > 4
                return (image.width, image.height) if turned else (image.height, image.width)
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except Exception as error:  # as above
        raise DataError(f"{path} cannot be read as a picture: {_reason(error)}") from None


def _from_pillow(image: Image.Image, path: Path) -> Picture:
    image.load()
    exif, icc = image.getexif(), image.info.get("icc_profile")
    orientation = exif.pop(ORIENTATION, 1)
    if image.mode in ("F", "I"):
        raise DataError(
            f"{path} holds {'floats' if image.mode == 'F' else '32-bit integers'}, not 8 or 16 bits."
        )
    if image.mode not in ("L", "LA", "RGB", "RGBA") and not image.mode.startswith("I;16"):
        if image.mode in ("CMYK", "LAB"):
            icc = None
        image = image.convert(_plain_mode(image))
    elif image.mode in ("L", "RGB") and "transparency" in image.info:
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    pixels = np.array(image)
    if pixels.dtype != np.uint8:
        pixels = pixels.astype(np.uint16)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    kept = len(exif) and image.format != "TIFF"  # whose tags tell how the file is laid out
    return Picture(_upright(pixels, orientation), icc, exif.tobytes() if kept else None)


def _plain_mode(image: Image.Image) -> str:
    if image.mode == "1":
        return "L"
    if image.mode in ("La", "RGBa"):
        return image.mode.upper()
    return "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"


def _is_deep_png(head: bytes) -> bool:
    return head[:8] == PNG_SIGNATURE and head[24:25] == b"\x10"


def _deep_png(path: Path, image: Image.Image) -> Picture:
    """16 bits a sample, which Pillow reads as 8 unless they are grey."""
    from torchvision.io import ImageReadMode, decode_image, read_file

    exif = image.getexif()
    orientation = exif.pop(ORIENTATION, 1)
    pixels = decode_image(read_file(str(path)), ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy()
    icc = image.info.get("icc_profile")
    return Picture(_upright(pixels, orientation), icc, exif.tobytes() if len(exif) else None)


def _deep_tiff(path: Path) -> Picture | None:
    """A TIFF file of 16 bits a sample; None where Pillow can read it as well."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        page: Any = file.pages[0]
        if page.dtype is None or page.dtype.itemsize == 1:
            return None
        if page.dtype != np.uint16:
            raise DataError(f"{path} holds {page.dtype}, not 8 or 16 bits a sample.")
        if page.photometric not in DEEP_COLOURS:
            raise DataError(f"{path} holds 16-bit {page.photometric.name}, not grey or RGB.")
        pixels = page.asarray()
        icc = page.tags.get(ICC_TAG)
        orientation = page.tags.get(ORIENTATION)
        separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            pixels = np.iinfo(pixels.dtype).max - pixels
    pixels = np.moveaxis(pixels, 0, 2) if separate else pixels
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.shape[2] > 4:
        raise DataError(
            f"{path} holds {'x'.join(map(str, pixels.shape))} samples: at most 4 channels are known."
        )
    return Picture(_upright(pixels, orientation.value if orientation else 1), icc and icc.value)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By the EXIF tag: 5 to 8 are transposed, then mirrored as 1, 4, 3, 2."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture format is recognised."
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---- writing -----------------------------------------------------------------------------------------------


def write_picture(picture: Picture, path: str | Path, *, quality: int = 95) -> None:
    """Write a file of the kind that the suffix says, with profile and (save TIFF) EXIF; whole or not at all.

    Args:
        quality: of JPEG and WebP, 1 to 100; with 100, WebP keeps every pixel as it is.

    Raises:
        ConfigError: the format cannot hold the picture, or is not known.
        ZooError: the file cannot be written.
    """
    path = Path(path)
    kind = WRITABLE.get(path.suffix.lower())
    check_format(picture, path)
    with atomic_path(path) as part:
        if kind == "TIFF":
            _write_tiff(picture, part)
        elif kind == "PNG" and picture.pixels.dtype == np.uint16:
            _write_deep_png(picture, part)
        else:
            _write_pillow(picture, part, str(kind), quality)


def check_format(picture: Picture, path: Path) -> None:
    """A ConfigError where the format that the suffix of `path` stands for cannot hold the picture."""
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"{path}: cannot write {path.suffix or 'a file without suffix'}; choose .png or .tif."
        )
    if kind in ("JPEG", "WEBP") and picture.pixels.dtype != np.uint8:
        raise ConfigError(f"{path}: {kind} holds 8 bits a sample, the picture has 16; choose .png or .tif.")
    if kind == "JPEG" and picture.alpha is not None:
        raise ConfigError(f"{path}: JPEG knows no transparency, which the picture has; choose .png.")
    longest = {"JPEG": 65500, "WEBP": 16383}.get(kind, 2**31)
    if max(picture.size) > longest:
        raise ConfigError(f"{path}: {kind} holds at most {longest} pixels a side; choose .png or .tif.")


def _write_pillow(picture: Picture, part: Path, kind: str, quality: int) -> None:
    pixels = picture.pixels[..., 0] if picture.pixels.shape[2] == 1 else picture.pixels
    options: dict[str, Any] = {"icc_profile": picture.icc} if picture.icc else {}
    options |= {"exif": picture.exif} if picture.exif else {}
    if kind != "PNG":
        options["quality"] = quality
    if kind == "JPEG":
        options["subsampling"] = 0
    if kind == "WEBP":
        options["lossless"] = quality == 100
    Image.fromarray(pixels).save(part, format=kind, **options)


def _write_tiff(picture: Picture, part: Path) -> None:
    import tifffile

    pixels = picture.pixels
    grey = pixels.shape[2] < 3
    options: dict[str, Any] = {"extrasamples": ["unassalpha"]} if picture.alpha is not None else {}
    tifffile.imwrite(
        part,
        pixels[..., 0] if pixels.shape[2] == 1 else pixels,
        photometric="minisblack" if grey else "rgb",
        planarconfig="contig" if pixels.shape[2] > 1 else None,
        compression="zlib",
        rowsperstrip=ROWS_AT_ONCE,
        iccprofile=picture.icc,
        metadata=None,
        **options,
    )


def _write_deep_png(picture: Picture, part: Path) -> None:
    """PNG of 16 bits a sample, which Pillow writes of grey alone; each sample as its change from the left."""
    height, width = picture.size
    channels = picture.pixels.shape[2]
    with open(part, "wb") as file:
        file.write(PNG_SIGNATURE)
        header = struct.pack(">IIBBBBB", width, height, 16, PNG_COLOUR[channels], 0, 0, 0)
        file.write(_chunk(b"IHDR", header))
        if picture.icc:
            file.write(_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(picture.icc)))
        if picture.exif:
            file.write(_chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
        packer = zlib.compressobj(6)
        for top in range(0, height, ROWS_AT_ONCE):
            rows = picture.pixels[top : top + ROWS_AT_ONCE].astype(">u2").view(np.uint8)
            rows = rows.reshape(len(rows), width, 2 * channels)
            lines = np.ones((len(rows), 1 + rows[0].size), np.uint8)
            rows[:, 1:] -= rows[:, :-1].copy()
            lines[:, 1:] = rows.reshape(len(rows), -1)
            if packed := packer.compress(lines.tobytes()):
                file.write(_chunk(b"IDAT", packed))
        file.write(_chunk(b"IDAT", packer.flush()) + _chunk(b"IEND", b""))


def _chunk(name: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check
