"""Every published layout gives the same series; what was written is read back."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domains.traffic.formats import PUBLISHED, detect_format, read_series, write_h5, write_series
from domains.traffic.series import TrafficSeries, regular_clock
from zoo.errors import DataError

STEPS, SENSORS = 600, 4  # a little over two days of five minutes


def make_series(channels: int = 1, steps: int = STEPS) -> TrafficSeries:
    rng = np.random.default_rng(0)
    values = rng.uniform(5, 70, (steps, SENSORS, channels)).round(3).astype(np.float32)
    ids = ["773869", "767541", "767542", "717447"]
    return TrafficSeries(
        values, regular_clock("2012-03-01", steps, 5), ids, 5, ["value", "flow", "speed"][:channels]
    )


def assert_same(read: TrafficSeries, expected: TrafficSeries, ids: bool = True) -> None:
    np.testing.assert_array_equal(read.values, expected.values)
    np.testing.assert_array_equal(read.timestamps, expected.timestamps)
    assert read.interval_minutes == expected.interval_minutes
    if ids:
        assert read.sensor_ids == expected.sensor_ids


# ---- round trips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels"),
    [("a.h5", 1), ("a.npz", 1), ("a.npz", 3), ("a.csv", 1), ("a.csv", 3), ("a.parquet", 1), ("a.parquet", 3)],
)
def test_written_series_is_read_back(tmp_path: Path, name: str, channels: int) -> None:
    series = make_series(channels)
    series.values[3, 1] = np.nan
    write_series(series, tmp_path / name)
    back = read_series(tmp_path / name, sensor_ids=series.sensor_ids)
    assert_same(back, series)
    assert back.channels == series.channels
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_several_channels_do_not_go_into_h5(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="one channel, but the series has value, flow"):
        write_series(make_series(2), tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


# ---- h5 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["datetime64", "datetime64[ns]", "datetime64[us]", "datetime64[ms]", "datetime64[s]"]
)
def test_h5_time_stamps_of_every_pandas_version(tmp_path: Path, kind: str) -> None:
    write_h5(make_series(), tmp_path / "a.h5")
    unit = kind.partition("[")[2].rstrip("]") or "ns"
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["df/axis1"][:] = make_series().timestamps.astype(f"datetime64[{unit}]").astype(np.int64)
        file["df/axis1"].attrs["kind"] = np.bytes_(kind)
    assert_same(read_series(tmp_path / "a.h5"), make_series())


def test_h5_of_another_key_with_integer_ids_and_two_blocks(tmp_path: Path) -> None:
    series = make_series()
    series.values[:, 2] = np.arange(STEPS)[:, None]
    write_h5(series, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.move("df", "speed")
        group = file["speed"]
        ids, values = np.array([int(i) for i in series.sensor_ids]), group["block0_values"][()]
        for name in ("axis0", "block0_items", "block0_values"):
            del group[name]
        group["axis0"] = ids
        group["block0_items"], group["block0_values"] = ids[[3, 0, 1]], values[:, [3, 0, 1]]
        group["block1_items"], group["block1_values"] = ids[[2]], values[:, [2]].astype(np.int64)
    assert_same(read_series(tmp_path / "a.h5"), series)
    assert_same(read_series(tmp_path / "a.h5", key="/speed"), series)


def test_h5_array_without_a_frame_takes_its_clock_from_the_user(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["readings"] = make_series().values[:, :, 0]
    read = read_series(tmp_path / "a.h5", start="2012-03-01", interval_minutes=5)
    assert_same(read, make_series(), ids=False)


def test_real_week_is_the_same_from_h5_and_csv(shared_data: Path) -> None:
    folder = shared_data / "traffic" / "los-loop"
    h5, csv = read_series(folder / "metr-la-week1.h5"), read_series(folder / "los_speed.csv")
    assert h5.values.shape == (2016, 207, 1)
    assert str(h5.timestamps[0]) == "2012-03-01T00:00:00"
    assert str(h5.timestamps[-1]) == "2012-03-07T23:55:00"
    assert_same(csv, h5)


# ---- arrays and tables without time stamps -----------------------------------------------------------------


def test_pems_npz_has_known_start_and_channel_names(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1, 300, (16992, 307, 3)).astype(np.float32)
    np.savez(tmp_path / "PEMS04.npz", data=values)
    series = read_series(tmp_path / "PEMS04.npz")
    assert series.channels == ["flow", "occupancy", "speed"]
    assert (str(series.timestamps[0]), str(series.timestamps[-1])) == (
        "2018-01-01T00:00:00",
        "2018-02-28T23:55:00",
    )


def test_known_periods_end_with_the_last_slot_of_a_day() -> None:
    for (steps, sensors), (start, interval, weekdays_only) in PUBLISHED.items():
        end = regular_clock(start, steps, interval, weekdays_only)[-1]
        if (steps, sensors) != (52116, 325):  # an hour is lost there
            assert end - end.astype("datetime64[D]") == np.timedelta64(1440 - interval, "m"), (steps, sensors)


def test_npz_ids_come_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=make_series().values)
    (tmp_path / "ids.txt").write_text("\n".join(make_series().sensor_ids))
    read = read_series(
        tmp_path / "a.npz", start="2012-03-01", interval_minutes=5, sensor_ids=str(tmp_path / "ids.txt")
    )
    assert_same(read, make_series())


def test_headerless_csv_of_weekdays(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "V_4.csv", make_series().values[:, :, 0], delimiter=",", fmt="%.3f")
    read = read_series(tmp_path / "V_4.csv", start="2012-05-03", interval_minutes=5, weekdays_only=True)
    np.testing.assert_array_equal(read.values, make_series().values)
    assert str(read.timestamps[576]) == "2012-05-07T00:00:00"


@pytest.mark.parametrize("header", ["0,1,2,3", "773869,767541,767542,717447", "a,b,c,d"])
def test_csv_with_a_header_of_ids(tmp_path: Path, header: str) -> None:
    np.savetxt(
        tmp_path / "a.csv",
        make_series().values[:, :, 0],
        delimiter=",",
        header=header,
        comments="",
        fmt="%.3f",
    )
    read = read_series(tmp_path / "a.csv", start="2012-03-01", interval_minutes=5)
    np.testing.assert_array_equal(read.values, make_series().values)
    assert read.sensor_ids == header.split(",")


def test_counts_in_the_first_row_are_no_header(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).permuted(np.tile(np.arange(100, 160), (3, 1)), axis=1).T
    np.savetxt(tmp_path / "a.csv", counts, delimiter=",", fmt="%d")
    read = read_series(tmp_path / "a.csv", start="2012-03-01", interval_minutes=5)
    np.testing.assert_array_equal(read.values[:, :, 0], counts)


@pytest.mark.parametrize("first", ["timestamp", "", "Date"])
def test_wide_csv_with_time_stamps(tmp_path: Path, first: str) -> None:
    frame = pd.DataFrame(make_series().values[:, :, 0], columns=make_series().sensor_ids)
    frame.insert(0, first, make_series().timestamps)
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert_same(read_series(tmp_path / "a.csv"), make_series())


@pytest.mark.parametrize("separator", [",", ";", "\t", " "])
def test_separators_inside_quotes_count_for_nothing(tmp_path: Path, separator: str) -> None:
    ids = [f"ramp {i}, exit north, lane 1, 2; 3" for i in range(SENSORS)]
    series = replace(make_series(), sensor_ids=ids)
    frame = pd.DataFrame(series.values[:, :, 0], columns=ids)
    frame.insert(0, "timestamp", series.timestamps)
    frame.to_csv(tmp_path / "a.csv", index=False, sep=separator, quoting=csv.QUOTE_NONNUMERIC)
    assert_same(read_series(tmp_path / "a.csv"), series)


def test_row_cut_off_below_a_quoted_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('time,"a, north",b\n2024-01-01,1,2\n2024-01-02,3\n')
    with pytest.raises(DataError, match="row 3 of the file has 2 cells, but the first has 3"):
        read_series(tmp_path / "a.csv")


def test_wide_csv_without_header_but_with_time_stamps(tmp_path: Path) -> None:
    frame = pd.DataFrame(make_series().values[:, :, 0])
    frame.insert(0, "t", make_series().timestamps)
    frame.to_csv(tmp_path / "a.csv", index=False, header=False)
    assert_same(read_series(tmp_path / "a.csv"), make_series(), ids=False)


def test_wide_parquet_with_time_index(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        make_series().values[:, :, 0], columns=make_series().sensor_ids, index=make_series().timestamps
    )
    frame.to_parquet(tmp_path / "a.parquet")
    assert_same(read_series(tmp_path / "a.parquet"), make_series())


# ---- long tables -------------------------------------------------------------------------------------------


@st.composite
def long_tables(draw: st.DrawFn) -> tuple[pd.DataFrame, np.ndarray]:
    """Rows of a long table in any order and with some left out, and the array they stand for."""
    steps, sensors = draw(st.integers(3, 8)), draw(st.integers(1, 4))
    values = draw(
        st.lists(st.floats(0, 100, width=32) | st.none(), min_size=steps * sensors, max_size=steps * sensors)
    )
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float32).reshape(steps, sensors)
    array[:, 0] = np.nan_to_num(array[:, 0], nan=1)  # every step and sensor occurs
    array[0] = np.nan_to_num(array[0], nan=1)
    step, sensor = np.nonzero(~np.isnan(array))
    frame = pd.DataFrame(
        {
            "time": regular_clock("2024-01-01", steps, 15)[step],
            "station": sensor + 7,
            "speed": array[step, sensor],
        }
    )
    return frame.iloc[draw(st.permutations(range(len(frame))))].reset_index(drop=True), array


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=long_tables(), suffix=st.sampled_from(["csv", "parquet"]), reverse=st.booleans())
def test_long_table_does_not_depend_on_the_order_of_rows_and_columns(
    tmp_path: Path, table: tuple[pd.DataFrame, np.ndarray], suffix: str, reverse: bool
) -> None:
    frame, array = table
    frame = frame[list(frame)[::-1]] if reverse else frame
    path = tmp_path / f"long.{suffix}"
    frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    series = read_series(path)
    np.testing.assert_array_equal(series.values[:, :, 0], array)
    assert series.sensor_ids == [str(i + 7) for i in range(array.shape[1])]
    assert (series.interval_minutes, series.channels) == (15, ["speed"])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=long_tables(), data=st.data())
def test_long_table_with_a_repeated_or_wrong_cell_is_refused(
    tmp_path: Path, table: tuple[pd.DataFrame, np.ndarray], data: st.DataObject
) -> None:
    frame, path = table[0], tmp_path / "long.csv"
    row = data.draw(st.integers(0, len(frame) - 1))
    pd.concat([frame, frame.iloc[[row]]]).to_csv(path, index=False)
    with pytest.raises(DataError, match=f"row {len(frame)} repeats sensor {frame.station[row]}"):
        read_series(path)
    for column, message in (("speed", "for a reading of sensor"), ("time", "for a time stamp")):
        wrong = frame.astype(object)
        wrong.loc[row, column] = "oops"
        wrong.to_csv(path, index=False)
        with pytest.raises(DataError, match=f"row {row} has 'oops' {message}"):
            read_series(path)


def test_long_table_gap_is_filled_on_request(tmp_path: Path) -> None:
    frame = pd.DataFrame({"timestamp": make_series().timestamps, "sensor": "a", "value": 1.0}).drop(
        index=[10, 11]
    )
    frame.to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataError, match="2 steps are missing between row 9"):
        read_series(tmp_path / "a.csv")
    filled = read_series(tmp_path / "a.csv", gaps="fill")
    assert np.flatnonzero(np.isnan(filled.values)).tolist() == [10, 11]
    assert len(read_series(tmp_path / "a.csv", gaps="keep").values) == STEPS - 2


def test_long_table_with_names_of_its_own(tmp_path: Path) -> None:
    series = make_series(3)
    write_series(series, tmp_path / "a.parquet")
    names = {"timestamp": "wann", "sensor": "wo", "value": "wieviel"}
    pd.read_parquet(tmp_path / "a.parquet").rename(columns=names).to_csv(tmp_path / "b.csv", index=False)
    read = read_series(tmp_path / "b.csv", columns=["wann", "wo", "wieviel"], sensor_ids=series.sensor_ids)
    assert_same(read, replace(series, values=series.values[:, :, :1], channels=["value"]))


def test_sensor_ids_keep_leading_zeros_and_mixed_types(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "time,sensor,flow\n"
        + "".join(f"2024-01-01 00:0{5 * (i // 3)},{s},1\n" for i, s in enumerate(["007", "12", "N1"] * 2))
    )
    assert read_series(tmp_path / "a.csv").sensor_ids == ["007", "12", "N1"]


def test_unix_seconds_are_time_stamps(tmp_path: Path) -> None:
    frame = pd.DataFrame({"time": make_series().timestamps.astype(np.int64), "sensor": 1, "flow": 2.5})
    frame.to_csv(tmp_path / "a.csv", index=False)
    np.testing.assert_array_equal(read_series(tmp_path / "a.csv").timestamps, make_series().timestamps)


# ---- folders -----------------------------------------------------------------------------------------------


def with_time_channels(series: TrafficSeries, week: float = 1.0) -> np.ndarray:
    """`[T, N, C + 2]`: readings, time of day, day of week divided by `week`."""
    day, slot = series.time_features().T
    clock = np.stack([slot / series.steps_per_day, day / week], axis=1).astype(np.float32)
    return np.concatenate([series.values, np.broadcast_to(clock[:, None], (len(day), SENSORS, 2))], axis=2)


def write_windows(
    folder: Path,
    values: np.ndarray,
    counts: tuple[int, int, int],
    inside: bool = False,
    y_channels: int | None = None,
) -> None:
    """DCRNN's windows of 12 + 12 steps, cut across the series or inside each part."""
    begin = 0
    for part, count in zip(("train", "val", "test"), counts, strict=True):
        starts = np.arange(begin, begin + count)[:, None]
        x, y = values[starts + np.arange(12)], values[starts + np.arange(12, 24)]
        np.savez(folder / f"{part}.npz", x=x, y=y[..., :y_channels])
        begin += count + (23 if inside else 0)


