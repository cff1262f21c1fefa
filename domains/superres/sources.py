"""Where pairs of pictures come from: embedded photographs, folders of your own, and those of the field."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from domains.superres.images import is_picture, picture_size
from zoo.errors import ConfigError, DataError, MissingExtra

PARTS = ("train", "val", "test")
DEFAULT_SPLIT = (0.8, 0.1, 0.1)

PHOTOGRAPHS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "skimage": (
            "motorcycle_left.png",
            "motorcycle_right.png",
            "camera.png",
            "coins.png",
            "moon.png",
            "brick.png",
            "grass.png",
            "gravel.png",
            "ihc.png",
            "retina.jpg",
            "hubble_deep_field.jpg",
        ),
        "sklearn": ("china.jpg", "flower.jpg"),
    },
    "val": {"skimage": ("rocket.jpg",)},
    "test": {"skimage": ("astronaut.png", "chelsea.png", "coffee.png")},
}
"""Photographs in the wheels of scikit-image and scikit-learn; those of val and test are never trained on. All
in colour without traces of JPEG are tested, but for a stereo pair."""
WHEELS = {"skimage": ("data", "scikit-image"), "sklearn": ("datasets/images", "scikit-learn")}

TRAINING_SETS = {"train": (("DIV2K", "train"), ("Flickr2K", ""), ("DF2K", "")), "val": (("DIV2K", "valid"),)}
"""Part -> sets and the word in the names of their folders: `DIV2K_train_HR`, `Flickr2K_HR`."""
LR_NAMES = ("{stem}x{scale}", "{stem}", "{stem}_LRBI_x{scale}", "{stem}_x{scale}")
"""How low-resolution files are called after their originals."""


@dataclass(frozen=True)
class Pair:
    """An original and its low-resolution picture.

    Args:
        name: of the picture, with its set where there are several.
        hr: the original.
        lr: None: made from the original by the exact rule.
        group: the set, whose mean is reported.
    """

    name: str
    hr: Path
    lr: Path | None = None
    group: str = ""


@dataclass(frozen=True)
class Folders:
    """Originals, and where their low-resolution pictures lie by scale (None: nowhere)."""

    hr: Path
    lr: Path | None = None
    group: str = ""


def photographs() -> dict[str, list[Pair]]:
    """The embedded photographs by part; no picture is in two parts.

    Raises:
        MissingExtra: scikit-image is not installed.
        DataError: this version of it lacks a picture.
    """
    return {
        part: [Pair(Path(file).stem, _embedded(wheel, file)) for wheel in wheels for file in wheels[wheel]]
        for part, wheels in PHOTOGRAPHS.items()
    }


def _embedded(wheel: str, file: str) -> Path:
    folder, package = WHEELS[wheel]
    found = importlib.util.find_spec(wheel)
    if found is None or not found.submodule_search_locations:
        raise MissingExtra(
            f"The embedded photographs come with {package}: pip install {package}, or use your own by "
            "data=folder data.path=DIR."
        )
    path = Path(found.submodule_search_locations[0]) / folder / file
    if not path.is_file():
        raise DataError(f"This {package} has no {file}: upgrade it, or use data=folder data.path=DIR.")
    return path


def find_layout(path: Path) -> dict[str, list[Folders]]:
    """The folders of pictures below `path`, by part; `all` where the layout has no parts.

    Known layouts: DIV2K and DF2K (`DIV2K_train_HR`, `DIV2K_train_LR_bicubic/X2`, `DIV2K_valid_HR`,
    `Flickr2K_HR`, also inside `DIV2K/` and `Flickr2K/`); a benchmark set (`HR`, `LR_bicubic/X2`), or a folder
    of such sets; otherwise, the pictures of the folder itself.
    """
    if not path.is_dir():
        raise DataError(f"data.path={path} is no folder.")
    parts = {part: _training_folders(path, sets) for part, sets in TRAINING_SETS.items()}
    if any(parts.values()):
        return {part: folders for part, folders in parts.items() if folders}
    if (path / "HR").is_dir():
        return {"all": [_benchmark(path)]}
    sets = sorted(folder for folder in path.iterdir() if (folder / "HR").is_dir())
    return {"all": [_benchmark(folder) for folder in sets] or [Folders(path)]}


def _training_folders(path: Path, sets: Iterable[tuple[str, str]]) -> list[Folders]:
    found = []
    for name, word in sets:
        stem = "_".join(filter(None, (name, word)))
        for root in (path, path / name):
            if (root / f"{stem}_HR").is_dir():
                found.append(Folders(root / f"{stem}_HR", _if_there(root / f"{stem}_LR_bicubic"), name))
                break
    return found


def _benchmark(path: Path) -> Folders:
    return Folders(path / "HR", _if_there(path / "LR_bicubic"), path.name)


def _if_there(path: Path) -> Path | None:
    return path if path.is_dir() else None


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and its subfolders, sorted.

    Raises:
        DataError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.")
    found = sorted(file for file in folder.rglob("*") if file.is_file() and is_picture(file))
    if not found:
        raise DataError(f"There are no pictures in {folder}.")
    return found


def unpaired(folders: Iterable[Folders]) -> list[Pair]:
    """The originals of folders; their low-resolution pictures follow with the scale."""
    several = len(list(folders := tuple(folders))) > 1
    pairs = []
    for folder in folders:
        for file in pictures(folder.hr):
            name = file.relative_to(folder.hr).with_suffix("").as_posix()
            pairs.append(Pair(f"{folder.group}/{name}" if several else name, file, folder.lr, folder.group))
    return pairs


def with_lr(pairs: Sequence[Pair], scale: int) -> list[Pair]:
    """The pairs whose `lr` is a folder, with the file in it that belongs to the original.

    A folder that has `X2` and the like is looked into for the scale; one without pictures of the scale means
    that they are made from the originals, as for pairs without a folder.

    Raises:
        DataError: low-resolution pictures are missing; names them.
    """
    tables: dict[Path, Mapping[str, Path] | None] = {}
    found, missing = [], []
    for pair in pairs:
        if pair.lr is None or (table := _table(pair.lr, scale, tables)) is None:
            found.append(Pair(pair.name, pair.hr, None, pair.group))
            continue
        names = (name.format(stem=pair.hr.stem, scale=scale) for name in LR_NAMES)
        file = next((table[name] for name in names if name in table), None)
        if file is None:
            missing.append(pair)
        else:
            found.append(Pair(pair.name, pair.hr, file, pair.group))
    if missing:
        shown = ", ".join(pair.hr.name for pair in missing[:5]) + (" ..." if len(missing) > 5 else "")
        example = LR_NAMES[0].format(stem=missing[0].hr.stem, scale=scale)
        raise DataError(
            f"{len(missing)} of {len(pairs)} originals have no x{scale} picture in {missing[0].lr}: {shown}. "
            f"Expected is {missing[0].hr.stem} or {example} with any suffix."
        )
    return found


def _table(
    folder: Path, scale: int, tables: dict[Path, Mapping[str, Path] | None]
) -> Mapping[str, Path] | None:
    """Stem -> file of the low-resolution pictures of a scale; None where there are none."""
    if folder not in tables:
        by_scale = [entry for entry in folder.iterdir() if entry.is_dir() and entry.name[:1] in "Xx"]
        inner = next((entry for entry in by_scale if entry.name.lower() == f"x{scale}"), None)
        if by_scale and inner is None:
            tables[folder] = None
        else:
            tables[folder] = {file.stem: file for file in pictures(inner or folder)}
    return tables[folder]


def check_sizes(pairs: Iterable[Pair], scale: int) -> None:
    """A DataError for a low-resolution picture whose size is not that of its original over `scale`, rounded
    down.
    """
    for pair in pairs:
        if pair.lr is not None:
            hr, lr = picture_size(pair.hr), picture_size(pair.lr)
            wanted = (hr[0] // scale, hr[1] // scale)
            if lr != wanted:
                raise DataError(
                    f"{pair.lr} has {lr[1]}x{lr[0]} pixels; {pair.hr} of {hr[1]}x{hr[0]}, reduced {scale} "
                    f"times, has {wanted[1]}x{wanted[0]}. Is it the picture of another scale?"
                )


def split(pairs: Sequence[Pair], shares: Sequence[float] | None, seed: int) -> dict[str, list[Pair]]:
    """Parts drawn picture by picture; every part that has a share gets one picture at least.

    Raises:
        ConfigError: the shares are not three numbers of sum 1.
        DataError: there are fewer pictures than parts.
    """
    shares = tuple(DEFAULT_SPLIT if shares is None else shares)
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"data.split={list(shares)}: write three shares of sum 1, of train, val and test.")
    wanted = [share > 0 for share in shares]
    if len(pairs) < sum(wanted):
        raise DataError(f"{len(pairs)} pictures cannot be split in {sum(wanted)} parts; see data.split.")
    order = np.random.default_rng(seed).permutation(len(pairs))
    sizes = [max(int(share * len(pairs)), int(share > 0)) for share in shares]
    sizes[int(np.argmax(sizes))] += len(pairs) - sum(sizes)
    bounds = np.cumsum([0, *sizes])
    return {
        part: [pairs[i] for i in sorted(order[bounds[k] : bounds[k + 1]])] for k, part in enumerate(PARTS)
    }
