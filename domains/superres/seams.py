"""`zoo check domain=superres`: what tiles change of a picture, beside the same picture in one."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from domains.superres.images import read_picture
from domains.superres.metrics import LUMA
from domains.superres.predict import find_pictures, progress
from domains.superres.tiles import seams, tile_shape, upscaled
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError, ZooError
from zoo.files import atomic_write

CROPPED = "cropped"


@dataclass(frozen=True)
class Difference:
    """How a result differs from that of the whole picture, in grey levels of 0 to 255, clamped."""

    picture: str
    width: int
    """Of the input, as `height`."""
    height: int
    tile: str
    """Width and height in pixels of the input; `cropped`: no tiles, but the picture cropped."""
    overlap: int
    seam_luma: float
    """The largest within the seams, where tiles are blended; as `seam_rgb`, of any sample."""
    seam_rgb: float
    seam_mean: float
    seam_above: float
    """Share of the samples within the seams that differ by more than a grey level."""
    all_rgb: float
    all_mean: float
    all_above: float


def check(model: nn.Module, facts: dict[str, Any], cfg: DictConfig) -> list[Path]:
    """Run pictures in tiles and whole; print the differences, and fail where `cfg.limit` is passed.

    Args:
        model: in eval mode, with `scale` and `min_size`.
        facts: not needed: the model knows its scale.
        cfg: as `configs/check.yaml` with `configs/check/superres.yaml`.

    Returns:
        The table, if one was asked for.

    Raises:
        ConfigError: settings that cannot be, or no picture larger than a tile.
        DataError: there are no pictures, or one that cannot be read.
        ZooError: a seam passes the limit, or memory does not suffice for a whole picture.
    """
    if cfg.output and Path(cfg.output).suffix != ".csv":
        raise ConfigError(f"output={cfg.output}: the suffix must be .csv.")
    if cfg.overlap < 0:
        raise ConfigError(f"overlap={cfg.overlap}: at least 0.")
    files = [file for file, _ in find_pictures(cfg.input, None, "check")]
    model.to(chosen_device(cfg.device))
    found: list[Difference] = []
    with progress() as bar:
        task = bar.add_task("Comparing", total=len(files))
        for file in files:
            image = torch.from_numpy(read_picture(file).colour).permute(2, 0, 1)
            found += differences(model, image, _sides(cfg.tile), cfg.overlap, file.name)
            bar.advance(task)
    tiled = [row for row in found if row.tile != CROPPED]
    if not tiled:
        raise ConfigError(f"No picture of input={cfg.input} is larger than a tile: choose a smaller tile=.")
    console.print(_table(found))
    written = [_write(found, Path(cfg.output))] if cfg.output else []
    worst = max(row.seam_rgb for row in tiled)
    if cfg.limit is not None and worst > cfg.limit:
        raise ZooError(f"Seams differ by up to {worst:.2f} grey levels, more than limit={cfg.limit}.")
    return written


def differences(
    model: nn.Module, image: Tensor, sides: Iterable[int | str], overlap: int, name: str
) -> list[Difference]:
    """Those of each size of tiles smaller than the picture, and of the picture cropped.

    What is cropped is its first row and column; what that changes, `overlap` pixels away from them or more,
    tells how far the model depends on where a picture begins, without any seam.

    Args:
        image: `(1 or 3, H, W)`, as for `upscale`.
        sides: of the tiles, in low-resolution pixels.
    """
    scale, (height, width) = cast(Any, model).scale, image.shape[1:]
    shapes = {tile_shape(model, image, side, overlap): side for side in sides}
    shapes.pop((height, width), None)
    if not shapes:
        return []
    run = partial(upscaled, model, overlap=overlap, halve=False)
    whole = run(image, tile=None)
    rows = []
    for shape, side in shapes.items():
        found = _difference(run(image, tile=side), whole, seams(image, shape, overlap, scale))
        rows.append(Difference(name, width, height, f"{shape[1]}x{shape[0]}", overlap, **found))
    cropped, far = run(image[:, 1:, 1:], tile=None), scale * (1 + overlap)
    found = _difference(cropped[:, far - scale :, far - scale :], whole[:, far:, far:], None)
    return [*rows, Difference(name, width, height, CROPPED, overlap, **found)]


def _difference(found: Tensor, whole: Tensor, where: Tensor | None) -> dict[str, float]:
    """What `Difference` holds of two results `(3, H, W)` and the seams `(H, W)`, if there are any."""
    change = 255 * (found.clamp(0, 1) - whole.clamp(0, 1))
    luma = torch.einsum("chw,c->hw", change, torch.from_numpy(LUMA / 255).to(change.dtype)).abs()
    rgb = change.abs()
    values = {"all_rgb": rgb.max(), "all_mean": rgb.mean(), "all_above": (rgb > 1).float().mean()}
    if where is not None:
        at_seams = rgb[:, where]
        values |= {"seam_luma": luma[where].max(), "seam_rgb": at_seams.max(), "seam_mean": at_seams.mean()}
        values["seam_above"] = (at_seams > 1).float().mean()
    names = [field.name for field in fields(Difference) if field.name.startswith(("seam", "all"))]
    return {name: float(values.get(name, math.nan)) for name in names}


def _sides(tile: Any) -> list[int | str]:
    if tile is None:
        raise ConfigError("tile=null has no seams: write auto, a side in pixels, or several as [256,160].")
    return [tile] if isinstance(tile, int | str) else list(tile)


# ---- what is shown -----------------------------------------------------------------------------------------


def _table(rows: Sequence[Difference]) -> Table:
    """Narrow enough for 80 columns; the file has the rest."""
    title = f"Difference to the picture in one, grey levels; overlap {rows[0].overlap}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("\npicture", overflow="fold")
    table.add_column("\ntile", no_wrap=True)
    for heading in ("at seams\nluma", "\nRGB", "\nmean", "\nabove 1", "everywhere\nRGB", "\nmean"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        everywhere = (f"{row.all_rgb:.2f}", f"{row.all_mean:.3f}")
        if row.tile == CROPPED:
            table.add_row(row.picture, row.tile, *[""] * 4, *everywhere, style="dim")
            continue
        at_seams = (f"{row.seam_luma:.2f}", f"{row.seam_rgb:.2f}", f"{row.seam_mean:.3f}")
        table.add_row(row.picture, row.tile, *at_seams, f"{row.seam_above:.4%}", *everywhere)
    return table


def _write(rows: Sequence[Difference], path: Path) -> Path:
    with atomic_write(path, "w") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Difference)])
        table.writeheader()
        table.writerows(asdict(row) for row in rows)
    return path