@pytest.mark.parametrize("y_channels", [None, 1])
def test_dcrnn_windows_become_the_series_and_keep_their_split(tmp_path: Path, y_channels: int | None) -> None:
    series = make_series()
    write_windows(tmp_path, with_time_channels(series)[:, :, :2], (400, 77, 100), y_channels=y_channels)
    read = read_series(tmp_path, start="2012-03-01")
    assert_same(read, series, ids=False)
    assert read.parts == {"train": (0, 423), "val": (400, 500), "test": (477, 600)}


def test_dcrnn_windows_cut_inside_each_part(tmp_path: Path) -> None:
    series = make_series()
    write_windows(tmp_path, with_time_channels(series)[:, :, :2], (377, 77, 77), inside=True)
    read = read_series(tmp_path, start="2012-03-01")
    assert_same(read, series, ids=False)
    assert read.parts == {"train": (0, 400), "val": (400, 500), "test": (500, 600)}


def test_windows_with_channels_of_readings(tmp_path: Path) -> None:
    """NYCTaxi's layout: pick-ups and drop-offs, no time."""
    series = make_series(2)
    write_windows(tmp_path, series.values, (400, 77, 100))
    read = read_series(tmp_path, start="2012-03-01", interval_minutes=5)
    assert_same(read, series, ids=False)
    assert len(read.channels) == 2


