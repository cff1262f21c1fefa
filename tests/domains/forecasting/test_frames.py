"""The forecaster on long data frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import zoo
from domains.forecasting.pipeline import Forecaster
from zoo.errors import ConfigError, DataError

SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "initializer_factor": 0.4}
HORIZON = 4


@pytest.fixture
def forecaster() -> Forecaster:
    model: Any = zoo.create_model("chronos2", **SMALL)
    return Forecaster(model)


@pytest.fixture
def df() -> pd.DataFrame:
    """Two daily series of different lengths, `b` first, with a numeric, a text and a boolean column."""
    draw = np.random.default_rng(0)
    parts = []
    for name, length in (("b", 40), ("a", 30)):
        parts.append(
            pd.DataFrame(
                {
                    "item_id": name,
                    "timestamp": pd.date_range("2024-01-01", periods=length, freq="D"),
                    "target": draw.normal(size=length).cumsum(),
                    "price": draw.normal(size=length),
                    "kind": draw.choice(["x", "y"], length),
                    "open": draw.random(length) > 0.5,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def future(df: pd.DataFrame, columns: list[str], steps: int = HORIZON) -> pd.DataFrame:
    """The rows after each series, with the columns of its first rows."""
    parts = []
    for _, rows in df.groupby("item_id", sort=False):
        stamps = rows["timestamp"].iloc[-1] + pd.to_timedelta(np.arange(1, steps + 1), unit="D")
        parts.append(rows.iloc[:steps][["item_id", *columns]].assign(timestamp=stamps))
    return pd.concat(parts, ignore_index=True)


def numbers(result: pd.DataFrame) -> np.ndarray:
    return result.drop(columns=["item_id", "timestamp", "target_name"]).to_numpy(dtype=float)


def test_a_frame_of_forecasts(forecaster: Forecaster, df: pd.DataFrame) -> None:
    result = forecaster.predict(df, HORIZON, levels=[0.1, 0.9])
    assert isinstance(result, pd.DataFrame)
    assert list(result.columns) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.9"]
    assert result["item_id"].tolist() == ["b"] * 4 + ["a"] * 4
    assert result["timestamp"].iloc[[0, 7]].tolist() == [
        pd.Timestamp("2024-02-10"),
        pd.Timestamp("2024-02-03"),
    ]
    assert set(result["target_name"]) == {"target"}


def test_rows_may_come_in_any_order(forecaster: Forecaster, df: pd.DataFrame) -> None:
    later = future(df, ["price", "kind"])
    expected = forecaster.predict_frame(df, later, horizon=HORIZON)
    mixed = df.sample(frac=1, random_state=3)
    result = forecaster.predict_frame(mixed, later.sample(frac=1, random_state=1), horizon=HORIZON)
    by_name = result.sort_values("item_id", ascending=False, kind="stable")
    np.testing.assert_allclose(numbers(by_name), numbers(expected), atol=1e-4)


def test_a_frame_says_the_same_as_dicts(forecaster: Forecaster, df: pd.DataFrame) -> None:
    later = future(df, ["price", "kind"])
    result = forecaster.predict_frame(df, later, horizon=HORIZON, levels=[0.3])
    items = []
    for name in ("b", "a"):
        rows, ahead = df[df["item_id"] == name], later[later["item_id"] == name]
        items.append(
            {
                "target": rows["target"].to_numpy(),
                "past_covariates": {key: rows[key].to_numpy() for key in ("price", "kind", "open")},
                "future_covariates": {key: ahead[key].to_numpy() for key in ("price", "kind")},
            }
        )
    quantiles, medians = forecaster.predict_quantiles(items, HORIZON, [0.3])
    expected = torch.stack([torch.cat(medians).flatten(), torch.cat(quantiles).flatten()], 1)
    np.testing.assert_allclose(numbers(result), expected.numpy(), atol=1e-4)


def test_several_targets_stand_below_each_other(forecaster: Forecaster, df: pd.DataFrame) -> None:
    result = forecaster.predict_frame(df, horizon=HORIZON, target=["target", "price"])
    assert result["target_name"].tolist() == (["target"] * 4 + ["price"] * 4) * 2


def test_other_names_and_frequencies(forecaster: Forecaster, df: pd.DataFrame) -> None:
    monthly = df.assign(timestamp=np.tile(pd.date_range("2020-01-31", periods=40, freq="ME"), 2)[:70])
    named = monthly.rename(columns={"item_id": "shop", "timestamp": "month", "target": "sales"})
    result = forecaster.predict_frame(
        named, horizon=2, target="sales", id_column="shop", timestamp_column="month"
    )
    assert result["month"].tolist()[:2] == [pd.Timestamp("2023-05-31"), pd.Timestamp("2023-06-30")]


def test_short_series_take_the_frequency_that_is_given(forecaster: Forecaster, df: pd.DataFrame) -> None:
    short = df.groupby("item_id", sort=False).head(2)
    with pytest.raises(DataError, match="no series has three rows"):
        forecaster.predict_frame(short, horizon=HORIZON)
    result = forecaster.predict_frame(short, horizon=HORIZON, freq="D")
    assert result["timestamp"].iloc[0] == pd.Timestamp("2024-01-03")


# ---- mistakes ----------------------------------------------------------------------------------------------


def _drop(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    return frame.drop(columns=column)


MISTAKES = {
    "no such target": (lambda d, f: (_drop(d, "target"), f), "no column 'target'"),
    "a text target": (lambda d, f: (d.assign(target="x"), f), "target 'target' must hold numbers"),
    "two rows for one time": (lambda d, f: (pd.concat([d, d.iloc[[50]]]), f), "series 'a' has two rows for"),
    "a gap": (lambda d, f: (d.drop(index=12), f), "series 'b' is irregular"),
    "an infinite value": (
        lambda d, f: (d.assign(target=d["target"].where(d.index != 45, np.inf)), f),
        "series 'a' has an infinite 'target'",
    ),
    "two frequencies": (
        lambda d, f: (
            pd.concat([d[:40], d[40:].assign(timestamp=pd.date_range("2024", periods=30, freq="h"))]),
            f,
        ),
        "mixes frequencies: 'b' is at 'D', 'a' is at 'h'",
    ),
    "the target in the future": (
        lambda d, f: (d, f.assign(target=1.0)),
        "has the target 'target': leave it out",
    ),
    "a covariate without past": (lambda d, f: (d, f.assign(prize=1.0)), "column 'prize' .* mean 'price'"),
    "a series without future": (lambda d, f: (d, f[:4]), "has 0 rows of series 'a', not the 4"),
    "a future that ends early": (lambda d, f: (d, f[:-1]), "has 3 rows of series 'a', not the 4"),
    "a series without past": (lambda d, f: (d, f.replace({"item_id": {"a": "c"}})), "has series 'c', which"),
    "a future that starts late": (
        lambda d, f: (d, f.assign(timestamp=f["timestamp"] + pd.Timedelta("1D"))),
        "series 'b' continues with 2024-02-11 .*, expected is 2024-02-10",
    ),
    "a time zone in one frame": (
        lambda d, f: (d, f.assign(timestamp=f["timestamp"].dt.tz_localize("UTC"))),
        "time zone in one frame and none in the other",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_frames_that_cannot_be_used(kind: str, forecaster: Forecaster, df: pd.DataFrame) -> None:
    spoil, message = MISTAKES[kind]
    first, later = spoil(df, future(df, ["price"]))
    with pytest.raises(DataError, match=message):
        forecaster.predict_frame(first, later, horizon=HORIZON)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": ["target", "target"]}, DataError, "asked for twice"),
        ({"target": []}, DataError, "There is no target"),
        ({"freq": "fortnight"}, ConfigError, "'fortnight' is no frequency"),
        ({"levels": [1.5]}, ConfigError, "must be probabilities"),
        ({"horizon": 0}, DataError, "A horizon of 0 steps"),
    ],
)
def test_options_that_cannot_be(
    options: dict, error: type[Exception], message: str, forecaster: Forecaster, df: pd.DataFrame
) -> None:
    with pytest.raises(error, match=message):
        forecaster.predict_frame(df, **({"horizon": HORIZON} | options))
