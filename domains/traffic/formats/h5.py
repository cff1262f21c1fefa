"""HDF5: a pandas frame in fixed format (METR-LA, PEMS-BAY, LargeST), taken apart without pandas so that
nothing pickled in the file is run, or a plain array of readings."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import h5py
import numpy as np

from domains.traffic.formats.arrays import read_array
from domains.traffic.formats.clock import Clock
from domains.traffic.formats.common import quoted
from domains.traffic.series import TrafficSeries, sensor_name
from zoo.errors import DataError, did_you_mean


def read_h5(path: Path, key: str | None, clock: Clock) -> TrafficSeries:
    """The frame or array called `key`, or the only one; `clock` tells the time of a plain array."""
    try:
        with h5py.File(path, "r") as file:
            node = _node(file, path, key)
            if isinstance(node, h5py.Dataset):
                return read_array(path, node[()], clock)
            return _read_frame(node, path, clock)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as HDF5: {error}. It is damaged, "
            "incomplete, or something else under this name: download it again."
        ) from None


def _node(file: h5py.File, path: Path, key: str | None) -> h5py.Group | h5py.Dataset:
    """The frame or array called `key`, or the only one."""
    frames: dict[str, h5py.Group] = {}
    arrays: dict[str, h5py.Dataset] = {}
    tables: list[str] = []

    def sort(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset):
            if node.ndim in (2, 3) and not name.startswith(
                tuple(f"{group}/" for group in (*frames, *tables))
            ):
                arrays[name] = node
        elif "axis1" in node and "block0_values" in node:
            frames[name] = node
        elif "table" in node:
            tables.append(name)

    file.visititems(sort)
    if key is not None:
        key = key.strip("/")
        if key in tables:
            raise _as_table(path, key)
        nodes = {**arrays, **frames}
        if key not in nodes:
            raise DataError(f"{path} has no key {key!r}; it has {quoted(nodes)}.{did_you_mean(key, nodes)}")
        return nodes[key]
    for nodes in (frames, arrays):
        for usual in ("df", "speed", *(nodes if len(nodes) == 1 else ())):
            if usual in nodes:
                return nodes[usual]
        if nodes:
            raise DataError(f"{path} holds {quoted(nodes)}: choose one with data.key=NAME.")
    if tables:
        raise _as_table(path, tables[0])
    raise DataError(f"{path} holds no pandas frame and no array of readings; it has {quoted(file)}.")


def _as_table(path: Path, key: str) -> DataError:
    return DataError(
        f"{path}, key {key!r}: a pandas frame in table format keeps its column names pickled, and no pickle "
        "is run here. Write it again with DataFrame.to_hdf(..., format='fixed'), or as csv or parquet."
    )


def _read_frame(group: h5py.Group, path: Path, clock: Clock) -> TrafficSeries:
    where = f"{path}, key {(group.name or '').strip('/')!r}"
    nodes = cast("dict[str, h5py.Dataset]", group)
    ids = _axis_names(nodes["axis0"], where)
    values = np.full((len(nodes["axis1"]), len(ids)), np.nan, dtype=np.float32)
    position = {name: i for i, name in enumerate(ids)}
    if len(position) != len(ids):
        raise DataError(f"{where}: sensor ids are repeated.")
    blocks = sum(name.startswith("block") and name.endswith("_values") for name in nodes)
    for block in range(blocks):
        items, readings = _axis_names(nodes[f"block{block}_items"], where), nodes[f"block{block}_values"]
        if readings.dtype.kind not in "fiu" or readings.shape != (len(values), len(items)):
            raise DataError(
                f"{where}: block{block}_values is {readings.dtype} of shape {readings.shape}, but numbers "
                f"of shape {(len(values), len(items))} are expected (columns of other objects are pickled, "
                "and not read)."
            )
        values[:, [position[item] for item in items]] = readings[()]
    timestamps = _axis_times(nodes["axis1"], where)
    if timestamps is None:
        timestamps, interval = clock.invent(*values.shape)
    else:
        interval = clock.interval_of(timestamps)
    return TrafficSeries(values[:, :, None], timestamps, ids, interval, source=where)


def _axis_names(axis: h5py.Dataset, where: str) -> list[str]:
    if axis.dtype.kind not in "SiuUf":
        raise DataError(
            f"{where}: the column names are pickled objects, which are not run. Write them as strings."
        )
    return [sensor_name(name) for name in axis[()].tolist()]


def _axis_times(axis: h5py.Dataset, where: str) -> np.ndarray | None:
    """`[T]` datetime64[s]; None if rows are only numbered."""
    kind = axis.attrs.get("kind", b"")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if "tz" in axis.attrs:
        raise DataError(
            f"{where}: time stamps carry a time zone; write local times without one (tz_localize(None))."
        )
    if kind.startswith("datetime64") and axis.dtype.kind == "i":
        unit = kind.partition("[")[2].rstrip("]") or "ns"
        timestamps = axis[()].astype(f"datetime64[{unit}]").astype("datetime64[s]")
        if np.isnat(timestamps).any():
            raise DataError(f"{where}: row {int(np.argmax(np.isnat(timestamps)))} has no time stamp.")
        return timestamps
    if kind == "integer":
        return None
    raise DataError(f"{where}: rows are labelled with {kind or axis.dtype}, not with time stamps.")
