"""From picture files and trained weights to larger picture files."""

from __future__ import annotations

import glob
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from domains.superres.images import WRITABLE, Picture, check_format, is_picture, read_picture, write_picture
from domains.superres.tiles import upscale
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import CheckpointError, ConfigError, DataError, ZooError, did_you_mean

FORMATS = {"png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif"}
CORRUPT = ("skip", "error")
LEAST = 16
"""Pixels of a side that models see at least."""


@dataclass(frozen=True)
class Job:
    """A picture file and what becomes of it."""

    source: Path
    target: Path


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Enlarge the pictures of `cfg.input` into `cfg.output`; draw comparisons if asked for.

    Args:
        model: in eval mode, with `scale` and `min_size`.
        facts: not needed: the model knows its scale.
        cfg: as `configs/predict.yaml` with `configs/predict/superres.yaml`.

    Returns:
        The files written: pictures, then comparisons.

    Raises:
        CheckpointError: the weights are for another scale than `cfg.scale`.
        ConfigError: a setting that cannot be, an output that would replace an input.
        DataError: there are no pictures, or none that can be read; with `corrupt: error`, one that cannot.
        ZooError: the output cannot be written.
    """
    scale = cast(Any, model).scale
    _check(cfg, scale)
    jobs = plan(find_pictures(cfg.input, Path(cfg.output)), cfg)
    _check_writable({job.target.parent for job in jobs})
    if cfg.corrupt == "error":
        for job in jobs:
            check_format(read_picture(job.source), job.target)
    if not getattr(model, "ready", True):
        console.print("These weights were never trained: the token centres are not set.", highlight=False)
    model.to(chosen_device(cfg.device))
    written, comparisons, failed = _enlarged(model, jobs, cfg)
    if failed:
        console.print(
            f"{len(failed)} of {len(jobs)} files were left out: {' '.join(failed)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if not written:
        raise DataError(f"None of the {len(jobs)} files of input={cfg.input} can be enlarged.")
    console.print(f"{len(written)} pictures, x{scale}", highlight=False)
    return written + comparisons


def enlarge(model: nn.Module, picture: Picture, **options: Any) -> Picture:
    """A picture `scale` times as large, of the same kind: grey stays grey, 16 bits stay 16 bits.

    Alpha goes through the model on its own; where it is the same everywhere it stays so.

    Args:
        options: of `domains.superres.tiles.upscale`.
    """
    scale, (height, width) = cast(Any, model).scale, picture.size
    top, left = before = tuple(max(LEAST - side, 0) // 2 for side in picture.size)
    picture = _continued(picture, before)
    shape = (picture.size[0] * scale, picture.size[1] * scale, picture.pixels.shape[2])
    pixels = np.empty(shape, picture.pixels.dtype)
    channels = picture.colour.shape[2]
    upscale(model, _tensor(picture.colour), partial(_store, pixels[..., :channels]), **options)
    alpha = picture.alpha
    if alpha is not None and (alpha == alpha.flat[0]).all():
        pixels[..., -1] = alpha.flat[0]
    elif alpha is not None:
        upscale(model, _tensor(alpha), partial(_store, pixels[..., -1:]), **options)
    inner = pixels[scale * top : scale * (top + height), scale * left : scale * (left + width)]
    return Picture(inner, picture.icc, picture.exif)


def _continued(picture: Picture, before: tuple[int, ...]) -> Picture:
    """Mirrored until no side is shorter than `LEAST`, with `before` rows and columns more at top and left.

    No model has learned what to make of a line of pixels with zeros on either side.
    """
    missing = [max(LEAST - side, 0) for side in picture.size]
    if not any(missing):
        return picture
    edges = [(n, most - n) for n, most in zip(before, missing, strict=True)]
    return Picture(np.pad(picture.pixels, (*edges, (0, 0)), mode="symmetric"), picture.icc, picture.exif)


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _store(target: np.ndarray, top: int, rows: Tensor) -> None:
    """Clamp and round rows `(3, n, W)` half to even into `(H, W, 1 or 3)`; of one channel the mean."""
    rows = rows if target.shape[2] == 3 else rows.mean(0, keepdim=True)
    full = np.iinfo(target.dtype).max
    values = (rows.clamp(0, 1) * full).round().permute(1, 2, 0)
    target[top : top + rows.shape[1]] = values.numpy()


# ---- files -------------------------------------------------------------------------------------------------


def find_pictures(source: str | None, output: Path | None, verb: str = "predict") -> list[tuple[Path, Path]]:
    """The pictures of a file, a folder with its subfolders, or a glob, with their place in the output.

    What lies in the output folder, if there is one, is not taken for input.

    Raises:
        ConfigError: nothing was asked for.
        DataError: nothing is there.
    """
    if not source:
        raise ConfigError(f"zoo {verb} needs pictures: input=FILE, input=FOLDER or input='FOLDER/*.png'.")
    path = Path(source)
    if path.is_file():
        return [(path, Path(path.name))]
    if path.is_dir():
        inside = output.resolve() if output and output.resolve() != path.resolve() else None
        files = sorted(file for file in path.rglob("*") if file.is_file() and is_picture(file))
        found = [(f, f.relative_to(path)) for f in files if not (inside and inside in f.resolve().parents)]
    else:
        files = sorted(Path(file) for file in glob.glob(source, recursive=True) if Path(file).is_file())
        found = [(file, Path(file.name)) for file in files]
    if not found:
        what = "has no pictures" if path.is_dir() else "is no file or folder, nor a pattern that matches"
        raise DataError(f"input={source} {what}.")
    return found


def plan(found: Sequence[tuple[Path, Path]], cfg: DictConfig) -> list[Job]:
    """Where each picture goes: into a folder, under its own name; one picture also to a file.

    Pictures whose names would be the same keep their old suffix before the new one.

    Raises:
        ConfigError: a picture would replace its original, or two would still have the same name.
    """
    output = Path(cfg.output)
    if len(found) == 1 and output.suffix.lower() in WRITABLE and not output.is_dir():
        if cfg.format and FORMATS[cfg.format] != output.suffix.lower():
            raise ConfigError(f"output={output} and format={cfg.format} contradict: leave out format.")
        jobs = [Job(found[0][0], output)]
    else:
        names = [place.with_name(place.stem + cfg.suffix + _suffix(place, cfg.format)) for _, place in found]
        counts = Counter(names)
        names = [
            place.with_name(place.name + cfg.suffix + name.suffix) if counts[name] > 1 else name
            for (_, place), name in zip(found, names, strict=True)
        ]
        jobs = [Job(source, output / name) for (source, _), name in zip(found, names, strict=True)]
    _check_distinct(jobs)
    return jobs


def _suffix(place: Path, format: str | None) -> str:
    """As asked for, or that of the input; PNG for what is not written."""
    if format:
        return FORMATS[format]
    return place.suffix if place.suffix.lower() in WRITABLE else ".png"


def _check_distinct(jobs: Sequence[Job]) -> None:
    sources, targets = {job.source.resolve() for job in jobs}, Counter(job.target.resolve() for job in jobs)
    for job in jobs:
        if job.target.resolve() in sources:
            raise ConfigError(f"{job.target} would replace an input: choose another output, or suffix=_x4.")
        if targets[job.target.resolve()] > 1:
            raise ConfigError(f"Several inputs would be written to {job.target}: take one folder at a time.")


def _check_writable(folders: set[Path]) -> None:
    """See that files can be made, before the hours of work."""
    for folder in sorted(folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                continue
        except OSError as error:
            raise ZooError(
                f"Cannot write to {folder}: {error.strerror or error}. Choose another output."
            ) from None


# ---- the work ----------------------------------------------------------------------------------------------


def _enlarged(
    model: nn.Module, jobs: Sequence[Job], cfg: DictConfig
) -> tuple[list[Path], list[Path], list[str]]:
    """Pictures written, comparisons drawn, and why others were left out."""
    written: list[Path] = []
    comparisons: list[Path] = []
    failed: list[str] = []
    with progress() as bar:
        whole = bar.add_task("Enlarging", total=len(jobs), visible=len(jobs) > 1)
        for job in jobs:
            tiles = bar.add_task(job.source.name, total=None)
            try:
                picture = read_picture(job.source)
                check_format(_enlarged_shape(picture, cast(Any, model).scale), job.target)
            except (ConfigError, DataError) as error:
                if cfg.corrupt == "error":
                    raise
                failed.append(str(error))
            else:
                result = enlarge(model, picture, **_options(cfg, bar, tiles))
                write_picture(result, job.target, quality=cfg.quality)
                written.append(job.target)
                if cfg.plots:
                    comparisons.append(_compare(picture, result, job, cfg))
            bar.remove_task(tiles)
            bar.advance(whole)
    return written, comparisons, failed


def _enlarged_shape(picture: Picture, scale: int) -> Picture:
    """A picture of the size and kind of the result, without memory of its own."""
    height, width = picture.size
    one = np.empty((1, 1, picture.pixels.shape[2]), picture.pixels.dtype)
    return Picture(np.broadcast_to(one, (height * scale, width * scale, one.shape[2])))


def _options(cfg: DictConfig, bar: Progress, task: Any) -> dict[str, Any]:
    def step(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    return {"tile": cfg.tile, "overlap": cfg.overlap, "self_ensemble": cfg.self_ensemble, "step": step}


def _compare(picture: Picture, result: Picture, job: Job, cfg: DictConfig) -> Path:
    from domains.superres.plots import before_after

    relative = job.target.relative_to(cfg.output) if job.target.is_relative_to(cfg.output) else None
    name = (relative if relative and relative.name else Path(job.target.name)).with_suffix("")
    path = Path(cfg.plots) / name.with_name(f"{name.name}_comparison.png")
    before_after(picture.colour, result.colour, path, title=job.source.name)
    return path


def progress() -> Progress:
    """A bar that counts, with the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)


# ---- settings ----------------------------------------------------------------------------------------------


def _check(cfg: DictConfig, scale: int) -> None:
    if cfg.scale not in (None, scale):
        raise CheckpointError(f"The weights enlarge x{scale}, not x{cfg.scale}: take weights of that scale.")
    if cfg.format is not None and cfg.format not in FORMATS:
        raise ConfigError(
            f"format={cfg.format} is not one of {', '.join(FORMATS)}.{did_you_mean(str(cfg.format), FORMATS)}"
        )
    if cfg.corrupt not in CORRUPT:
        raise ConfigError(f"corrupt={cfg.corrupt} is not one of {', '.join(CORRUPT)}.")
    if not 1 <= cfg.quality <= 100:
        raise ConfigError(f"quality={cfg.quality}: 1 to 100.")
    if cfg.overlap < 0:
        raise ConfigError(f"overlap={cfg.overlap}: at least 0.")
