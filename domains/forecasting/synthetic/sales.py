"""A table of shops whose sales follow what is known of the days before: data with informative covariates."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.signal import lfilter

ELASTICITY = 2.5
"""A price lower by 1 % sells so many % more."""
START = "2023-01-02"
WEEKDAYS = np.array([0.9, 0.85, 0.9, 1.0, 1.2, 1.3, 0.85])


def simulated_sales(shops: int = 30, weeks: int = 104, *, seed: int = 0) -> pd.DataFrame:
    """Daily sales of shops, delivered on the day after the visit at that day's price.

    Columns `item_id`, `timestamp`, `sales`, `price`, `holiday` (0 or 1, the same for all) and `visits`. Price
    and holidays are planned ahead, visits are not.
    """
    rng = np.random.default_rng(seed)
    days = 7 * weeks
    holiday = (rng.random(days) < 0.04).astype(int)
    stamps = pd.date_range(START, periods=days, freq="D")
    tables = []
    for shop in range(shops):
        price, cut = _prices(rng, days)
        visits = _visits(rng, holiday)
        noise = np.exp(0.03 * rng.standard_normal(days))
        sales = noise * _day_before(0.2 * visits * (1 - cut) ** -ELASTICITY)
        columns = {"sales": sales, "price": price, "holiday": holiday, "visits": visits}
        tables.append(pd.DataFrame({"item_id": f"shop {shop + 1:02d}", "timestamp": stamps} | columns))
    return pd.concat(tables, ignore_index=True)


def _prices(rng: np.random.Generator, days: int) -> tuple[np.ndarray, np.ndarray]:
    """Prices, and by which share they are cut: now and then for two to six days, by 10 to 40 %."""
    cut = np.zeros(days)
    for start in np.flatnonzero(rng.random(days) < 0.06):
        cut[start : start + rng.integers(2, 7)] = rng.uniform(0.1, 0.4)
    return rng.uniform(5, 50) * (1 - cut), cut


def _visits(rng: np.random.Generator, holiday: np.ndarray) -> np.ndarray:
    """Visitors of each day: a week, holidays, and a mood that lasts for days."""
    days = len(holiday)
    mood = np.asarray(lfilter([0.05], [1.0, -0.9], rng.standard_normal(days)))
    return rng.uniform(200, 2000) * np.tile(WEEKDAYS, days // 7) * (1 - 0.5 * holiday) * np.exp(mood)


def _day_before(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[:1], values[:-1]])
