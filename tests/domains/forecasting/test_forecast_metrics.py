"""Metrics against values by hand; the comparison of models over tasks. (Parity with fev: tests/parity.)"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.metrics import judge, leaderboard, relative_errors, scores, seasonal_error, win_rates
from zoo.errors import DataError


def test_values_by_hand() -> None:
    history = np.array([[0.0], [1.0], [2.0], [4.0]])  # seasonal differences of 2 steps: 2 and 3
    y = np.array([[[5.0], [8.0]]])
    quantiles = np.array([[[[4.0, 6.0, 7.0]], [[7.0, 8.0, 12.0]]]])
    values = scores(judge(y, quantiles, [history], season=2, levels=(0.2, 0.5, 0.8)))
    assert values["MAE"] == pytest.approx(0.5)
    assert values["MASE"] == pytest.approx(0.5 / 2.5)
    losses = [2 * (0.2 * 1 + 0.2 * 1) / 2, 2 * 0.5 * 1 / 2, 2 * (0.2 * 2 + 0.2 * 4) / 2]
    assert values["CRPS"] == values["MQL"] == pytest.approx(np.mean(losses))
    assert values["WQL"] == pytest.approx(np.mean(losses) / 6.5)
    assert values["SQL"] == pytest.approx(np.mean(losses) / 2.5)
    assert values["coverage"] == 1.0


def test_coverage_counts_only_what_came() -> None:
    y = np.array([[[1.0], [np.nan], [9.0]]])
    quantiles = np.broadcast_to([0.0, 1.0, 2.0], (1, 3, 1, 3))
    task = judge(y, quantiles, [np.arange(4.0)[:, None]], season=1, levels=(0.1, 0.5, 0.9))
    assert scores(task, ["coverage"]) == {"coverage": 0.5}


def test_an_item_without_seasonal_error_is_left_out() -> None:
    y, quantiles = np.ones((2, 1, 1)), np.zeros((2, 1, 1, 1))
    histories = [np.array([[0.0], [2.0]]), np.zeros((2, 1))]  # the second is constant
    assert scores(judge(y, quantiles, histories, season=1, levels=(0.5,)))["MASE"] == pytest.approx(0.5)
    assert np.isnan(seasonal_error(np.ones((3, 1)), season=3))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="do not fit"):
        judge(np.ones((2, 3, 1)), np.ones((2, 4, 1, 1)), [np.ones((5, 1))] * 2, season=1, levels=(0.5,))
    with pytest.raises(DataError, match=r"no level 0\.5"):
        judge(np.ones((1, 1, 1)), np.ones((1, 1, 1, 1)), [np.ones((5, 1))], season=1, levels=(0.4,))


ERRORS = pd.DataFrame(
    {"seasonal naive": [1.0, 2.0, 4.0], "good": [0.5, 1.0, 1.0], "fails": [0.001, np.nan, 8.0]}
)


def test_relative_errors_are_cut_off_and_failures_stand_at_the_baseline() -> None:
    assert relative_errors(ERRORS)["fails"].tolist() == [0.01, 1.0, 2.0]


def test_win_rates_count_ties_half() -> None:
    rates = win_rates(relative_errors(ERRORS))
    assert rates["good"] == pytest.approx((0.5 + 1 + 1) * 2 / 6 - (0.5 - 0.0) * 2 / 6 + 1 / 6)
    assert rates.sum() == pytest.approx(1.5)


def test_leaderboard_ranks_counts_failures_and_bounds_its_figures() -> None:
    board = leaderboard(ERRORS, resamples=200)
    assert board.index[0] == "good"
    assert board["skill_score"]["good"] == pytest.approx(1 - (0.5 * 0.5 * 0.25) ** (1 / 3))
    assert board["failures"].to_dict() == {"good": 0, "fails": 1, "seasonal naive": 0}
    assert (board["skill_score_low"] <= board["skill_score"]).all()
    assert (board["skill_score"] <= board["skill_score_high"]).all()


def test_a_baseline_without_errors_is_refused() -> None:
    with pytest.raises(DataError, match="'seasonal naive' must have an error at every task"):
        leaderboard(ERRORS.drop(columns="seasonal naive"))
