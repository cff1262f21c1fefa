"""Price panels: reading, features without a look ahead, the simulated market."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.ranking import simulate as simulation
from domains.forecasting.ranking.features import RobustScale, cross_section, features, future_returns
from domains.forecasting.ranking.metrics import ranking_scores
from domains.forecasting.ranking.panel import Panel, read_panel, write_panel
from domains.forecasting.ranking.simulate import Market, simulate, simulated
from zoo.errors import ConfigError, DataError

MARKET = Market(days=120, stocks=12, seed=3)


@pytest.fixture(scope="module")
def panel() -> Panel:
    return simulate(MARKET)


def table(**columns: Any) -> pd.DataFrame:
    rows = {
        "date": ["2024-01-02", "2024-01-02", "2024-01-03", "2024-01-03"],
        "symbol": ["A", "B", "A", "B"],
        "close": [10.0, 20.0, 11.0, 21.0],
    }
    return pd.DataFrame(rows | columns)


def written(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "prices.csv", index=False)
    return folder / "prices.csv"


# ---- reading -----------------------------------------------------------------------------------------------


def test_a_panel_is_what_was_written(panel: Panel, tmp_path: Path) -> None:
    write_panel(panel, tmp_path / "prices.parquet")
    again = read_panel(tmp_path / "prices.parquet")
    kept = [panel.symbols.index(name) for name in again.symbols]
    np.testing.assert_array_equal(again.dates, panel.dates)
    for name, values in panel.fields.items():
        np.testing.assert_array_equal(again.fields[name], values[:, kept])


def test_rows_may_come_in_any_order_and_columns_in_any_case(tmp_path: Path) -> None:
    frame = table(Volume=[1, 2, 3, 4]).sample(frac=1, random_state=0).rename(columns={"close": "Close"})
    panel = read_panel(written(frame, tmp_path))
    assert panel.symbols == ["A", "B"]
    assert panel.close.tolist() == [[10, 20], [11, 21]]
    assert panel.fields["volume"].tolist() == [[1, 2], [3, 4]]


def test_dates_of_eight_digits_and_columns_of_other_names(tmp_path: Path) -> None:
    frame = table(date=[20240102, 20240102, 20240103, 20240103])
    frame = frame.rename(columns={"date": "when", "symbol": "who"})
    panel = read_panel(written(frame, tmp_path), date_column="when", symbol_column="who")
    assert str(panel.dates[1])[:10] == "2024-01-03"


def test_a_wide_table_has_a_close_for_each_stock(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": ["2024-01-03", "2024-01-02"], "X": [1.5, 1.0], "Y": [np.nan, 2.0]})
    panel = read_panel(written(frame, tmp_path))
    np.testing.assert_array_equal(panel.close, [[1.0, 2.0], [1.5, np.nan]])


def test_further_numeric_columns_are_features_and_text_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = table(value=[0.1, 0.2, 0.3, np.nan], sector=["tech"] * 4)
    with caplog.at_level(logging.WARNING):
        panel = read_panel(written(frame, tmp_path))
    values, names = features(panel)
    np.testing.assert_allclose(values[..., names.index("value")], [[0.1, 0.2], [0.3, np.nan]], rtol=1e-6)
    assert "left out 'sector'" in caplog.text


def test_a_missing_price_is_a_stock_that_did_not_trade(tmp_path: Path) -> None:
    panel = read_panel(written(table(close=[10, 20, np.nan, 21]), tmp_path))
    np.testing.assert_array_equal(panel.close, [[10, 20], [np.nan, 21]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbol": ["A", "B", "B", "B"]}, r"stock 'B' has two rows for 2024-01-03 \(1 such rows\)"),
        ({"close": [10, 20, np.inf, 21]}, r"close of stock 'A' on 2024-01-03 is infinite"),
        ({"volume": [1, 2, 3, -np.inf]}, r"volume of stock 'B' on 2024-01-03 is infinite"),
        ({"value": [1, 2, 3, np.inf]}, r"value of stock 'B' on 2024-01-03 is infinite"),
        ({"close": [10, 0, 11, 21]}, r"close of stock 'B' on 2024-01-02 is no price"),
        ({"volume": [1, 2, 3, -4]}, r"volume of stock 'B' on 2024-01-03 is below 0"),
        ({"close": [10, 20, "n/q", 21]}, r"close of stock 'A' on 2024-01-03 is no number \(n/q"),
        (
            {"symbol": ["A"] * 4, "date": ["2024-01-0" + d for d in "2345"]},
            "prices of 'A' only: .* two stocks",
        ),
        ({"date": ["2024-01-02", "soon", "2024-01-03", "2024-01-03"]}, "'date' is no column of dates"),
        ({"date": ["2024-01-02", None, "2024-01-03", "2024-01-03"]}, "row 2 has no date"),
        ({"symbol": ["A", None, "A", "B"]}, "row 2 names no stock in column 'symbol'"),
    ],
)
def test_what_cannot_be_used_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = written(table(**change), tmp_path)
    with pytest.raises(DataError, match=message):
        read_panel(path)


@pytest.mark.parametrize(
    ("renamed", "options", "message"),
    [
        ({"close": "last"}, {}, "no column 'close', only 'date', 'symbol', 'last'"),
        ({"date": "when"}, {}, "no column of dates.*date_column=NAME"),
        ({"symbol": "who"}, {}, "no column that names the stocks. Say symbol_column=NAME"),
        ({}, {"symbol_column": "symbl"}, "no column 'symbl'.*Did you mean 'symbol'"),
    ],
)
def test_a_missing_column_is_named(
    renamed: dict[str, str], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = written(table().rename(columns=renamed), tmp_path)
    with pytest.raises(DataError, match=message):
        read_panel(path, **options)


def test_a_date_that_occurs_twice_in_a_wide_table_is_named(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": ["2024-01-02", "2024-01-02"], "X": [1.5, 1.0], "Y": [1.0, 2.0]})
    with pytest.raises(DataError, match="the date 2024-01-02 occurs twice"):
        read_panel(written(frame, tmp_path))


# ---- features ----------------------------------------------------------------------------------------------


def test_the_future_changes_no_feature(panel: Panel) -> None:
    day = 90
    rng = np.random.default_rng(0)

    def changed(values: np.ndarray) -> np.ndarray:
        later = values * rng.uniform(0.5, 2, values.shape)
        return np.where(np.arange(len(values))[:, None] <= day, values, later)

    extra = {"value": rng.normal(size=panel.close.shape)}
    before = dataclasses.replace(panel, extra=extra)
    after = dataclasses.replace(
        panel,
        fields={name: changed(values) for name, values in panel.fields.items()},
        extra={name: changed(values) for name, values in extra.items()},
    )
    (one, names), (other, _) = features(before), features(after)
    np.testing.assert_array_equal(one[: day + 1], other[: day + 1])
    for i, name in enumerate(names):
        assert not np.array_equal(one[day + 1 :, :, i], other[day + 1 :, :, i], equal_nan=True), name


def test_features_are_what_their_names_say(panel: Panel) -> None:
    values, names = features(panel)
    found = dict(zip(names, values[100].T, strict=True))
    close, volume = panel.close, panel.fields["volume"]
    np.testing.assert_allclose(found["return_5"], np.log(close[100] / close[95]), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found["average_5"], close[96:101].mean(0) / close[100] - 1, atol=1e-6)
    daily = np.diff(np.log(close[95:101]), axis=0)
    np.testing.assert_allclose(found["volatility_5"], daily.std(0, ddof=1), rtol=1e-3)
    ratio = np.log1p(volume[100]) - np.log1p(volume[96:101]).mean(0)
    np.testing.assert_allclose(found["volume_ratio_5"], ratio, atol=1e-5)
    gap = np.log(panel.fields["open"][100] / close[99])
    np.testing.assert_allclose(found["gap"], gap, rtol=1e-3, atol=1e-6)


def test_a_panel_of_closes_has_the_features_of_closes_alone(panel: Panel) -> None:
    names = features(dataclasses.replace(panel, fields={"close": panel.close}))[1]
    assert not [name for name in names if "volume" in name or name in ("gap", "range")]
    assert "return_20" in names


@pytest.mark.parametrize("horizon", [1, 3])
def test_the_return_is_from_the_next_day_on(panel: Panel, horizon: int) -> None:
    returns, close = future_returns(panel, horizon), panel.close
    np.testing.assert_allclose(returns[50], close[51 + horizon] / close[51] - 1)
    assert np.isnan(returns[-1 - horizon :]).all()


def test_the_scale_is_median_and_deviation_and_what_is_missing_becomes_the_median() -> None:
    values = np.array([[1.0, 7], [2, 7], [3, 7], [4, 7], [1000, 7], [np.nan, np.nan]])
    scale = RobustScale.fit(values)
    assert scale.centre.tolist() == [3, 7]
    np.testing.assert_allclose(scale.spread, [1.4826, 1])
    scaled = scale(values)
    assert scaled[4].tolist() == [3, 0]
    assert scaled[5].tolist() == [0, 0]
    np.testing.assert_array_equal(RobustScale(**scale.facts())(values), scaled)


def test_a_cross_section_has_mean_zero_and_deviation_one() -> None:
    scores = cross_section(np.array([[1.0, 2, 3, np.nan], [5, 5, 5, 5]]))
    np.testing.assert_allclose(scores[0, :3], [-(1.5**0.5), 0, 1.5**0.5])
    assert scores[1].tolist() == [0, 0, 0, 0]


# ---- the simulated market ----------------------------------------------------------------------------------


def test_the_same_arguments_give_the_same_market_and_another_seed_another(panel: Panel) -> None:
    np.testing.assert_array_equal(simulate(MARKET).close, panel.close)
    assert not np.array_equal(simulate(dataclasses.replace(MARKET, seed=4)).close, panel.close)


def test_the_cache_holds_the_market(panel: Panel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))
    first = simulated(MARKET)
    monkeypatch.setattr(simulation, "simulate", lambda market: pytest.fail("made twice"))
    second = simulated(MARKET)
    for panel_of in (first, second):
        np.testing.assert_array_equal(panel_of.close, panel.close)
        np.testing.assert_array_equal(panel_of.expected, panel.expected)


def test_candles_hold_together_and_stocks_enter_and_leave(panel: Panel) -> None:
    start, high, low, close = (panel.fields[name] for name in ("open", "high", "low", "close"))
    known = ~np.isnan(close)
    assert (high[known] >= np.maximum(start, close)[known]).all()
    assert (low[known] <= np.minimum(start, close)[known]).all()
    assert len(set(known.sum(1))) > 1
    assert (panel.fields["volume"][known] >= 0).all()


def test_what_is_expected_predicts_and_without_premia_nothing_does() -> None:
    panel, without = simulate(Market(days=300, stocks=60, strength=0.2)), simulate(Market(30, 5, strength=0))
    assert panel.expected is not None
    assert without.expected is not None
    assert ranking_scores(panel.expected, future_returns(panel))["RankIC"] > 0.15
    assert not np.nan_to_num(without.expected).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"days": 3}, "data.market.days=3"),
        ({"stocks": 1}, "stocks=1: at least 2"),
        ({"strength": 2}, "strength=2"),
    ],
)
def test_a_market_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Market(**options)
