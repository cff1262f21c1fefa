"""Every bad file costs one message that names file, key, row or sensor, and what would be right."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from domains.traffic.data import TrafficData
from domains.traffic.formats import read_series, write_h5, write_series
from domains.traffic.series import TrafficSeries, regular_clock
from zoo.errors import ConfigError, DataError, ZooError

STEPS, SENSORS = 200, 5


def make_series() -> TrafficSeries:
    values = np.random.default_rng(0).uniform(5, 70, (STEPS, SENSORS, 1)).astype(np.float32)
    return TrafficSeries(values, regular_clock("2024-01-03", STEPS, 5), [f"s{i}" for i in range(SENSORS)], 5)


def set_up(path: Path, series: TrafficSeries | None = None, **options) -> TrafficData:
    if series is not None:
        write_series(series, path)
    data = TrafficData("test", path, **options)
    data.setup()
    return data


# ---- damaged and impostor files ----------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_h5(tmp_path: Path, share: float) -> None:
    path = tmp_path / "metr-la.h5"
    write_h5(make_series(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(
        DataError, match=r"metr-la\.h5 \(\d+ bytes\) cannot be read as HDF5.*download it again"
    ):
        read_series(path)


def test_damaged_h5_block(tmp_path: Path) -> None:
    path = tmp_path / "metr-la.h5"
    write_h5(make_series(), path)
    with h5py.File(path) as file:
        place = file["df/block0_values"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    content[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"metr-la\.h5 .* damaged"):
        read_series(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            "is a Git LFS pointer.*git lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>Quota exceeded</html>", "is a web page"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["a.h5", "a.npz", "a.csv", "a.parquet"])
def test_impostors(tmp_path: Path, content: bytes, message: str, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} {message}"):
        read_series(tmp_path / name)


@pytest.mark.parametrize("name", ["a.h5", "a.npz", "a.npy", "a.parquet"])
def test_files_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"just some text, long enough to be read as a header of something\n" * 20)
    with pytest.raises(DataError, match=rf"{name}.* cannot be read"):
        read_series(tmp_path / name)


def test_truncated_npz_and_parquet(tmp_path: Path) -> None:
    for name in ("a.npz", "a.parquet"):
        write_series(make_series(), tmp_path / name)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=rf"{name} cannot be read"):
            read_series(tmp_path / name)


def test_absent_file_suggests_the_nearest(tmp_path: Path) -> None:
    write_h5(make_series(), tmp_path / "metr-la.h5")
    with pytest.raises(DataError, match=r"No data file .*metr_la\.h5\. Did you mean 'metr-la\.h5'"):
        read_series(tmp_path / "metr_la.h5")


def test_folder_of_no_known_layout_lists_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "train.npz").touch()
    with pytest.raises(DataError, match=r"folder with train\.npz.*train\.npz \+ val\.npz \+ test\.npz"):
        read_series(tmp_path)


# ---- keys and pickles --------------------------------------------------------------------------------------


def test_wrong_h5_key_suggests_the_nearest(tmp_path: Path) -> None:
    write_h5(make_series(), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.move("df", "speed")
    with pytest.raises(DataError, match=r"a\.h5 has no key 'sped'; it has 'speed'\. Did you mean 'speed'"):
        read_series(tmp_path / "a.h5", key="sped")


def test_wrong_npz_key_lists_the_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", flow=make_series().values, speed=make_series().values)
    with pytest.raises(DataError, match=r"no array 'flwo'.*'flow', 'speed'.*Did you mean 'flow'"):
        read_series(tmp_path / "a.npz", key="flwo")
    with pytest.raises(DataError, match=r"'flow', 'speed'\. Set data\.key"):
        read_series(tmp_path / "a.npz")


class Payload:
    """A pickle of this would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_attributes_of_an_h5_are_not_run(tmp_path: Path) -> None:
    write_h5(make_series(), tmp_path / "a.h5")
    payload = np.bytes_(pickle.dumps(Payload(tmp_path / "ran"), protocol=0))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for node in (file["df"], file["df/axis0"], file["df/axis1"], file["df/block0_values"]):
            node.attrs["freq"] = node.attrs["name"] = payload
    assert len(read_series(tmp_path / "a.h5").values) == STEPS
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["axis0", "block0_values"])
def test_pickled_columns_of_an_h5_are_refused_not_run(tmp_path: Path, name: str) -> None:
    write_h5(make_series(), tmp_path / "a.h5")
    payload = np.frombuffer(pickle.dumps(Payload(tmp_path / "ran")), dtype=np.uint8)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file[f"df/{name}"]
        file.create_dataset(f"df/{name}", (1,), dtype=h5py.vlen_dtype(np.uint8))[0] = payload
    with pytest.raises(DataError, match="pickled"):
        read_series(tmp_path / "a.h5")
    assert not (tmp_path / "ran").exists()


