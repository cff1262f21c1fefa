"""Files of series in the layouts that users bring."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.sources import read_frame, read_set
from zoo.errors import DataError


@pytest.fixture
def long() -> pd.DataFrame:
    """Two hourly series of 30 and 20 steps, the first with a missing value."""
    parts = [
        pd.DataFrame(
            {
                "item_id": name,
                "timestamp": pd.date_range("2024-01-01", periods=steps, freq="h"),
                "target": np.arange(steps) + 100.0 * i,
            }
        )
        for i, (name, steps) in enumerate((("a", 30), ("b", 20)))
    ]
    frame = pd.concat(parts, ignore_index=True)
    frame.loc[3, "target"] = np.nan
    return frame


def same(found: tuple[pd.DataFrame, dict[str, Any]], expected: pd.DataFrame, freq: str = "h") -> None:
    frame: Any
    frame, told = found
    assert told["freq"].freqstr == freq
    columns = [told["id_column"], told["timestamp_column"], *told["target"]]
    given = frame[columns].set_axis(["item_id", "timestamp", "target"], axis=1)
    pd.testing.assert_frame_equal(given, expected, check_dtype=False)


@pytest.mark.parametrize("names", [("item_id", "timestamp", "target"), ("unique_id", "ds", "y")])
@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_long_tables(tmp_path: Path, long: pd.DataFrame, names: tuple[str, ...], suffix: str) -> None:
    table, path = long.set_axis(list(names), axis=1), tmp_path / f"series.{suffix}"
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False)
    same(read_frame(path), long)


def test_semicolons_separate_too(tmp_path: Path, long: pd.DataFrame) -> None:
    long.to_csv(tmp_path / "series.csv", index=False, sep=";")
    same(read_frame(tmp_path / "series.csv"), long)


@pytest.mark.parametrize("named", [True, False])
def test_a_wide_table_is_a_series_per_column(
    tmp_path: Path, long: pd.DataFrame, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wide: Any = long.pivot(index="timestamp", columns="item_id", values="target")
    wide.to_csv(tmp_path / "wide.csv", index_label="date" if named else None)
    frame, told = read_frame(tmp_path / "wide.csv")
    assert "series of its own: 'a', 'b'" in caplog.text
    same((frame.dropna(subset="target").reset_index(drop=True), told), long.dropna().reset_index(drop=True))
    together, told = read_frame(tmp_path / "wide.csv", target=["a", "b"])
    assert (len(together), told["target"]) == (30, ["a", "b"])


def test_the_rows_of_m4_have_the_frequency_of_their_part(tmp_path: Path) -> None:
    rows = pd.DataFrame({"V1": ["H1", "H2"], "V2": [1, 4], "V3": [2, 5], "V4": [3, np.nan]})
    rows.to_csv(tmp_path / "Hourly-train.csv", index=False)
    frame, told = read_frame(tmp_path / "Hourly-train.csv")
    assert frame.groupby("item_id")["target"].apply(list).to_dict() == {"H1": [1, 2, 3], "H2": [4, 5]}
    assert told["freq"].freqstr == "h"
    rows.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match="2 series without time stamps: give their frequency"):
        read_frame(tmp_path / "other.csv")
    assert read_frame(tmp_path / "other.csv", freq="MS")[1]["freq"].freqstr == "MS"


@pytest.mark.parametrize("freq", ["D", "W", "M", "15min"])
def test_a_matrix_is_a_series_per_column(tmp_path: Path, freq: str) -> None:
    values = np.arange(12.0).reshape(4, 3)
    np.savetxt(tmp_path / "rates.txt", values, delimiter=",")
    found = read_set(tmp_path / "rates.txt", horizon=1, freq=freq)
    assert [item.name for item in found.items] == ["series_0", "series_1", "series_2"]
    np.testing.assert_array_equal(np.concatenate([item.target for item in found.items]), values.T)
    with pytest.raises(DataError, match="3 series without time stamps"):
        read_frame(tmp_path / "rates.txt")


def test_steps_may_be_counted_where_the_frequency_is_given(tmp_path: Path, long: pd.DataFrame) -> None:
    counted = long.assign(timestamp=long.groupby("item_id").cumcount() + 1)
    counted.to_csv(tmp_path / "series.csv", index=False)
    expected = long.assign(
        timestamp=long["timestamp"] - pd.Timestamp("2024-01-01") + pd.Timestamp("2000-01-01")
    )
    same(read_frame(tmp_path / "series.csv", freq="h"), expected)
    with pytest.raises(DataError, match="holds numbers such as 1, not dates"):
        read_frame(tmp_path / "series.csv")


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz"])
def test_json_lines_of_gluonts(tmp_path: Path, long: pd.DataFrame, suffix: str) -> None:
    lines = [
        json.dumps(
            {
                "item_id": name,
                "start": "2024-01-01 00:00:00",
                "target": [None if np.isnan(v) else v for v in rows["target"]],
                "feat_static_cat": [1],
                "feat_dynamic_real": [list(range(len(rows) + 5))],
            }
        )
        for name, rows in long.groupby("item_id")
    ]
    opened = gzip.open if suffix.endswith("gz") else open
    with opened(tmp_path / f"data.{suffix}", "wt") as file:
        file.write("\n".join(lines))
    with pytest.raises(DataError, match="line 1: the frequency is not known"):
        read_frame(tmp_path / f"data.{suffix}", target="target")
    (tmp_path / "metadata.json").write_text('{"freq": "H"}')
    frame: Any
    frame, told = read_frame(tmp_path / f"data.{suffix}", target="target", known=["feat_dynamic_real_0"])
    assert frame["feat_dynamic_real_0"].tolist() == [*range(35), *range(25)]
    inside = pd.concat([rows.iloc[:-5] for _, rows in frame.groupby("item_id")], ignore_index=True)
    same((inside, told), long)
    assert frame.groupby("item_id")["target"].tail(5).isna().all()


def test_tsf_of_monash(tmp_path: Path, long: pd.DataFrame) -> None:
    rows = [
        f"{name}:NSW:2024-01-01 00-00-00:" + ",".join("?" if np.isnan(v) else str(v) for v in part["target"])
        for name, part in long.groupby("item_id")
    ]
    head = (
        "# a comment\n@relation demand\n@attribute series_name string\n@attribute state string\n"
        "@attribute start_timestamp date\n@frequency hourly\n@missing true\n@equallength false\n@data\n"
    )
    path = tmp_path / "demand.tsf"
    path.write_text(head + "\n".join(rows), encoding="latin-1")
    same(read_frame(path), long)
    path.write_text(head.replace("hourly", "fortnightly") + rows[0])
    with pytest.raises(DataError, match="line 6: 'fortnightly' is no frequency"):
        read_frame(path)
    path.write_text(head + "a:2024-01-01 00-00-00:1,2")
    with pytest.raises(DataError, match="line 10 has 2 attributes, the header 3"):
        read_frame(path)
    path.write_text(head + "a:NSW:2024-01-01 00-00-00:1,two")
    with pytest.raises(DataError, match="line 10: could not convert string to float"):
        read_frame(path)


def test_nested_rows(tmp_path: Path, long: pd.DataFrame) -> None:
    nested = long.groupby("item_id").agg(list).reset_index()
    nested.to_parquet(tmp_path / "nested.parquet")
    same(read_frame(tmp_path / "nested.parquet"), long)
    nested.at[1, "target"] = [1.0]
    nested.to_parquet(tmp_path / "nested.parquet")
    with pytest.raises(DataError, match="row 1 has lists of different lengths: timestamp 20, target 1"):
        read_frame(tmp_path / "nested.parquet")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no series"),
        ('{"start": "2024-01-01"}', "line 1 has no 'target'"),
        ('{"target": [1, 2]}\n{"target": [1,', "line 2 is no JSON"),
        ('{"target": [1, 2], "start": "yesterday morning"}', "line 1: "),
    ],
)
def test_json_lines_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_frame(tmp_path / "data.jsonl", freq="D")


def test_a_table_without_time_is_told(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("name,kind,value\na,x,1\nb,y,2\n")
    with pytest.raises(DataError, match="no column of time stamps; it has 'name', 'kind', 'value'"):
        read_frame(tmp_path / "table.csv")
