"""The pictures of files: one of an image, many of an animation or a video."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from domains.detection.pictures import is_picture, opened, read_rgb
from zoo.errors import ConfigError, DataError, MissingExtra
from zoo.files import find_files

VIDEOS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
COUNTED = frozenset({".mp4", ".avi", ".mov", ".m4v"})
"""Videos whose head has the number of their frames; of others it is estimated."""
WHOLE = 0.9
"""Share of these that a whole video has at least: an editor may have cut some away without saying so."""


class Frame(NamedTuple):
    """A picture to predict from."""

    file: Path
    number: int | None
    """Of a video or animation."""
    image: Image.Image

    @property
    def name(self) -> str:
        return self.file.name if self.number is None else f"{self.file.name}#{self.number}"


def find_inputs(source: str | None) -> list[Path]:
    """The images and videos of a file, a folder with its subfolders, or a glob.

    Raises:
        ConfigError: nothing was asked for.
        DataError: nothing is there.
    """
    if not source:
        raise ConfigError("zoo predict needs images: input=FILE, input=FOLDER or input='FOLDER/*.png'.")
    return find_files(source, _is_input)


def _is_input(file: Path) -> bool:
    return is_picture(file) or (file.suffix.lower() in VIDEOS and not file.name.startswith("."))


def read_frames(file: Path) -> Iterator[Frame]:
    """The pictures of a file, one after the other.

    Raises:
        DataError: it cannot be read.
        MissingExtra: a video, and neither PyAV nor OpenCV is installed.
    """
    suffix = file.suffix.lower()
    if suffix in VIDEOS:
        for number, image in enumerate(_video(file)):
            yield Frame(file, number, image)
    elif suffix in (".gif", ".webp") and (count := _count(file)) > 1:
        for number, image in enumerate(_animation(file, count)):
            yield Frame(file, number, image)
    else:
        yield Frame(file, None, read_rgb(file))


def _count(file: Path) -> int:
    with opened(file) as image:
        return getattr(image, "n_frames", 1)


def _animation(file: Path, count: int) -> Iterator[Image.Image]:
    with opened(file) as animation:
        for number in range(count):
            animation.seek(number)
            yield animation.convert("RGB")


def check_readers(files: Iterable[Path]) -> None:
    """Raises `MissingExtra` for a video among the files where no library that reads it is installed."""
    video = next((file for file in files if file.suffix.lower() in VIDEOS), None)
    if video and not any(importlib.util.find_spec(name) for name in ("av", "cv2")):
        raise MissingExtra(
            f"{video} is a video, which needs PyAV (pip install av) or OpenCV (pip install "
            "opencv-python-headless)."
        )


def _video(file: Path) -> Iterator[Image.Image]:
    """By PyAV or OpenCV, whichever there is."""
    check_readers([file])
    yield from _by_av(file) if importlib.util.find_spec("av") else _by_opencv(file)


def _by_av(file: Path) -> Iterator[Image.Image]:
    av: Any = importlib.import_module("av")
    try:
        with av.open(str(file)) as container:
            read, count = 0, container.streams.video[0].frames
            for frame in container.decode(video=0):
                read += 1
                yield frame.to_image().convert("RGB")
        _check_whole(file, read, count)
    except DataError:
        raise
    except (OSError, IndexError, ValueError) as error:  # errors of PyAV are of these kinds
        raise DataError(f"{file} cannot be read as a video: {error}.") from None


def _by_opencv(file: Path) -> Iterator[Image.Image]:
    cv2: Any = importlib.import_module("cv2")
    video, read = cv2.VideoCapture(str(file)), 0
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    while (frame := video.read())[0]:
        read += 1
        yield Image.fromarray(frame[1][..., ::-1].copy())
    video.release()
    _check_whole(file, read, count)


def _check_whole(file: Path, read: int, count: int) -> None:
    """Raises `DataError` for a video without frames, or that ends before its head says."""
    if not read:
        raise DataError(f"{file} cannot be read as a video.")
    if file.suffix.lower() in COUNTED and read < WHOLE * count:
        raise DataError(f"{file} ends after {read} of {count} frames: was it cut off?")
