"""Writers of the plain formats; what they write, `read_series` reads back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

from domains.traffic.series import TrafficSeries
from zoo.errors import DataError
from zoo.files import atomic_path


def write_series(series: TrafficSeries, path: str | Path) -> None:
    """Write a series as `.h5`, `.npz`, `.csv` or `.parquet`; the file appears whole or not at all.

    h5 holds one channel, in METR-LA's layout. csv is wide for one channel, and long, like parquet, for
    several.

    Raises:
        DataError: another suffix, or several channels for h5.
        ZooError: the file cannot be written.
    """
    path = Path(path)
    writers = {".h5": _write_h5, ".npz": _write_npz, ".csv": _write_csv, ".parquet": _write_parquet}
    if path.suffix not in writers:
        raise DataError(f"{path}: the suffix must be one of {', '.join(writers)}.")
    with atomic_path(path) as part:
        writers[path.suffix](series, part)


def write_h5(series: TrafficSeries, path: str | Path, hidden: dict[str, np.ndarray] | None = None) -> None:
    """Write the one channel of a series as METR-LA's h5; `hidden` arrays lie beside it, where no reader
    looks."""
    with atomic_path(path) as part:
        _write_h5(series, part, hidden)


def _write_h5(series: TrafficSeries, path: Path, hidden: dict[str, np.ndarray] | None = None) -> None:
    """A pandas frame in fixed format under `df`, as PyTables would lay it out, but with nothing pickled."""
    if len(series.channels) != 1:
        raise DataError(
            f"h5 holds one channel, but the series has {', '.join(series.channels)}: write npz or parquet."
        )
    ids = np.array([sensor.encode() for sensor in series.sensor_ids])
    stamps = series.timestamps.astype("datetime64[ns]").astype(np.int64)
    with h5py.File(path, "w") as file:
        _describe(file, CLASS="GROUP", TITLE="", VERSION="1.0", PYTABLES_FORMAT_VERSION="2.1")
        frame = file.create_group("df")
        _describe(frame, CLASS="GROUP", TITLE="", VERSION="1.0", pandas_type="frame", pandas_version="0.15.2")
        _describe(frame, encoding="UTF-8", errors="strict", ndim=2, nblocks=1)
        _describe(frame, axis0_variety="regular", axis1_variety="regular", block0_items_variety="regular")
        for name, array, kind in (
            ("axis0", ids, {"kind": "string"}),
            ("axis1", stamps, {"kind": "datetime64[ns]", "index_class": "datetime"}),
            ("block0_items", ids, {"kind": "string"}),
            ("block0_values", series.values[:, :, 0].astype(np.float64), {}),
        ):
            node = frame.create_dataset(name, data=array, compression="gzip", chunks=True)
            _describe(node, CLASS="CARRAY", TITLE="", VERSION="1.1", transposed=np.uint8(1), **kind)
        for name, array in (hidden or {}).items():
            file.create_dataset(name, data=array, compression="gzip")


def _describe(node: h5py.Group | h5py.Dataset, **attributes: Any) -> None:
    """Set attributes, text as PyTables stores it: of fixed length, marked as UTF-8."""
    for name, value in attributes.items():
        if isinstance(value, str):
            node.attrs.create(name, value.encode(), dtype=h5py.string_dtype("utf-8", max(1, len(value))))
        else:
            node.attrs[name] = value


def _write_npz(series: TrafficSeries, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            data=series.values,
            timestamps=series.timestamps.astype("datetime64[s]").astype(np.int64),
            sensor_ids=np.array(series.sensor_ids),
            channels=np.array(series.channels),
        )


def _write_csv(series: TrafficSeries, path: Path) -> None:
    if len(series.channels) > 1:
        _long_frame(series).to_csv(path, index=False)
        return
    frame = pd.DataFrame(series.values[:, :, 0], columns=series.sensor_ids)
    frame.insert(0, "timestamp", series.timestamps)
    frame.to_csv(path, index=False)


def _write_parquet(series: TrafficSeries, path: Path) -> None:
    _long_frame(series).to_parquet(path, index=False)


def _long_frame(series: TrafficSeries) -> pd.DataFrame:
    """Columns timestamp, sensor, and one per channel."""
    steps, sensors, _ = series.values.shape
    columns = {
        "timestamp": np.repeat(series.timestamps, sensors),
        "sensor": np.tile(series.sensor_ids, steps),
    }
    columns |= {name: series.values[:, :, c].ravel() for c, name in enumerate(series.channels)}
    return pd.DataFrame(columns)
