"""A simulated portfolio that holds the stocks of the highest scores, beside all of them.

Shapes: D days, N stocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zoo.errors import ConfigError

DAYS_OF_A_YEAR = 252


@dataclass(frozen=True)
class Portfolio:
    """What was earned from one rebalancing to the next.

    Attributes:
        days: `(P,)` indices of the days whose scores were traded on.
        returns: `(P,)` after costs.
        universe: `(P,)` of all stocks in equal parts, without costs.
        turnover: `(P,)` share of the value that was exchanged: half of the sum of what was bought and sold.
        horizon: days held.
    """

    days: np.ndarray
    returns: np.ndarray
    universe: np.ndarray
    turnover: np.ndarray
    horizon: int

    def summary(self) -> dict[str, float]:
        """Yearly figures: returns are sums of the periods' returns, IR the mean excess over its spread."""
        year = DAYS_OF_A_YEAR / self.horizon
        excess = self.returns - self.universe
        spread = excess.std(ddof=1) if len(excess) > 1 else np.nan
        return {
            "annual_return": year * float(self.returns.mean()),
            "annual_excess_return": year * float(excess.mean()),
            "IR": float(excess.mean() / spread * np.sqrt(year)) if spread > 0 else np.nan,
            "max_drawdown": max_drawdown(self.returns),
            "turnover": float(self.turnover[1:].mean()) if len(self.turnover) > 1 else np.nan,
        }


def max_drawdown(returns: np.ndarray) -> float:
    """The largest loss from a peak of the value, 0 to 1, of period returns `(P,)`."""
    value = np.cumprod(np.concatenate([[1.0], 1 + returns]))
    return float((1 - value / np.maximum.accumulate(value)).max())


def simulate_portfolio(
    scores: np.ndarray, returns: np.ndarray, *, top: float = 0.1, horizon: int = 1, cost: float = 0.0
) -> Portfolio:
    """Hold the best stocks in equal parts, and choose anew every `horizon` days.

    Args:
        scores: `(D, N)`, NaN outside of the day's cross-section.
        returns: `(D, N)` over the horizon, of what is bought on the day after; NaN where unknown. A stock
            without a return is not held.
        top: how many stocks; below 1 a share of the cross-section.
        horizon: days that the returns are over.
        cost: of every amount that is bought or sold, as a share of it.

    Raises:
        ConfigError: a top or cost out of range, or no day to trade on.
    """
    if top <= 0 or (top > 1 and top != int(top)):
        raise ConfigError(f"top={top}: a share between 0 and 1, or a whole number of stocks.")
    if not 0 <= cost < 1:
        raise ConfigError(f"cost={cost}: a share of what is traded, such as 0.001.")
    known = ~(np.isnan(scores) | np.isnan(returns))
    days = [day for day in range(0, len(scores), horizon) if known[day].any()]
    if not days:
        raise ConfigError("There is no day with scores and returns to simulate a portfolio on.")
    held = np.zeros(scores.shape[1])
    earned, universe, exchanged = [], [], []
    for day in days:
        stocks = np.flatnonzero(known[day])
        count = int(top) if top >= 1 else max(1, round(top * len(stocks)))
        best = stocks[np.argsort(-scores[day, stocks], kind="stable")[:count]]
        target = np.zeros_like(held)
        target[best] = 1 / len(best)
        traded = np.abs(target - held).sum()
        gross = float(target @ np.where(known[day], returns[day], 0))
        earned.append((1 - cost * traded) * (1 + gross) - 1)
        universe.append(float(returns[day, stocks].mean()))
        exchanged.append(traded / 2)
        held = target * (1 + np.where(known[day], returns[day], 0)) / (1 + gross)
    return Portfolio(np.array(days), np.array(earned), np.array(universe), np.array(exchanged), horizon)