def test_shuffled_windows_are_refused(tmp_path: Path) -> None:
    write_windows(tmp_path, make_series().values, (400, 77, 100))
    with np.load(tmp_path / "val.npz") as file:
        x, y = file["x"][::-1], file["y"][::-1]
    np.savez(tmp_path / "val.npz", x=x, y=y)
    with pytest.raises(DataError, match=r"val\.npz: x\[0, 1\] of sensor 0 differs"):
        read_series(tmp_path, start="2012-03-01", interval_minutes=5)


def test_basicts_first_layout(tmp_path: Path) -> None:
    series = make_series()
    values = with_time_channels(series, week=7)
    values.tofile(tmp_path / "data.dat")
    settings_ = {"TRAIN_VAL_TEST_RATIO": [0.6, 0.2, 0.2]}
    (tmp_path / "desc.json").write_text(
        json.dumps({"shape": values.shape, "frequency (minutes)": 5, "regular_settings": settings_})
    )
    read = read_series(tmp_path, start="2012-03-01")
    assert_same(read, series, ids=False)
    assert read.parts == {"train": (0, 360), "val": (360, 480), "test": (480, 600)}
    (tmp_path / "data.dat").write_bytes((tmp_path / "data.dat").read_bytes()[:-40])
    with pytest.raises(DataError, match=r"data\.dat has 28760 bytes, but desc\.json .* 28800 bytes"):
        read_series(tmp_path)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_basicts_present_layout(tmp_path: Path, dimensions: int) -> None:
    series = make_series()
    full = with_time_channels(series, week=7)
    for part, (begin, end) in {"train": (0, 360), "val": (360, 480), "test": (480, 600)}.items():
        values = series.values[begin:end] if dimensions == 3 else series.values[begin:end, :, 0]
        np.save(tmp_path / f"{part}_data.npy", values)
        np.save(tmp_path / f"{part}_timestamps.npy", full[begin:end, 0, 1:])
    meta = {"frequency (minutes)": 5, "timestamps_description": ["time of day", "day of week"]}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    read = read_series(tmp_path)  # a nominal date with the right days of the week
    np.testing.assert_array_equal(read.values, series.values)
    np.testing.assert_array_equal(read.time_features(), series.time_features())
    assert read.parts == {"train": (0, 360), "val": (360, 480), "test": (480, 600)}


