"""Information coefficients and the simulated portfolio."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from scipy import stats

from domains.forecasting.ranking.metrics import (
    correlation,
    daily_ic,
    daily_rank_ic,
    quantile_returns,
    ranking_scores,
)
from domains.forecasting.ranking.portfolio import max_drawdown, simulate_portfolio
from domains.forecasting.ranking.task import _ranks
from zoo.errors import ConfigError


@pytest.fixture
def days() -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties and returns of 6 days and 15 stocks, some missing."""
    rng = np.random.default_rng(0)
    scores, returns = rng.integers(0, 6, (6, 15)).astype(float), rng.normal(0, 0.02, (6, 15))
    scores[rng.random(scores.shape) < 0.2] = np.nan
    returns[rng.random(scores.shape) < 0.1] = np.nan
    return scores, returns


def test_ic_and_rank_ic_are_those_of_scipy(days: tuple[np.ndarray, np.ndarray]) -> None:
    scores, returns = days
    pearson, spearman = [], []
    for x, y in zip(scores, returns, strict=True):
        known = ~(np.isnan(x) | np.isnan(y))
        pearson.append(stats.pearsonr(x[known], y[known])[0])
        spearman.append(stats.spearmanr(x[known], y[known])[0])
    np.testing.assert_allclose(daily_ic(scores, returns), pearson, rtol=1e-12)
    np.testing.assert_allclose(daily_rank_ic(scores, returns), spearman, rtol=1e-12)
    found = ranking_scores(scores, returns)
    assert found["IC"] == pytest.approx(np.mean(pearson))
    assert found["ICIR"] == pytest.approx(np.mean(pearson) / np.std(pearson, ddof=1))
    assert found["RankICIR"] == pytest.approx(np.mean(spearman) / np.std(spearman, ddof=1))


def test_the_training_loss_and_the_ranks_agree_with_them(days: tuple[np.ndarray, np.ndarray]) -> None:
    mask = torch.from_numpy(~(np.isnan(days[0]) | np.isnan(days[1])))
    scores, returns = (torch.from_numpy(np.nan_to_num(values, nan=99.0)) for values in days)
    np.testing.assert_allclose(correlation(scores, returns, mask), daily_ic(*days), rtol=1e-6)
    ranked = correlation(_ranks(scores, mask).double(), _ranks(returns, mask).double(), mask)
    np.testing.assert_allclose(ranked, daily_rank_ic(*days), rtol=1e-6)


def test_a_day_without_spread_is_left_out_and_has_no_gradient_that_explodes() -> None:
    scores, returns = np.array([[1.0, 1, 1], [1, 2, 3]]), np.array([[1.0, 2, 3], [1, 2, 4]])
    assert np.isnan(daily_ic(scores, returns)[0])
    assert ranking_scores(scores, returns)["days"] == 1
    equal = torch.ones(1, 3, requires_grad=True)
    correlation(equal, torch.tensor([[1.0, 2, 3]]), torch.ones(1, 3, dtype=torch.bool)).sum().backward()
    assert torch.isfinite(equal.grad).all()  # pyright: ignore[reportArgumentType]


def test_quantile_returns_rise_with_a_perfect_score() -> None:
    returns = np.random.default_rng(0).normal(size=(20, 50))
    found = quantile_returns(returns, returns, parts=5)
    assert (np.diff(found) > 0).all()
    assert found.sum() == pytest.approx(0, abs=1e-9)


# ---- the portfolio -----------------------------------------------------------------------------------------

SCORES = np.array([[3.0, 2, 1, 0], [0, 1, 2, 3]])
RETURNS = np.array([[0.10, 0.02, 0.0, -0.04], [0.01, 0.02, 0.03, 0.06]])


def test_the_best_stocks_are_held_in_equal_parts() -> None:
    held = simulate_portfolio(SCORES, RETURNS, top=2)
    np.testing.assert_allclose(held.returns, [0.06, 0.045])
    np.testing.assert_allclose(held.universe, [0.02, 0.03])
    np.testing.assert_allclose(held.turnover, [0.5, 1.0])
    summary = held.summary()
    excess = np.array([0.04, 0.015])
    assert summary["annual_excess_return"] == pytest.approx(252 * excess.mean())
    assert summary["IR"] == pytest.approx(excess.mean() / excess.std(ddof=1) * 252**0.5)
    assert summary["turnover"] == 1


def test_costs_are_paid_on_what_is_bought_and_sold() -> None:
    held = simulate_portfolio(SCORES, RETURNS, top=2, cost=0.01)
    np.testing.assert_allclose(held.returns, [0.99 * 1.06 - 1, 0.98 * 1.045 - 1])


def test_what_is_kept_costs_nothing_but_the_way_back_to_equal_parts() -> None:
    held = simulate_portfolio(SCORES[:1].repeat(2, 0), RETURNS[:1].repeat(2, 0), top=2)
    drifted = np.array([0.55, 0.51]) / 1.06
    assert held.turnover[1] == pytest.approx(np.abs(drifted - 0.5).sum() / 2)


def test_a_share_of_the_stocks_and_longer_periods() -> None:
    held = simulate_portfolio(SCORES, RETURNS, top=0.25, horizon=2)
    assert held.days.tolist() == [0]
    np.testing.assert_allclose(held.returns, [0.10])


def test_a_stock_without_a_return_is_not_held() -> None:
    returns = RETURNS.copy()
    returns[0, 0] = np.nan
    np.testing.assert_allclose(simulate_portfolio(SCORES, returns, top=1).returns, [0.02, 0.06])


def test_the_drawdown_is_the_largest_loss_from_a_peak() -> None:
    assert max_drawdown(np.array([0.1, -0.5, 0.2, -0.1, 0.6])) == pytest.approx(0.5)
    assert max_drawdown(np.array([0.1, 0.1])) == 0


@pytest.mark.parametrize(("option", "value"), [("top", 0), ("top", 2.5), ("cost", -0.1)])
def test_a_portfolio_that_cannot_be_is_refused(option: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{option}={value}"):
        simulate_portfolio(SCORES, RETURNS, **cast(Any, {option: value}))
