"""Where labelled images come from: class folders, tables of paths, data sets of torchvision, embedded digits.

Each function gives a `Collection`, whose parts are `train`, `val`, `test`, or `all` where the source has
none; `split` makes three of them.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from domains.vision.images import Picture, is_image, read_image, to_picture
from zoo.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")
PART_NAMES = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""What sources call the parts."""


@dataclass(frozen=True)
class Images:
    """Labelled images of one part.

    Attributes:
        names: what to call each in messages and tables, unique.
        labels: `[n]` class numbers.
        rows: `[n]` what `reader` takes for each.
        reader: from a row to the picture.
        files: of each, where there is one.
    """

    names: Sequence[str]
    labels: np.ndarray
    rows: np.ndarray
    reader: Callable[[int], Picture]
    files: Sequence[Path] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> Picture:
        """The picture i; a DataError that names it where it cannot be read."""
        return self.reader(int(self.rows[i]))

    def select(self, chosen: Iterable[int]) -> Self:
        """Those at these places."""
        order = [int(i) for i in chosen]
        files = None if self.files is None else [self.files[i] for i in order]
        names = [self.names[i] for i in order]
        return replace(self, names=names, labels=self.labels[order], rows=self.rows[order], files=files)


@dataclass(frozen=True)
class Collection:
    """The parts of a source with the names of its classes, which labels count from 0."""

    classes: list[str]
    parts: dict[str, Images]
    source: str


class FileReader:
    """Reads files of a list; can be sent to loader processes."""

    def __init__(self, files: Sequence[Path], channels: int, max_value: float | None) -> None:
        self.files, self.channels, self.max_value = list(files), channels, max_value

    def __call__(self, row: int) -> Picture:
        return read_image(self.files[row], channels=self.channels, max_value=self.max_value)


# ---- class folders -----------------------------------------------------------------------------------------


def image_folder(path: str | Path, *, channels: int = 3, max_value: float | None = None) -> Collection:
    """`path/class/*.jpg`, or `path/{train,val,test}/class/*.jpg`; images may lie deeper in a class folder.

    A lone folder on the way (`Images/`, `NWPU-RESISC45/`) is entered.

    Raises:
        DataError: no folder, no class folders, an empty one, or parts with other classes than train.
    """
    root = _entered(Path(path))
    layout = {PART_NAMES[d.name.lower()]: d for d in _subfolders(root) if d.name.lower() in PART_NAMES}
    if "train" not in layout or any(is_image(f) for f in layout["train"].iterdir()):
        layout = {"all": root}
    classes = [
        d.name for d in _subfolders(next(iter(layout.values())) if "all" in layout else layout["train"])
    ]
    if not classes:
        raise DataError(
            f"{root} has no class folders: put the images of each class into a folder of its name, "
            "or list them in a table (data=image_table)."
        )
    parts = {
        part: _class_files(folder, classes, root, channels, max_value) for part, folder in layout.items()
    }
    return Collection(classes, parts, str(path))


def _entered(root: Path) -> Path:
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Set data.path to the folder of class folders.")
    while True:
        folders = _subfolders(root)
        if len(folders) != 1 or folders[0].name.lower() in PART_NAMES or not _subfolders(folders[0]):
            return root
        if any(is_image(file) for file in root.iterdir()):
            return root
        root = folders[0]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith((".", "__MACOSX")))


def _class_files(
    folder: Path, classes: list[str], root: Path, channels: int, max_value: float | None
) -> Images:
    own = [d.name for d in _subfolders(folder)]
    if unknown := sorted(set(own) - set(classes)):
        raise DataError(
            f"{folder} has {_listed(unknown, 'class', 'classes')} that the training part does not have."
            + did_you_mean(unknown[0], classes)
        )
    if absent := sorted(set(classes) - set(own)):
        log.warning("%s has no images of %s", folder, _listed(absent, "class", "classes"))
    files: list[Path] = []
    labels: list[int] = []
    others = 0
    for label, name in enumerate(classes):
        found = sorted(f for f in (folder / name).rglob("*") if f.is_file()) if name in own else []
        images = [f for f in found if is_image(f)]
        others += len(found) - len(images)
        if name in own and not images:
            raise DataError(f"The class folder {folder / name} has no images: fill it or remove it.")
        files += images
        labels += [label] * len(images)
    if others:
        log.warning("%s: %d files that are no images by their suffix were left out", folder, others)
    names = [f.relative_to(root).as_posix() for f in files]
    return _of_files(files, names, labels, channels, max_value)


