"""Folders of windows or parts, as DCRNN, BasicTS (both layouts) and STAEformer publish them: windows that
were cut already are put together to the series they came from, and the split is kept in `parts`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from domains.traffic.formats.arrays import choose, load_npy, load_npz, read_array, split_time
from domains.traffic.formats.clock import Clock
from domains.traffic.formats.common import quoted
from domains.traffic.series import TrafficSeries
from zoo.errors import DataError

PARTS = ("train", "val", "test")
Parts = dict[str, tuple[int, int]]  # rows of every part: first, last + 1


def read_dcrnn(path: Path, clock: Clock) -> TrafficSeries:
    """Undo the cutting of `train/val/test.npz`: every part becomes rows, and parts that overlap are
    joined."""
    rows: np.ndarray | None = None
    parts = {}
    for part in PARTS:
        file = path / f"{part}.npz"
        arrays = load_npz(file)
        if not {"x", "y"} <= arrays.keys():
            raise DataError(f"{file} holds {quoted(arrays)}; windows x and y are expected.")
        new = _uncut(arrays["x"], arrays["y"], file)
        overlap = arrays["x"].shape[1] + arrays["y"].shape[1] - 1
        if rows is None:
            begin, rows = 0, new
        elif new.shape[1:] != rows.shape[1:]:
            raise DataError(
                f"{file} has {new.shape[1]} sensors and {new.shape[2]} channels, train.npz {rows.shape[1:]}."
            )
        else:
            continues = np.array_equal(rows[-overlap:, :, 0], new[:overlap, :, 0], equal_nan=True)
            begin = len(rows) - (overlap if continues else 0)
            rows = np.concatenate([rows[:begin], new])
        parts[part] = (begin, begin + len(new))
    assert rows is not None
    return replace(split_time(path, rows, clock), parts=parts)


def _uncut(x: np.ndarray, y: np.ndarray, file: Path) -> np.ndarray:
    """The rows `[S + P + Q - 1, N, C]` that windows `x` `[S, P, N, C]`, `y` `[S, Q, N, C']` were cut from.

    Raises:
        DataError: window s + 1 is not window s moved by one row.
    """
    if x.ndim != 4 or y.ndim != 4 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise DataError(
            f"{file}: x {x.shape} and y {y.shape} are not windows [samples, steps, sensors, channels]."
        )
    shared = min(x.shape[3], y.shape[3])
    rows = np.full((len(x) + x.shape[1] + y.shape[1] - 1, *x.shape[2:]), np.nan, dtype=np.float32)
    rows[: len(x)], rows[len(x) - 1 : len(x) + x.shape[1] - 1] = x[:, 0], x[-1]
    rows[len(x) + x.shape[1] - 1 :, :, :shared] = y[-1, :, :, :shared]
    for name, windows, first in (("x", x, 0), ("y", y[..., :shared], x.shape[1])):
        for step in range(windows.shape[1]):
            expected = rows[first + step : first + step + len(x), :, : windows.shape[3]]
            found = windows[:, step].astype(np.float32)
            same = (found == expected) | np.isnan(found)
            if not same.all():
                sample, sensor, _ = np.argwhere(~same)[0]
                raise DataError(
                    f"{file}: {name}[{sample}, {step}] of sensor {sensor} differs from the windows beside "
                    "it. Windows in the order of time, each one step after the other, are expected."
                )
    return rows


def read_basicts(path: Path, clock: Clock) -> TrafficSeries:
    """BasicTS, first layout (`data.dat` with `desc.json`) or the present one (three npy parts with
    `meta.json`)."""
    first_layout = (path / "data.dat").is_file()
    description = _read_json(path / ("desc.json" if first_layout else "meta.json"))
    values, parts = (_whole if first_layout else _joined_parts)(path, description)
    minutes = clock.interval_minutes or description.get("frequency (minutes)")
    return replace(read_array(path, values, replace(clock, interval_minutes=minutes)), parts=parts)


def _whole(path: Path, description: dict[str, Any]) -> tuple[np.ndarray, Parts | None]:
    """`[T, N, C]` readings of `data.dat`, and the parts that the ratio in its description gives."""
    file = path / "data.dat"
    shape = tuple(description.get("shape", ()))
    expected = 4 * int(np.prod(shape, dtype=np.int64))
    if len(shape) != 3 or file.stat().st_size != expected:
        raise DataError(
            f"{file} has {file.stat().st_size} bytes, but desc.json gives "
            f"the shape {list(shape)} of float32 [steps, sensors, channels], {expected} bytes."
        )
    values = np.fromfile(file, dtype=np.float32).reshape(shape)
    ratio = description.get("regular_settings", {}).get("TRAIN_VAL_TEST_RATIO")
    if not ratio:
        return values, None
    train, val = (int(share * shape[0]) for share in ratio[:2])
    return values, {"train": (0, train), "val": (train, train + val), "test": (train + val, shape[0])}


def _joined_parts(path: Path, description: dict[str, Any]) -> tuple[np.ndarray, Parts]:
    """`[T, N, C + 2]` readings of the three parts one after the other, with time of day and day of week as
    channels."""
    pieces, parts, begin = [], {}, 0
    for part in PARTS:
        values = load_npy(path / f"{part}_data.npy")
        values = values.reshape(*values.shape[:2], -1)
        features = [values]
        stamps = path / f"{part}_timestamps.npy"
        if stamps.is_file():
            times = load_npy(stamps)
            names = description.get("timestamps_description", [])
            for feature in ("time of day", "day of week"):
                if feature in names:
                    column = times[:, names.index(feature), None, None]
                    features.append(np.broadcast_to(column, (*values.shape[:2], 1)))
        pieces.append(np.concatenate(features, axis=2))
        parts[part] = (begin, begin + len(values))
        begin += len(values)
    return np.concatenate(pieces), parts


def read_staeformer(path: Path, clock: Clock) -> TrafficSeries:
    """STAEformer: `data.npz` `[T, N, 3]`, and `index.npz` with rows (x start, y start, y end) of every
    window."""
    data, windows = path / "data.npz", path / "index.npz"
    series = read_array(path, choose(load_npz(data), data, "data"), clock)
    index = load_npz(windows)
    parts = {}
    for part in PARTS:
        if part not in index or index[part].ndim != 2 or index[part].shape[1] != 3 or not len(index[part]):
            raise DataError(f"{windows}: key {part!r} with rows (x start, y start, y end) is expected.")
        rows = index[part]
        if (np.diff(rows[:, 0]) != 1).any() or rows.min() < 0 or rows.max() > len(series.values):
            raise DataError(f"{windows}, key {part!r}: windows must follow one another inside the data.")
        parts[part] = (int(rows[0, 0]), int(rows[-1, 2]))
    return replace(series, parts=parts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}.") from None
