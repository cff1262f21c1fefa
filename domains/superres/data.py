"""Pairs of low- and high-resolution pictures for training and judging.

Shapes: crops of p pixels of low resolution, `(3, p, p)` and `(3, s p, s p)`, at scale s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from domains.superres import degrade
from domains.superres.images import picture_size, read_rgb
from domains.superres.resize import degrade as reduced
from domains.superres.sources import (
    PARTS,
    Folders,
    Pair,
    check_sizes,
    find_layout,
    photographs,
    split,
    unpaired,
    with_lr,
)
from zoo.cli.console import console
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path
from zoo.paths import cache_dir
from zoo.training.data import DataModule, ResumableLoader, SeededOrder, ShardedBatches

CHOICES = {
    "name": ("photos", "folder", "paired"),
    "cache": ("auto", "memory", "disk"),
    "corrupt": ("error", "skip"),
}
IN_MEMORY = 2**30
"""Up to so many bytes of pictures are held in memory by `cache: auto`."""
SCALES = (1, 2, 3, 4)


class PairStore:
    """Decoded pairs, in memory or as memory-mapped files in the cache folder of the zoo.

    Args:
        pairs: with their low-resolution files, if any.
        on_disk: keep decoded pictures in files, of which a crop reads only its own part.
    """

    def __init__(self, pairs: Sequence[Pair], scale: int, *, on_disk: bool) -> None:
        self.pairs, self.scale, self.on_disk = list(pairs), scale, on_disk
        self.loaded: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """`(h, w, 3)` and `(s h, s w, 3)` uint8.

        Raises:
            DataError: a file cannot be read or used.
        """
        if i not in self.loaded:
            self.loaded[i] = self._mapped(self.pairs[i]) if self.on_disk else self._decoded(self.pairs[i])
        return self.loaded[i]

    def _decoded(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        hr = read_rgb(pair.hr)
        try:
            lr = reduced(hr, self.scale) if pair.lr is None else read_rgb(pair.lr)
        except DataError as error:
            raise DataError(str(error) if pair.lr else f"{pair.hr}: {error}") from None
        return lr, np.ascontiguousarray(hr[: self.scale * lr.shape[0], : self.scale * lr.shape[1]])

    def _mapped(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """Files are named by what they were made from: path, size and time of both originals."""
        facts = [self.scale]
        for file in filter(None, (pair.hr, pair.lr)):
            status = file.stat()
            facts += [str(file.resolve()), status.st_size, status.st_mtime_ns]
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:24]
        files = [cache_dir() / "superres" / f"{key}-{kind}.npy" for kind in ("lr", "hr")]
        if not all(file.is_file() for file in files):
            for file, pixels in zip(files, self._decoded(pair), strict=True):
                with atomic_path(file) as part, open(part, "wb") as target:
                    np.save(target, pixels)
        lr, hr = (np.load(file, mmap_mode="r") for file in files)
        return lr, hr


class Crops(Dataset):
    """Random crops `{"lr": (3, p, p), "hr": (3, s p, s p)}` in [0, 1], flipped and turned.

    A crop depends on (seed, epoch, index) alone. Pictures are drawn in proportion to their area.

    Args:
        count: crops of an epoch.
        patch: side in low-resolution pixels.
        candidates: crops drawn for each that is taken: the one where neighbouring pixels differ most.
    """

    def __init__(
        self, store: PairStore, count: int, patch: int, *, augment: bool, candidates: int, seed: int
    ) -> None:
        self.store, self.count, self.patch, self.seed = store, count, patch, seed
        self.augment, self.candidates = augment, candidates
        areas = np.array([np.prod(store.get(i)[0].shape[:2]) for i in range(len(store))], dtype=np.float64)
        self.bounds = np.cumsum(areas / areas.sum())
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        draw = np.random.default_rng((self.seed, self.epoch, index))
        crops = [self._crop(draw) for _ in range(self.candidates)]
        lr, hr = crops[0] if len(crops) == 1 else max(crops, key=lambda crop: _detail(crop[0]))
        flips = draw.random(3) < 0.5 if self.augment else np.zeros(3, bool)
        return {"lr": _tensor(_turned(lr, flips)), "hr": _tensor(_turned(hr, flips))}

    def _crop(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        place = min(int(np.searchsorted(self.bounds, draw.random())), len(self.store) - 1)
        lr, hr = self.store.get(place)
        p, s = self.patch, self.store.scale
        y, x = (int(draw.integers(length - p + 1)) for length in lr.shape[:2])
        return lr[y : y + p, x : x + p], hr[s * y : s * (y + p), s * x : s * (x + p)]


class Wholes(Dataset):
    """Whole pictures `{"lr": (3, h, w), "hr": (3, s h, s w) uint8, "name", "group", "index"}`."""

    def __init__(self, store: PairStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        lr, hr = self.store.get(index)
        pair = self.store.pairs[index]
        whole = torch.from_numpy(np.array(hr)).permute(2, 0, 1)
        return {"lr": _tensor(lr), "hr": whole, "name": pair.name, "group": pair.group, "index": index}


class SuperresData(DataModule):
    """Pairs from the embedded photographs, from folders, or from the layouts of the field.

    Args:
        name: `photos`; `folder`: originals below `path`, or a layout that `find_layout` knows; `paired`:
            folders of your own, `hr` and `lr`.
        path: the folder of `folder`.
        hr, lr: the folders of `paired`; in `lr`, names end in `x2` or not, and may lie in `X2`.
        scale: how many times smaller low-resolution pictures are; None: as the model enlarges.
        split: shares of train, val and test of folders without parts.
        split_seed: of the draw.
        patch: side of training crops in low-resolution pixels.
        steps: batches of an epoch.
        augment: flip and transpose crops.
        candidates: of so many random crops the one with the most detail is trained on.
        cache: where decoded pictures are held: `memory`, `disk` (memory-mapped files in the cache folder), or
            by their size (`auto`).
        corrupt: `error` or `skip` pictures that cannot be read.
        border: pixels left out on each side when judging; None: as many as the scale.
        tile: side of tiles, in low-resolution pixels, when judging; None: whole pictures.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup` or `use`, if the pictures cannot be used.
    """

    parts: dict[str, list[Pair]]
    val_set: Wholes
    test_set: Wholes

    def __init__(
        self,
        name: str = "photos",
        path: str | Path | None = None,
        *,
        hr: str | Path | None = None,
        lr: str | Path | None = None,
        scale: int | None = None,
        split: Sequence[float] | None = None,
        split_seed: int = 0,
        patch: int = 32,
        steps: int = 100,
        augment: bool = True,
        candidates: int = 1,
        cache: str = "auto",
        corrupt: str = "error",
        border: int | None = None,
        tile: int | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for key, value in (("name", name), ("cache", cache), ("corrupt", corrupt)):
            if value not in CHOICES[key]:
                options = ", ".join(CHOICES[key])
                hint = did_you_mean(value, CHOICES[key])
                raise ConfigError(f"data.{key}={value} is not one of {options}.{hint}")
        if scale not in (None, *SCALES):
            raise ConfigError(f"data.scale={scale}: pictures are enlarged 2, 3 or 4 times.")
        counts = {"patch": patch, "steps": steps, "candidates": candidates}
        for key, value in counts.items():
            if value < 1:
                raise ConfigError(f"data.{key}={value}: at least 1 is needed.")
        if border is not None and border < 0:
            raise ConfigError(f"data.border={border}: at least 0 is needed.")
        self.name, self.path, self.hr, self.lr, self.scale = name, path, hr, lr, scale
        self.split, self.split_seed = split, split_seed
        self.patch, self.steps, self.augment, self.candidates = patch, steps, augment, candidates
        self.cache, self.corrupt, self.border, self.tile = cache, corrupt, border, tile
        self.unreadable: list[str] = []

    # ---- reading -----------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Find and split the originals; once, whatever the stage.

        Args:
            stage: `test`, of pictures that nothing is trained on: all of folders without parts are tested.
        """
        if hasattr(self, "parts"):
            return
        parts = self._parts()
        if stage == "test":
            tested = next(parts[part] for part in ("test", "val", "all", "train") if part in parts)
            self.parts = {"train": [], "val": [], "test": tested}
        elif "all" in parts:
            self.parts = split(parts["all"], self.split, self.split_seed)
        elif "test" in parts:
            self.parts = parts
        elif "val" in parts and "train" in parts:
            self.parts = parts | {"test": parts["val"]}
        else:
            self.parts = split(next(iter(parts.values())), self.split, self.split_seed)

    def _parts(self) -> dict[str, list[Pair]]:
        if self.name == "photos":
            return photographs()
        if self.name == "paired":
            if not (self.hr and self.lr):
                raise ConfigError("data=paired needs data.hr=DIR and data.lr=DIR.")
            if not Path(self.lr).is_dir():
                raise DataError(f"data.lr={self.lr} is no folder.")
            return {"all": unpaired([Folders(Path(self.hr), Path(self.lr))])}
        if not self.path:
            raise ConfigError("data=folder needs data.path=DIR: a folder of pictures, of DIV2K or of Set5.")
        return {part: unpaired(folders) for part, folders in find_layout(Path(self.path)).items()}

    def use(self, scale: int) -> None:
        """Pair, read and check the pictures for a model of this scale.

        Raises:
            ConfigError: `data.scale` is another.
            DataError: pictures are missing, unreadable, too small, or of sizes that do not match.
        """
        if self.scale not in (None, scale):
            raise ConfigError(f"data.scale={self.scale}, but the model enlarges x{scale}: see model.scale.")
        self.scale = scale
        paired = iter(with_lr([pair for part in PARTS for pair in self.parts[part]], scale))
        pairs = {part: self._readable(list(islice(paired, len(self.parts[part])))) for part in PARTS}
        if self.unreadable:
            self._report_unreadable()
        for part in PARTS:
            check_sizes(pairs[part], scale)
        on_disk = self.cache == "disk" or (self.cache == "auto" and self._bytes(pairs) > IN_MEMORY)
        stores = {part: PairStore(pairs[part], scale, on_disk=on_disk) for part in PARTS}
        self.stores = stores
        self.val_set, self.test_set = Wholes(stores["val"]), Wholes(stores["test"])
        if not len(stores["test"]):
            raise DataError("No picture is left for the test part: see data.split, or give more pictures.")
        if self.parts["train"]:
            self._prepare_training(stores["train"])
        counts = ", ".join(f"{len(stores[part])} {part}" for part in PARTS)
        console.print(f"Pictures: {counts}; x{scale}", highlight=False)

    def _prepare_training(self, store: PairStore) -> None:
        if not len(store):
            raise DataError("No picture is left for the train part: see data.split, or give more pictures.")
        many = len(store) > 100
        places = range(len(store))
        for i in track(places, "Reading", console=console, transient=True) if many else places:
            lr, _ = store.get(i)
            if min(lr.shape[:2]) < self.patch:
                raise DataError(
                    f"{store.pairs[i].hr} has {lr.shape[1]}x{lr.shape[0]} pixels at low resolution: crops of "
                    f"data.patch={self.patch} do not fit. Leave it out, or choose a smaller data.patch."
                )
        self.train_set = Crops(
            store,
            self.steps * self.batch_size,
            self.patch,
            augment=self.augment,
            candidates=self.candidates,
            seed=self.seed,
        )

    def _readable(self, pairs: list[Pair]) -> list[Pair]:
        """Those that can be decoded; the reasons of others are kept."""
        good = []
        files = track(pairs, "Looking at the files", console=console, transient=True)
        for pair in files if len(pairs) > 100 else pairs:
            try:
                for file in filter(None, (pair.hr, pair.lr)):
                    read_rgb(file)
            except DataError as error:
                self.unreadable.append(str(error))
            else:
                good.append(pair)
        return good

    def _report_unreadable(self) -> None:
        shown = " ".join(self.unreadable[:5]) + (" ..." if len(self.unreadable) > 5 else "")
        message = f"{len(self.unreadable)} pictures cannot be used: {shown}"
        if self.corrupt == "error":
            raise DataError(f"{message} Mend or remove them, or set data.corrupt=skip.")
        console.print(f"Left out: {message}", highlight=False, soft_wrap=True)

    @staticmethod
    def _bytes(pairs: dict[str, list[Pair]]) -> int:
        files = [pair.hr for part in PARTS for pair in pairs[part]]
        return sum(3 * height * width for height, width in map(picture_size, files))

    # ---- what training asks ------------------------------------------------------------------------------

    @staticmethod
    def collate(samples: Any) -> Any:
        """Crops stacked; whole pictures, each of its own size, as a list."""
        return samples if "name" in samples[0] else default_collate(samples)

    def val_dataloader(self) -> ResumableLoader:
        return self._one_by_one(self.val_set)

    def test_dataloader(self) -> ResumableLoader:
        return self._one_by_one(self.test_set)

    def predict_dataloader(self) -> ResumableLoader:
        return self._one_by_one(self.test_set)

    def _one_by_one(self, pictures: Wholes) -> ResumableLoader:
        """Pictures of any size do not stack: one a step and process.

        Where their number is no multiple of that of the processes, each process judges all.
        """
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if len(pictures) % world:
            rank, world = 0, 1
        order = SeededOrder(len(pictures), shuffle=False)
        batches = ShardedBatches(order, world, rank=rank, world=world, even=True)
        return ResumableLoader(pictures, batches, num_workers=self.num_workers, collate_fn=self.collate)

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        return {"scale": self.scale} if self.scale else {}

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must know to be tested on other pictures; json-able."""
        return {"data": self.name, "scale": self.scale}

    @staticmethod
    def degrade(source: Path, target: Path, **options: Any) -> list[Path]:
        """Write the low-resolution pictures of a folder by the exact rule, see `domains.superres.degrade`."""
        return degrade.degrade_folder(source, target, **options)

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """What training would take a folder for: facts, and a row per folder of pictures."""
        if reading:
            raise ConfigError(f"There is no option {next(iter(reading))!r} for folders of pictures.")
        rows = []
        for part, folders in find_layout(path).items():
            for folder in folders:
                sizes = [picture_size(pair.hr) for pair in unpaired([folder])]
                rows.append(
                    {
                        "part": part,
                        "folder": str(folder.hr.relative_to(path)),
                        "pictures": str(len(sizes)),
                        "smallest": "x".join(map(str, min(sizes, key=np.prod)[::-1])),
                        "largest": "x".join(map(str, max(sizes, key=np.prod)[::-1])),
                        "low resolution": _scales(folder.lr),
                    }
                )
        return {"source": str(path), "pictures": str(sum(int(row["pictures"]) for row in rows))}, rows


def _scales(folder: Path | None) -> str:
    """`X2 X3 X4`, or that they are made."""
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder else []
    return " ".join(found) or ("in one folder" if folder else "made from the originals")


def _turned(pixels: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Left-right, top-down, transposed."""
    pixels = pixels[:, ::-1] if flips[0] else pixels
    pixels = pixels[::-1] if flips[1] else pixels
    return pixels.swapaxes(0, 1) if flips[2] else pixels


def _detail(pixels: np.ndarray) -> float:
    """Mean difference of neighbouring pixels."""
    values = pixels.astype(np.int16)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


def _tensor(pixels: np.ndarray) -> Tensor:
    """`(3, H, W)` float32 in [0, 1] of `(H, W, 3)` uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