def _of_files(
    files: list[Path], names: list[str], labels: Sequence[int], channels: int, max_value: float | None
) -> Images:
    reader = FileReader(files, channels, max_value)
    return Images(names, np.array(labels, dtype=np.int64), np.arange(len(files)), reader, files)


# ---- tables ------------------------------------------------------------------------------------------------

COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "image", "image_path", "img", "filepath"),
    "label": ("label", "class", "class_name", "category", "target"),
    "split": ("split", "set", "subset", "part", "partition"),
}
"""Names by which a column is known if none is given."""


def image_table(
    path: str | Path,
    *,
    root: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    channels: int = 3,
    max_value: float | None = None,
) -> Collection:
    """A `.csv`, `.tsv` or `.parquet` with a row per image: path, label and optionally split.

    Args:
        root: folder that relative paths start from; by default that of the table.
        columns: names of the columns `path`, `label` and `split` where they are not among `COLUMNS`.

    Raises:
        DataError: columns or files that are not there, rows without label, another split than these.
    """
    path = Path(path)
    table = _read_table(path)
    column = {kind: _column(table, kind, (columns or {}).get(kind), path) for kind in COLUMNS}
    if empty := [i for i, label in enumerate(table[column["label"]]) if not label]:
        raise DataError(f"{path}: row {empty[0] + 2} has no label ({len(empty)} such rows).")
    folder = Path(root) if root else path.parent
    files = [folder / name for name in table[column["path"]]]
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            f"{path} lists {len(missing)} files that are not there: {', '.join(map(str, missing[:3]))}"
            f"{' ...' if len(missing) > 3 else ''}. Relative paths start from data.root ({folder})."
        )
    classes = _in_order(set(table[column["label"]]))
    places = {name: i for i, name in enumerate(classes)}
    labels = [places[label] for label in table[column["label"]]]
    images = _of_files(files, list(table[column["path"]]), labels, channels, max_value)
    if not column["split"]:
        return Collection(classes, {"all": images}, str(path))
    return Collection(classes, _by_split(images, list(table[column["split"]]), path), str(path))


def _read_table(path: Path) -> Any:
    import pandas as pd

    if not path.is_file():
        raise DataError(f"There is no table {path}. Set data.path to a CSV of paths and labels.")
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False}
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).fillna("").astype(str)
        else:
            table = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", **options)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from None
    if not len(table):
        raise DataError(f"{path} lists no images.")
    return table


def _column(table: Any, kind: str, given: str | None, path: Path) -> str | None:
    known = list(table.columns)
    if given:
        if given not in known:
            raise DataError(
                f"{path} has no column {given!r} (data.{kind}_column).{did_you_mean(given, known)} "
                f"Columns: {', '.join(known)}."
            )
        return given
    found = [name for name in known if str(name).strip().lower() in COLUMNS[kind]]
    if not found and kind != "split":
        raise DataError(
            f"{path} has no column for the {kind}: name it with data.{kind}_column. "
            f"Columns: {', '.join(known)}; the first line is the header."
        )
    return found[0] if found else None


def _by_split(images: Images, splits: list[str], path: Path) -> dict[str, Images]:
    rows: dict[str, list[int]] = {}
    for i, name in enumerate(splits):
        part = PART_NAMES.get(name.strip().lower())
        if part is None:
            raise DataError(f"{path}, row {i + 2}: split {name!r} is not one of train, val, test.")
        rows.setdefault(part, []).append(i)
    return {part: images.select(chosen) for part, chosen in rows.items()}


