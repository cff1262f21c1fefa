"""Low-resolution folders by the exact rule of the benchmarks, for `zoo data degrade`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from domains.superres.images import read_picture, write_picture
from domains.superres.resize import degrade
from domains.superres.sources import pictures
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError

SCALES = (2, 3, 4)


def degrade_folder(
    source: Path, target: Path, *, scale: int | Sequence[int] = SCALES, name: str = "{stem}x{scale}"
) -> list[Path]:
    """Reduce the pictures of a folder, or one file, by MATLAB's bicubic rule; profiles are kept.

    Pictures are first cropped at bottom and right to a multiple of the scale. Subfolders stay as they are.

    Args:
        target: gets a folder `X2` for each scale, with PNG files.
        scale: one or several.
        name: of the files, `{stem}` being that of the original.

    Returns:
        The folders written.

    Raises:
        ConfigError: a scale that is not 2 or more, or a name without `{stem}`.
        DataError: files that cannot be read; nothing is left out silently: all others are written.
    """
    scales = [scale] if isinstance(scale, int) else list(scale)
    if not scales or not all(isinstance(s, int) and s > 1 for s in scales):
        raise ConfigError(f"scale={scale}: write a whole number above 1, or several as [2,3,4].")
    if "{stem}" not in name:
        raise ConfigError(f"name={name}: the name of the original is missing, written {{stem}}.")
    root = source if source.is_dir() else source.parent
    failed = []
    for file in track(
        pictures(source) if source.is_dir() else [source], "Reducing", console=console, transient=True
    ):
        try:
            picture = read_picture(file)
            for s in scales:
                stem = name.format(stem=file.stem, scale=s)
                path = target / f"X{s}" / file.parent.relative_to(root) / f"{stem}.png"
                write_picture(replace(picture, pixels=degrade(picture.pixels, s)), path)
        except DataError as error:
            failed.append(str(error) if str(file) in str(error) else f"{file}: {error}")
    if failed:
        raise DataError(f"{len(failed)} files were not reduced: {' '.join(failed)}")
    return [target / f"X{s}" for s in scales]