def test_staeformer_layout(tmp_path: Path) -> None:
    series = make_series()
    np.savez(tmp_path / "data.npz", data=with_time_channels(series))
    starts = np.arange(STEPS - 23)
    rows = np.stack([starts, starts + 12, starts + 24], axis=1)
    np.savez(tmp_path / "index.npz", train=rows[:400], val=rows[400:477], test=rows[477:])
    read = read_series(tmp_path, start="2012-03-01")
    assert_same(read, series, ids=False)
    assert read.parts == {"train": (0, 423), "val": (400, 500), "test": (477, 600)}


def test_lost_hour_shows_in_the_time_of_day(tmp_path: Path) -> None:
    values = np.delete(with_time_channels(make_series())[:, :, :2], range(310, 322), axis=0)
    np.savez(tmp_path / "a.npz", data=values)
    with pytest.raises(DataError, match="12 steps are missing between row 309"):
        read_series(tmp_path / "a.npz", start="2012-03-01")


def test_formats_are_told_apart(tmp_path: Path) -> None:
    for name, format in (("a.hdf5", "h5"), ("a.NPZ", "npz"), ("a.csv.gz", "csv"), ("a.pq", "parquet")):
        (tmp_path / name).write_bytes(b"x")
        assert detect_format(tmp_path / name) == format