def _in_order(names: set[str]) -> list[str]:
    """Numbers by value, names by alphabet."""
    numbers = all(name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name), name) if numbers else (0, name))


# ---- torchvision -------------------------------------------------------------------------------------------


class TorchvisionReader:
    """Reads images of a data set of torchvision."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self, row: int) -> Picture:
        try:
            return to_picture(self.dataset[row][0])
        except OSError as error:
            raise DataError(f"{self.name}[{row}] cannot be read as an image: {error}") from None


def torchvision_dataset(name: str, *, root: str | Path | None = None, download: bool = False) -> Collection:
    """A classification data set of `torchvision.datasets`, with its own train, val and test parts.

    Raises:
        ConfigError: no data set of that name, or not one of classification.
        DataError: it is not in `root`.
    """
    import torchvision.datasets as datasets

    if name not in datasets.__all__:
        raise ConfigError(f"torchvision has no data.dataset={name}.{did_you_mean(name, datasets.__all__)}")
    constructor = getattr(datasets, name)
    accepted = inspect.signature(constructor).parameters
    options: dict[str, Any] = {"root": root} if "root" in accepted else {}
    if "root" in accepted and root is None and name != "FakeData":
        raise ConfigError(f"data.dataset={name} needs data.root=FOLDER, with data.download=true at first.")
    options |= {"download": download} if "download" in accepted else {}
    made: dict[str, Any] = {}
    for part, choice in _torchvision_parts(accepted):
        dataset = None if part in made else _made(constructor, options | choice, name)
        if dataset is not None:
            made[part] = dataset
    if not made:
        raise ConfigError(f"data.dataset={name} is no data set that the zoo can read.")
    labels = {part: _torchvision_labels(dataset, name) for part, dataset in made.items()}
    classes = _torchvision_classes(next(iter(made.values())), labels)
    parts = {
        part: Images(
            [f"{name}/{part}/{i}" for i in range(len(labels[part]))],
            labels[part],
            np.arange(len(labels[part])),
            TorchvisionReader(dataset, f"{name}/{part}"),
        )
        for part, dataset in made.items()
    }
    return Collection(classes, parts, name)


def _torchvision_parts(accepted: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Parts with the arguments that give them, the usual ones first."""
    if "train" in accepted:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" in accepted:
        names = ("train", "trainval", "val", "valid", "test")
        return [(PART_NAMES[name], {"split": name}) for name in names]
    return [("all", {})]


def _made(constructor: Any, options: dict[str, Any], name: str) -> Any:
    """The data set; None where it has no such split."""
    try:
        return constructor(**options)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{name} cannot be read from data.root={options.get('root')}: {reason} "
            "Set data.download=true to fetch it."
        ) from None
    except ValueError as error:
        if "split" in options and "split" in str(error):
            return None
        raise ConfigError(f"data.dataset={name}: {error}") from None
    except TypeError as error:
        raise ConfigError(
            f"data.dataset={name} needs arguments that the zoo does not give: {error}"
        ) from None


def _torchvision_labels(dataset: Any, name: str) -> np.ndarray:
    for attribute in ("targets", "labels", "_labels"):
        if hasattr(dataset, attribute):
            labels = np.asarray(getattr(dataset, attribute))
            break
    else:
        labels = np.asarray([int(dataset[i][1]) for i in range(len(dataset))])
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"data.dataset={name} is no classification data set: its labels are no numbers.")
    return labels.astype(np.int64)


def _torchvision_classes(dataset: Any, labels: Mapping[str, np.ndarray]) -> list[str]:
    count = 1 + max(int(values.max()) for values in labels.values())
    names = list(getattr(dataset, "classes", ()))
    if len(names) < count:
        return [str(i) for i in range(count)]
    return [name if isinstance(name, str) else ", ".join(map(str, name)) for name in names]


# ---- embedded ----------------------------------------------------------------------------------------------


