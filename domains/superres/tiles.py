"""Pictures of any size through a model in tiles, blended where they overlap.

Each tile sees `overlap` pixels beyond its border or more. Its outermost pixels are dropped: within the middle
half of an overlap the weight goes over from one tile to the next in a ramp, so that weights always sum to 1.

Models whose attention sees the whole input (CATANet's groups, DLGSANet's channels) give other numbers in
tiles than on the whole picture; the ramp makes what remains of that difference invisible at the seams. Where
their patches or windows lie they know by the place of the tile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from domains.superres.models.place import Place
from zoo.cli.console import console
from zoo.errors import ConfigError, ZooError

OVERLAP = 32
SMALLEST, LOWEST = 64, 256
"""Side of the least automatic tile, in low-resolution pixels; height below which none is made wider."""
BYTES_PER_PIXEL = {2: 3_500, 3: 5_000, 4: 7_000}
"""By scale, what the published models take at most for each low-resolution pixel of a tile."""
TILE_MEMORY = 2**30, 9 * 2**28
"""What automatic tiles take at most, of very large pictures and of small ones: 1 and 2.25 GiB."""
UNKNOWN_MEMORY = 2**31

Emit = Callable[[int, Tensor], None]
"""Takes the first row, and finished rows `(3, n, W)` float32 in [0, 1] of the high-resolution picture."""


def upscale(
    model: nn.Module,
    image: Tensor,
    emit: Emit,
    *,
    tile: int | str | None = "auto",
    overlap: int = OVERLAP,
    self_ensemble: bool = False,
    halve: bool = True,
    step: Callable[[int, int], Any] | None = None,
) -> None:
    """Run a picture through a model and hand out the result by rows of tiles, from top to bottom.

    Only a row of tiles is held as floats. When memory runs out, tiles of half the side are tried unless
    `halve` is off, and rows are handed out again from the top.

    Args:
        model: `(B, 3, H, W) -> (B, 3, sH, sW)`, with `scale` and `min_size`, on the device to use; told the
            `Place` of every tile where it has `placed`.
        image: `(1 or 3, H, W)` uint8, uint16, or float in [0, 1], on any device; grey is repeated.
        tile: side of a tile in low-resolution pixels; `auto` by the free memory, and wider than high; None:
            the whole picture.
        overlap: low-resolution pixels that neighbours share, at least.
        self_ensemble: mean over the eight flips and transposes of every tile.
        halve: try smaller tiles when memory runs out.
        step: told after each tile how many are done, and of how many.

    Raises:
        ConfigError: tiles that are too small for the overlap or the model.
        ZooError: memory does not suffice for the smallest tiles, or with `halve` off for these.
    """
    shape = tile_shape(model, image, tile, overlap)
    while True:
        try:
            _upscale(model, image, emit, shape, overlap, self_ensemble, step)
            return
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            shape = _smaller(shape, smallest_tile(model, overlap) if halve else max(shape), error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def upscaled(model: nn.Module, image: Tensor, **options: Any) -> Tensor:
    """The whole result of `upscale`, `(3, sH, sW)` float32 on the CPU, not clamped."""
    scale = cast(Any, model).scale
    result = torch.empty(3, image.shape[1] * scale, image.shape[2] * scale)

    def keep(top: int, rows: Tensor) -> None:
        result[:, top : top + rows.shape[1]] = rows

    upscale(model, image, keep, **options)
    return result


def automatic_pixels(image: Tensor, scale: int, device: torch.device) -> int:
    """Low-resolution pixels of the largest tile that takes at most a third of the free memory.

    It leaves room for twice the result, so that 24 megapixels fit into 4 GiB with all else.
    """
    least, most = TILE_MEMORY
    result = 3 * scale**2 * image[0].numel() * image.element_size()
    memory = min(free_memory(device) / 3, max(least, most - 2 * result))
    return max(int(memory / BYTES_PER_PIXEL.get(scale, max(BYTES_PER_PIXEL.values()))), SMALLEST**2)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take: of the GPU, or of machine, container and `ulimit -v`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = [_available(), _left_in_container(), _left_of_address_space()]
    return min((limit for limit in limits if limit is not None), default=UNKNOWN_MEMORY)


# ---- tiles -------------------------------------------------------------------------------------------------


def tile_shape(model: nn.Module, image: Tensor, tile: int | str | None, overlap: int) -> tuple[int, int]:
    """Height and width of the tiles that `upscale` begins with, at most those of the picture.

    Automatic ones are as wide as they can be at a height of `LOWEST`: the groups of CATANet run along rows.

    Raises:
        ConfigError: tiles that are too small for the overlap or the model.
    """
    (height, width), smallest = image.shape[1:], smallest_tile(model, overlap)
    if tile is None:
        return height, width
    if tile == "auto":
        pixels = automatic_pixels(image, cast(Any, model).scale, _device(model))
        rows = min(max(pixels // width, min(LOWEST, math.isqrt(pixels)), smallest), height)
        return rows, min(max(pixels // rows, smallest), width)
    if not isinstance(tile, int) or tile < smallest:
        raise ConfigError(
            f"tile={tile}: write auto, null for the whole picture, or at least {smallest} pixels (twice the "
            f"overlap of {overlap}, and what the model needs)."
        )
    return min(tile, height), min(tile, width)


def smallest_tile(model: nn.Module, overlap: int) -> int:
    """The least side of a tile that has room for its overlaps and that the model sees as it should."""
    return max(2 * overlap, cast(Any, model).min_size, 1)


def _smaller(shape: tuple[int, int], smallest: int, error: Exception) -> tuple[int, int]:
    if max(shape) <= smallest:
        raise ZooError(f"Out of memory even for tiles of {_named(shape)}: {error}") from error
    half = (max(shape[0] // 2, smallest), max(shape[1] // 2, smallest))
    console.print(
        f"Out of memory with tiles of {_named(shape)}; going on with {_named(half)}.", highlight=False
    )
    return half


def _named(shape: tuple[int, int]) -> str:
    return f"{shape[1]}x{shape[0]} pixels"


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)


@torch.inference_mode()
def _upscale(
    model: nn.Module,
    image: Tensor,
    emit: Emit,
    shape: tuple[int, int],
    overlap: int,
    self_ensemble: bool,
    step: Callable[[int, int], Any] | None,
) -> None:
    scale = cast(Any, model).scale
    rows, columns = (_spans(*axis, overlap, scale) for axis in zip(image.shape[1:], shape, strict=True))
    width, done = image.shape[2] * scale, 0
    pending = torch.empty(3, 0, width)
    for top, bottom, row_weight, first in rows:
        band = torch.zeros(3, len(row_weight), width)
        for left, right, weight, start in columns:
            tile = _on_device(image[:, top:bottom, left:right], model)
            place = Place(top, left, image.shape[1], image.shape[2])
            result = _run(model, tile, place, self_ensemble)[0].float().cpu()
            y, x = first - top * scale, start - left * scale
            inner = result[:, y : y + len(row_weight), x : x + len(weight)]
            band[:, :, start : start + len(weight)] += inner * weight
            done += 1
            if step:
                step(done, len(rows) * len(columns))
        band *= row_weight[:, None]
        shared = pending.shape[1]
        band[:, :shared] += pending
        following = next((f for _, _, _, f in rows if f > first), first + len(row_weight))
        finished = following - first
        emit(first, band[:, :finished])
        pending = band[:, finished:].clone()


def _spans(length: int, side: int, overlap: int, scale: int) -> list[tuple[int, int, Tensor, int]]:
    """The tiles of an axis: start and stop, and the weights of the results that are used, with their place.

    Tiles are spread evenly. Weights of neighbours are ramps around the middle of what they share.
    """
    if length <= side:
        return [(0, length, torch.ones(length * scale), 0)]
    count = math.ceil((length - overlap) / (side - overlap))
    starts = [round(i * (length - side) / (count - 1)) for i in range(count)]
    ramp = overlap // 2 * scale
    seams = [(b + a + side) * scale // 2 for a, b in pairwise(starts)]
    edges = [0, *(seam - ramp // 2 for seam in seams)]
    spans = []
    for i, start in enumerate(starts):
        stop = edges[i + 1] + ramp if i < count - 1 else length * scale
        weight = torch.ones(stop - edges[i])
        rise = (torch.arange(ramp) + 0.5) / max(ramp, 1)
        if i > 0:
            weight[:ramp] *= rise
        if i < count - 1:
            weight[len(weight) - ramp :] *= 1 - rise
        spans.append((start, start + side, weight, edges[i]))
    return spans


def seams(image: Tensor, shape: tuple[int, int], overlap: int, scale: int) -> Tensor:
    """Where tiles of an image `(C, H, W)` are blended, or meet where they share nothing: `(sH, sW)` bool."""
    rows, columns = (_between(*axis, overlap, scale) for axis in zip(image.shape[1:], shape, strict=True))
    return rows[:, None] | columns


def _between(length: int, side: int, overlap: int, scale: int) -> Tensor:
    found = torch.zeros(length * scale, dtype=torch.bool)
    for (_, _, weight, first), (_, _, _, after) in pairwise(_spans(length, side, overlap, scale)):
        last = first + len(weight)
        found[min(after, last - 1) : max(last, after + 1)] = True
    return found


def _run(model: nn.Module, tile: Tensor, place: Place, self_ensemble: bool) -> Tensor:
    """`(1, 3, h, w)`; with `self_ensemble` the mean over flips and transposes, each turned back."""
    if not self_ensemble:
        return _placed(model, tile, place)
    total: Tensor | float = 0.0
    for flips in ((), (2,), (3,), (2, 3)):
        turned = tile.flip(flips)
        total = total + _placed(model, turned, place.turned(tile, flips, False)).float().flip(flips)
        turned_place = place.turned(tile, flips, True)
        found = _placed(model, turned.transpose(2, 3), turned_place).float()
        total = total + found.transpose(2, 3).flip(flips)
    return cast(Tensor, total) / 8


def _placed(model: nn.Module, tile: Tensor, place: Place) -> Tensor:
    return model(tile, place) if getattr(model, "placed", False) else model(tile)


def _on_device(tile: Tensor, model: nn.Module) -> Tensor:
    """`(1, 3, h, w)` float32 in [0, 1]."""
    scaled = tile if tile.is_floating_point() else tile.float() / torch.iinfo(tile.dtype).max
    return scaled.to(_device(model), torch.float32).expand(3, -1, -1)[None].contiguous()


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


# ---- memory ------------------------------------------------------------------------------------------------


def _available() -> int | None:
    return next((1024 * value for name, value in _proc("/proc/meminfo") if name == "MemAvailable"), None)


def _left_in_container() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)


def _left_of_address_space() -> int | None:
    if os.name != "posix":
        return None
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    used = next((1024 * value for name, value in _proc(f"/proc/{os.getpid()}/status") if name == "VmSize"), 0)
    return max(limit - used, 0)


def _proc(path: str) -> Iterator[tuple[str, int]]:
    """`(name, number)` of lines such as `VmSize: 12 kB`."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        name, _, value = line.partition(":")
        number = value.split()[:1]
        if number and number[0].isdigit():
            yield name, int(number[0])
