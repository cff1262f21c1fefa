"""Readers of the file formats in which traffic series are published, and writers of the plain ones:
`read_series` finds the format out and hands over to the reader of its kind (`h5`, `arrays`, `folders`,
`tables`), `clock` makes the time stamps that a file lacks, and `write` holds the writers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from domains.traffic.formats.arrays import load_npy, read_array, read_npz
from domains.traffic.formats.clock import PUBLISHED, Clock
from domains.traffic.formats.common import refuse_impostors
from domains.traffic.formats.folders import read_basicts, read_dcrnn, read_staeformer
from domains.traffic.formats.h5 import read_h5
from domains.traffic.formats.tables import read_csv, read_parquet
from domains.traffic.formats.write import write_h5, write_series
from domains.traffic.graph import read_sensor_ids
from domains.traffic.series import GAPS, TrafficSeries
from zoo.errors import ConfigError, DataError, did_you_mean

__all__ = ["FORMATS", "PUBLISHED", "detect_format", "read_series", "write_h5", "write_series"]

FORMATS = ("auto", "h5", "npz", "npy", "csv", "parquet", "dcrnn", "basicts", "staeformer")


def read_series(
    path: str | Path,
    *,
    format: str = "auto",
    key: str | None = None,
    start: str | None = None,
    interval_minutes: int | None = None,
    weekdays_only: bool | None = None,
    sensor_ids: str | Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    header: bool | None = None,
    gaps: str = "error",
) -> TrafficSeries:
    """Read a traffic series from a file or folder of any published layout.

    ===========  ==========================================================================================
    h5           a pandas frame in fixed format (METR-LA, PEMS-BAY, LargeST); nothing pickled in it is run
    npz, npy     an array `[T, N]` or `[T, N, C]` (PEMS03/04/07/08, key `data`)
    csv          wide, with or without time stamps and a header of ids (PeMSD7, Los-loop, SZ-taxi);
                 or long, with columns for time stamp, sensor and one or more values in any order
    parquet      as csv
    dcrnn        a folder with `{train,val,test}.npz` of overlapping windows `x`, `y` `[S, P, N, C]`
    basicts      a folder with `data.dat` + `desc.json`, or `{train,val,test}_data.npy` + `meta.json`
    staeformer   a folder with `data.npz` + `index.npz`
    ===========  ==========================================================================================

    Windows that were cut already are put together to the series they came from, after a check that they
    overlap as windows of one series do; the split of such a folder is kept in `parts`. Channels that hold the
    time of day or the day of week become time stamps.

    Args:
        format: one of `FORMATS`; `auto` goes by content and file name.
        key: the group of an h5, the array of an npz.
        start: date and time of the first row, where the file has no time stamps; known for published sets.
        interval_minutes: minutes between rows, if the file does not say, or to hold it to.
        weekdays_only: the rows leave out Saturdays and Sundays; only where the file has no time stamps.
        sensor_ids: ids in the order of the sensor axis (a list, or a file as `read_sensor_ids` takes) for
            arrays without ids; the sensors to keep, in this order, for files with ids.
        columns: names of a long table's columns for time stamp, sensor and values; found by usual names
            otherwise.
        header: whether the first row of a csv holds names; found out by default.
        gaps: `error`, `fill` with missing readings, or `keep` the rows as they are (no window crosses a gap).

    Raises:
        DataError: the file is not what it should be; the message names file, key, row or sensor, and the way
            out.
    """
    path = Path(path)
    for name, value, options in (("format", format, FORMATS), ("gaps", gaps, GAPS)):
        if value not in options:
            raise ConfigError(
                f"data.{name}={value} is not one of {', '.join(options)}.{did_you_mean(value, options)}"
            )
    if format == "auto":
        format = detect_format(path)
    clock = Clock(path, start, interval_minutes, weekdays_only)
    ids = (
        read_sensor_ids(sensor_ids)
        if isinstance(sensor_ids, str)
        else sensor_ids and [str(s) for s in sensor_ids]
    )
    readers: dict[str, Callable[[], TrafficSeries]] = {
        "h5": lambda: read_h5(path, key, clock),
        "npz": lambda: read_npz(path, key, clock),
        "npy": lambda: read_array(path, load_npy(path), clock),
        "csv": lambda: read_csv(path, columns, header, clock),
        "parquet": lambda: read_parquet(path, columns, clock),
        "dcrnn": lambda: read_dcrnn(path, clock),
        "basicts": lambda: read_basicts(path, clock),
        "staeformer": lambda: read_staeformer(path, clock),
    }
    try:
        if path.is_file():
            refuse_impostors(path)
        series = _name_sensors(readers[format](), ids)
    except OSError as error:
        raise DataError(f"Cannot read {path} as {format}: {error.strerror or error}.") from None
    series.check(gaps="keep", dead_sensors="keep")
    if gaps == "fill":
        return series.filled()
    return series.check(gaps=gaps, dead_sensors="keep")


def detect_format(path: Path) -> str:
    """The format of a file by its suffix, of a folder by the files in it."""
    if path.is_dir():
        layouts = (
            ("dcrnn", ("train.npz", "val.npz", "test.npz")),
            ("staeformer", ("data.npz", "index.npz")),
            ("basicts", ("data.dat", "desc.json")),
            ("basicts", ("train_data.npy", "meta.json")),
        )
        for name, files in layouts:
            if all((path / file).is_file() for file in files):
                return name
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        wanted = "; ".join(" + ".join(files) for _, files in layouts)
        raise DataError(
            f"{path} is a folder with {found}. A folder of one of these layouts is expected: {wanted}."
        )
    if not path.is_file():
        raise DataError(f"No data file {path}.{_neighbours(path)}")
    suffixes = {
        "h5": (".h5", ".hdf5", ".hdf"),
        "npz": (".npz",),
        "npy": (".npy",),
        "parquet": (".parquet", ".pq"),
        "csv": (".csv", ".txt", ".csv.gz", ".tsv"),
    }
    for name, endings in suffixes.items():
        if path.name.lower().endswith(endings):
            return name
    raise DataError(
        f"{path}: the suffix tells no format; set data.format to one of {', '.join(FORMATS[1:])}."
    )


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    return did_you_mean(path.name, [entry.name for entry in folder.iterdir()])


def _name_sensors(series: TrafficSeries, ids: Sequence[str] | None) -> TrafficSeries:
    """The sensors `ids` of the series, or its sensors under these names where it only numbers them."""
    if not ids:
        return series
    numbered = series.sensor_ids == [str(i) for i in range(len(series.sensor_ids))]
    if not numbered or set(series.sensor_ids) & set(ids):
        return series.select(ids)
    if len(ids) != len(series.sensor_ids):
        raise DataError(
            f"{series.source} has {len(series.sensor_ids)} sensors, but data.sensor_ids names {len(ids)}."
        )
    return replace(series, sensor_ids=list(ids))