class ArrayReader:
    """Reads 8-bit grey images of an array `(n, H, W)`."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __call__(self, row: int) -> Picture:
        return Image.fromarray(self.pixels[row]).convert("RGB")


def digits(shares: Sequence[float] | None = None) -> Collection:
    """1,797 handwritten digits, 8 x 8 grey, that scikit-learn carries (UCI optical recognition, CC BY 4.0).

    They are cut in the order of the file, which is harder than shuffled: neighbours there look alike.
    """
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = (data.images * (255 / 16) + 0.5).astype(np.uint8)
    count = len(pixels)
    images = Images(
        [f"digit {i}" for i in range(count)],
        data.target.astype(np.int64),
        np.arange(count),
        ArrayReader(pixels),
    )
    train, val, _ = checked_shares(shares or (0.5, 0.25, 0.25))
    bounds = [0, round(count * train), round(count * (train + val)), count]
    parts = {
        part: images.select(range(first, last))
        for part, first, last in zip(PARTS, bounds[:-1], bounds[1:], strict=True)
    }
    return Collection([str(i) for i in range(10)], parts, "digits")


# ---- splitting ---------------------------------------------------------------------------------------------


def split(collection: Collection, shares: Sequence[float] | None, seed: int) -> dict[str, Images]:
    """Train, val and test of a collection: its own, or else drawn class by class by (seed, class).

    A source with train and test but no val gives part of train for val; one with train and val but no test is
    tested on val. A class of one image is trained on; one of two has one of them tested.

    Args:
        shares: of train, val and test where they are drawn; 70, 10 and 20 % by default.
    """
    train, val, test = checked_shares(shares or (0.7, 0.1, 0.2))
    parts = collection.parts
    if "all" in parts:
        return _drawn(parts["all"], collection, (train, val, test), seed)
    if "train" not in parts:
        raise DataError(f"{collection.source} has no training part, but {', '.join(parts)}.")
    if "test" not in parts and "val" not in parts:
        return _drawn(parts["train"], collection, (train, val, test), seed)
    if "val" not in parts:
        share = val / (train + val) if train + val else 0.0
        kept = _drawn(parts["train"], collection, (1 - share, share, 0.0), seed)
        return {"train": kept["train"], "val": kept["val"], "test": parts["test"]}
    return {"train": parts["train"], "val": parts["val"], "test": parts.get("test", parts["val"])}


def checked_shares(shares: Sequence[float]) -> tuple[float, float, float]:
    """Raises `ConfigError` unless there are three that add up to 1."""
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ConfigError(f"data.split={list(shares)}: shares of train, val and test that add up to 1.")
    return shares[0], shares[1], shares[2]


def _drawn(images: Images, collection: Collection, shares: Sequence[float], seed: int) -> dict[str, Images]:
    chosen: dict[str, list[int]] = {part: [] for part in PARTS}
    lone = []
    for label in range(len(collection.classes)):
        places = np.flatnonzero(images.labels == label)
        if len(places) == 1 and shares[0] > 0:
            lone.append(collection.classes[label])
        order = places[np.random.default_rng([seed, label]).permutation(len(places))]
        sizes = _sizes(len(places), shares)
        for part, some in zip(PARTS, np.split(order, np.cumsum(sizes)[:-1]), strict=True):
            chosen[part] += sorted(some.tolist())
    if lone:
        log.warning(
            "%s: one image only of %s: trained on, never tested",
            collection.source,
            _listed(lone, "class", "classes"),
        )
    return {part: images.select(places) for part, places in chosen.items()}


def _sizes(count: int, shares: Sequence[float]) -> tuple[int, int, int]:
    """Images of a class for train, val and test: train first, then test, then val get one each."""
    train, val, test = shares
    if train == 0:
        tested = count if val == 0 else max(min(1, count), round(count * test))
        return 0, count - tested, tested
    rest = max(0, count - 1)
    tested = min(rest, max(1, round(count * test))) if test else 0
    validated = min(rest - tested, max(1, round(count * val))) if val else 0
    return count - tested - validated, validated, tested


def _listed(names: Sequence[str], one: str, many: str) -> str:
    shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    return f"the {one} {shown}" if len(names) == 1 else f"{len(names)} {many} ({shown})"