def test_table_format_says_how_to_write_it_again(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("df")["table"] = np.zeros(3, dtype=[("index", "i8"), ("values_block_0", "f8", 2)])
        file["df/_i_table/index/bounds"] = np.zeros((2, 3))
    with pytest.raises(DataError, match=r"key 'df'.*format='fixed'"):
        read_series(tmp_path / "a.h5")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_pickled_arrays_are_refused_and_not_run(tmp_path: Path, name: str) -> None:
    array = np.array([[Payload(tmp_path / "ran")]], dtype=object)
    (np.savez if name.endswith("z") else np.save)(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(DataError, match=f"{name} cannot be read .* without running pickles"):
        read_series(tmp_path / name)
    assert not (tmp_path / "ran").exists()


# ---- time --------------------------------------------------------------------------------------------------


def with_clock(change: Callable[[np.ndarray], np.ndarray]) -> TrafficSeries:
    series = make_series()
    series.timestamps = change(series.timestamps.copy())
    return series


def swap(stamps: np.ndarray) -> np.ndarray:
    stamps[[50, 51]] = stamps[[51, 50]]
    return stamps


def repeat(stamps: np.ndarray) -> np.ndarray:
    stamps[50] = stamps[49]
    return stamps


@pytest.mark.parametrize("name", ["a.h5", "a.csv", "a.npz"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"row 51 .* is earlier than row 50.*sort the rows"),
        (repeat, r"row 50 .* repeats the time stamp of row 49"),
        (
            lambda stamps: np.r_[stamps[:50], stamps[50:] + 3600],
            r"12 steps are missing between row 49 .*data\.gaps=fill",
        ),
        (lambda stamps: np.r_[stamps[:50], stamps[50:] + 61], r"row 50 .* not a multiple of 5 minutes"),
        (lambda stamps: stamps[0] + 7 * (stamps - stamps[0]), "35 minutes does not divide a day"),
        (lambda stamps: stamps[0] + (stamps - stamps[0]) // 10, "30 seconds apart"),
    ],
)
def test_clocks(tmp_path: Path, name: str, change: Callable, message: str) -> None:
    with pytest.raises(DataError, match=rf"{name}.*: .*{message}"):
        set_up(tmp_path / name, with_clock(change))


def test_no_time_stamps_asks_for_the_start(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", data=make_series().values)
    with pytest.raises(DataError, match=r"\(200 steps, 5 sensors\) has no time stamps: set data\.start"):
        read_series(tmp_path / "a.npz")
    with pytest.raises(DataError, match="7 minutes does not divide a day"):
        read_series(tmp_path / "a.npz", start="2024-01-01", interval_minutes=7)
    with pytest.raises(ConfigError, match=r"data\.start='tomorrow' is no date"):
        read_series(tmp_path / "a.npz", start="tomorrow", interval_minutes=5)


# ---- sensors -----------------------------------------------------------------------------------------------


def test_dead_sensors_are_named(tmp_path: Path) -> None:
    series = make_series()
    series.values[:, 1], series.values[:, 3] = 0, np.nan
    with pytest.raises(
        DataError, match=r"a\.npz: 2 sensors \('s1', 's3'\) never report.*data\.dead_sensors=drop"
    ):
        set_up(tmp_path / "a.npz", series)


def test_adjacency_of_other_sensors(tmp_path: Path) -> None:
    ids = ["s0", "s1", "s2", "s3", "other"]
    (tmp_path / "adj.pkl").write_bytes(pickle.dumps([ids, {}, np.eye(5, dtype=np.float32)]))
    with pytest.raises(DataError, match=r"adj\.pkl does not match.*'other'.*'s4'"):
        set_up(tmp_path / "a.npz", make_series(), adjacency=tmp_path / "adj.pkl")


def test_adjacency_of_another_number_of_sensors(tmp_path: Path) -> None:
    np.save(tmp_path / "adj.npy", np.eye(6))
    with pytest.raises(DataError, match=r"adj\.npy is an adjacency of 6 x 6, but the series has 5 sensors"):
        set_up(tmp_path / "a.npz", make_series(), adjacency=tmp_path / "adj.npy")


def test_se_of_another_number_of_sensors(tmp_path: Path) -> None:
    (tmp_path / "SE.txt").write_text("6 2\n" + "".join(f"{i} 1 2\n" for i in range(6)))
    with pytest.raises(DataError, match=r"SE\.txt embeds 6 sensors, but the series has 5"):
        set_up(tmp_path / "a.npz", make_series(), spatial_embedding=str(tmp_path / "SE.txt"))


def test_mistyped_embedding_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Did you mean 'node2vec'"):
        set_up(tmp_path / "a.npz", make_series(), spatial_embedding="nod2vec")


def test_sensor_ids_that_do_not_fit(tmp_path: Path) -> None:
    write_series(make_series(), tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"no readings of 1 sensor \('s7'\)"):
        read_series(tmp_path / "a.npz", sensor_ids=["s1", "s7"])
    np.save(tmp_path / "b.npy", make_series().values)
    with pytest.raises(DataError, match=r"5 sensors, but data\.sensor_ids names 2"):
        read_series(tmp_path / "b.npy", start="2024-01-01", interval_minutes=5, sensor_ids=["s1", "s7"])


# ---- readings ----------------------------------------------------------------------------------------------


def test_nan_block_is_reported_with_sensor_and_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    series = make_series()
    series.values[40:90, 2] = np.nan
    with caplog.at_level(logging.WARNING):
        set_up(tmp_path / "a.npz", series, missing="nan")
    assert "5.00 % of the readings are NaN; the longest block is sensor s2, rows 40 to 89" in caplog.text


def test_part_without_targets(tmp_path: Path) -> None:
    series = make_series()
    series.values[150:] = 0
    with pytest.raises(DataError, match=r"every target of the test part \(rows \d+ to 200\) is missing"):
        set_up(tmp_path / "a.npz", series)


def test_readings_that_are_all_alike(tmp_path: Path) -> None:
    series = make_series()
    series.values[:] = 60
    with pytest.raises(
        DataError, match=r"a\.npz: every reading of channel 'value' .* is 60.*standard deviation 0"
    ):
        set_up(tmp_path / "a.npz", series)


def test_horizon_longer_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"200 steps.*one window needs 312 .*history 12 \+ horizon 300.*Lower"
    ):
        set_up(tmp_path / "a.npz", make_series(), horizon=300)
    with pytest.raises(DataError, match=r"20 of them in the val part; one window needs 24"):
        set_up(tmp_path / "a.npz", make_series(), split_windows="inside")


def test_unknown_channel(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no channel 'valu'; it has value\. Did you mean 'value'"):
        set_up(tmp_path / "a.npz", make_series(), target="valu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time,sensor,speed\n2024-01-01,a,1\nyesterday,a,2\n", "row 1 has 'yesterday' for a time stamp"),
        (
            "time,sensor,speed\n2024-01-01,a,1\n2024-01-01 00:05,a,fast\n",
            "row 1 has 'fast' for a reading of sensor a",
        ),
        ("time,sensor,speed\n2024-01-01,a,1\n2024-01-01,a,2\n", "row 1 repeats sensor a"),
        ("time,sensor,speed\n2024-01-01,a,1\n2024-01-01 00:05,,2\n", "row 1 names no sensor"),
        (
            "time,sensor,note\n2024-01-01,a,fine\n2024-01-01 00:05,a,fine\n",
            r"none with readings.*data\.columns",
        ),
        ("time,a,b\n2024-01-01 00:00,1,2\n2024-01-01 00:05,3,x\n", "row 1 has 'x' for a reading of sensor b"),
        ("time,a,a\n2024-01-01 00:00,1,2\n2024-01-01 00:05,3,4\n", r"the header repeats 1 name \('a'\)"),
        ("time,a\n2024-01-01 00:00,1\n2024-01-01 00:05,2,3,4\n", "is not a table"),
        (
            "time,a,b\n2024-01-01 00:00,1,2\n2024-01-01 00:05,3\n",
            "row 3 of the file has 2 cells, but the first has 3",
        ),
        ("time,sensor,speed\n", "has no rows"),
        ("time,sensor,speed\n2024-01-01,a,1\n", "one time stamp does not tell the interval"),
        ("time,sensor,speed\n5,a,1\n10,a,1\n", "no time stamps"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(DataError, match=rf"a\.csv.*{message}"):
        read_series(tmp_path / "a.csv")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("wann,wo,wert\n2024-01-01,a,1\n")
    with pytest.raises(
        DataError, match=r"no column 'wertt'; it has 'wann', 'wo', 'wert'\. Did you mean 'wert'"
    ):
        read_series(tmp_path / "a.csv", columns=["wann", "wo", "wertt"])


# ---- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": "zeros"}, "Did you mean 'zero'"),
        ({"fill": "foward"}, "Did you mean 'forward'"),
        ({"gaps": "fil"}, "Did you mean 'fill'"),
        ({"format": "h55"}, "Did you mean 'h5'"),
        ({"dead_sensors": "ignore"}, "not one of error, drop, keep"),
        ({"history": 0}, "at least 1"),
    ],
)
def test_options(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_up(tmp_path / "a.npz", make_series(), **options)


def test_data_set_without_its_file() -> None:
    with pytest.raises(ConfigError, match=r"data\.name=metr_la needs its file: set data\.path=FILE"):
        TrafficData("metr_la").setup()


def test_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_series(make_series(), tmp_path / "a.csv")
    before = (tmp_path / "a.csv").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ZooError, match=r"a\.csv: No space left on device"):
        write_series(make_series(), tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("format", ["h5", "npz", "csv", "parquet", "basicts", "dcrnn", "staeformer"])
def test_a_forced_format_of_a_missing_file_or_a_folder_is_one_message(tmp_path: Path, format: str) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read_series(path, format=format)
