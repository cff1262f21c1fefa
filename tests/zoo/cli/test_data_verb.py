"""`zoo data make | info | convert`, as typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from domains.traffic.formats import read_series, write_series
from domains.traffic.series import TrafficSeries, regular_clock
from zoo.cli.data import data_app
from zoo.errors import ConfigError, DataError, UnknownName, ZooError


def zoo_data(*arguments: object) -> str:
    result = CliRunner().invoke(data_app, [str(a) for a in arguments])
    if isinstance(result.exception, ZooError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    values = np.full((20, 3, 1), 60, dtype=np.float32)
    values[:, 1] = 0
    values[5:, 2] = 30
    write_series(
        TrafficSeries(values, regular_clock("2024-01-01", 20, 15), ["a", "b", "c"], 15), tmp_path / "in.csv"
    )
    return tmp_path / "in.csv"


def test_info_says_what_is_in_a_file(file: Path) -> None:
    text = zoo_data("info", file)
    for fact in (
        "sensors 3",
        "steps 20",
        "15 minutes",
        "2024-01-01T00:00:00 to 2024-01-01T04:45:00",
        "1 sensor ('b')",
        "33.33%",
    ):
        assert fact in text


def test_info_takes_reading_options(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((30, 2)))
    assert "10 minutes" in zoo_data("info", tmp_path / "a.npy", "start=2024-01-01", "interval_minutes=10")


def test_convert_writes_the_same_series(file: Path, tmp_path: Path) -> None:
    for name in ("out.h5", "out.npz", "out.parquet"):
        zoo_data("convert", file, tmp_path / name)
        np.testing.assert_array_equal(read_series(tmp_path / name).values, read_series(file).values)


def test_make_writes_files_that_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    text = zoo_data("make", "traffic", "--output", tmp_path / "out", "--weeks", 1, "--seed", 3)
    assert all(str(path) in text for path in (tmp_path / "out").iterdir())
    (series,) = (tmp_path / "out").glob("*.h5")
    assert len(read_series(series).values) == 7 * 288


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("info", "FILE", "kee=df"), ConfigError, "no option 'kee'. Did you mean 'key'"),
        (("info", "FILE", "key"), ConfigError, "is not of the form key=value, e.g. key=speed"),
        (("info", "FILE.h5"), DataError, "No data file"),
        (("convert", "FILE", "out.xls"), DataError, r"out\.xls: the suffix must be one of"),
        (("make", "trafic"), UnknownName, "Did you mean 'traffic'"),
    ],
)
def test_mistakes(file: Path, arguments: tuple[str, ...], error: type[ZooError], message: str) -> None:
    with pytest.raises(error, match=message):
        zoo_data(*(a.replace("FILE", str(file)) for a in arguments))
