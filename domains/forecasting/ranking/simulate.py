"""A factor model of a stock market, as data that ship with the zoo: what can be known of it is known here.

The return of stock i on day t is

    r_it = beta_i m_t + s_sector(i),t + x_i,t-2 . f_t + v_it (strength g_i,t-2 + e_it)

with a market return m, sector returns s, factor returns f without mean on the stock's styles x, and noise e
with heavy tails and volatility v. The premium g pays for the styles, which can be read off prices and
volumes: momentum, reversal, low volatility, and the day's return on high or low volume. What each pays
wanders slowly, and depends on whether the market is calm or under stress, which shows in its volatility.
Everything that is known at the end of day t about the return from t + 1 to t + 2 is `Panel.expected`.

Shapes: D days, N stocks, K styles.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from domains.forecasting.ranking.features import cross_section
from domains.forecasting.ranking.panel import FIELDS, Panel
from zoo.errors import ConfigError
from zoo.files import atomic_path
from zoo.paths import cache_dir

WARM_UP = 80
"""Days before the first one that is kept."""
PAID_CALM = np.array([1.0, 0.4, -0.3, 0.7])
PAID_STRESS = np.array([-0.9, 1.2, 0.7, 0.7])
"""Premia of momentum, reversal, low volatility and return times volume, per standard deviation of each."""
START = "2015-01-05"


@dataclass(frozen=True)
class Market:
    """Size and constants of a simulated market.

    Args:
        days: trading days.
        stocks: names in all; some enter late, some leave early.
        sectors: of about equal size.
        strength: of the premia, in standard deviations of a stock's own noise.
        seed: another seed is another market.
    """

    days: int = 1250
    stocks: int = 180
    sectors: int = 8
    strength: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"days": 10, "stocks": 2, "sectors": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"data.market.{name}={getattr(self, name)}: at least {least} is needed.")
        if not 0 <= self.strength < 1:
            raise ConfigError(f"data.market.strength={self.strength}: a number from 0 to 1 is needed.")


def simulated(market: Market) -> Panel:
    """The panel of `simulate`, from the cache or made now.

    Raises:
        ZooError: the cache cannot be written.
    """
    path = cache_dir() / "forecasting" / f"market-{_digest(market)}.npz"
    if not path.is_file():
        panel = simulate(market)
        with atomic_path(path) as part, open(part, "wb") as file:
            arrays: Any = {"expected": panel.expected, **panel.fields}
            np.savez(file, **arrays)
    with np.load(path) as arrays:
        stored = {name: arrays[name].astype(float) for name in arrays.files}
    expected = stored.pop("expected")
    return Panel(
        _dates(market.days), _symbols(market.stocks), stored, expected=expected, source=_source(market)
    )


def simulate(market: Market) -> Panel:
    """The panel of a market; the same for the same arguments."""
    rng = np.random.default_rng(market.seed)
    returns, volume, expected, volatility = _run(market, rng)
    close = 40 * np.exp(np.cumsum(returns, axis=0) + rng.normal(0, 0.8, market.stocks))
    fields = _candles(close, returns, volatility, rng) | {"volume": volume}
    traded = _traded(market, rng)
    kept = {
        name: np.where(traded, values[WARM_UP:], np.nan).astype(np.float32)
        for name, values in (fields | {"expected": expected}).items()
    }
    known = kept.pop("expected")
    return Panel(
        _dates(market.days),
        _symbols(market.stocks),
        {name: kept[name].astype(float) for name in FIELDS},
        expected=known.astype(float),
        source=_source(market),
    )


def _run(market: Market, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Log returns, volumes, expected returns and volatilities, each `(WARM_UP + D, N)`."""
    total, count = WARM_UP + market.days, market.stocks
    sector = rng.integers(0, market.sectors, count)
    beta, own = rng.uniform(0.6, 1.4, count), rng.lognormal(np.log(0.017), 0.3, count)
    size = rng.normal(13, 1.2, count)
    returns, log_volume, expected, volatility = (np.zeros((total, count)) for _ in range(4))
    styles = np.zeros((total, count, len(PAID_CALM)))
    attention, wander, stress = np.zeros(count), np.zeros(len(PAID_CALM)), False
    for t in range(total):
        stress = rng.random() < (0.94 if stress else 0.03)
        wander = 0.985 * wander + 0.1 * rng.normal(size=wander.shape)
        volatility[t] = own * (1.7 if stress else 1.0)
        noise = rng.standard_t(5, count) / np.sqrt(5 / 3)
        common = (
            beta * (0.0003 + 0.009 * (1.8 if stress else 1.0) * rng.normal())
            + 0.006 * rng.normal(size=market.sectors)[sector]
            + styles[t - 2] @ (0.0015 * rng.normal(size=wander.shape))
        )
        returns[t] = common + volatility[t] * noise + (expected[t - 2] if t >= 2 else 0)
        attention = 0.8 * attention + 0.35 * rng.normal(size=count) + 0.15 * (np.abs(noise) - 0.75)
        log_volume[t] = size + attention
        if t >= 62:
            styles[t] = _styles(returns[: t + 1], log_volume[: t + 1])
            paid = (PAID_STRESS if stress else PAID_CALM) + 0.3 * wander
            premium = market.strength * volatility[t] * (styles[t] @ paid)
            expected[t] = premium - premium.mean()
    return returns, np.round(np.exp(log_volume)), expected, volatility


def _styles(returns: np.ndarray, log_volume: np.ndarray) -> np.ndarray:
    """`(N, K)` on the last day: momentum, reversal, low volatility, return times volume."""
    unusual = log_volume[-1] - log_volume[-20:].mean(0)
    raw = np.stack(
        [
            returns[-60:-5].sum(0),
            -returns[-5:].sum(0),
            -returns[-20:].std(0),
            cross_section(returns[-1:])[0] * cross_section(unusual[None])[0],
        ]
    )
    return np.clip(cross_section(raw), -2.5, 2.5).T


def _candles(
    close: np.ndarray, returns: np.ndarray, volatility: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Open, high, low and close that agree with each other."""
    intraday = 0.7 * returns + 0.2 * volatility * rng.normal(size=close.shape)
    start = close / np.exp(intraday)
    reach = 0.5 * volatility * np.abs(rng.normal(size=(2, *close.shape)))
    return {
        "open": start,
        "high": np.maximum(start, close) * np.exp(reach[0]),
        "low": np.minimum(start, close) * np.exp(-reach[1]),
        "close": close,
    }


def _traded(market: Market, rng: np.random.Generator) -> np.ndarray:
    """Bool `(D, N)`: listed, and not suspended."""
    day, count = np.arange(market.days)[:, None], market.stocks
    first = np.where(rng.random(count) < 0.25, rng.integers(0, market.days, count), 0)
    last = np.where(rng.random(count) < 0.2, rng.integers(0, market.days, count), market.days)
    suspended = np.zeros((market.days, count), dtype=bool)
    for t, i in zip(*np.nonzero(rng.random(suspended.shape) < 0.0008), strict=True):
        suspended[t : t + 1 + rng.geometric(0.2), i] = True
    never = first >= last
    return (day >= np.where(never, 0, first)) & (day < np.where(never, market.days, last)) & ~suspended


def _dates(days: int) -> np.ndarray:
    return np.busday_offset(np.datetime64(START), np.arange(days)).astype("datetime64[s]")


def _symbols(count: int) -> list[str]:
    return [f"S{i:03d}" for i in range(count)]


def _source(market: Market) -> str:
    return f"simulated market of {market.stocks} stocks, seed {market.seed}"


def _digest(market: Market) -> str:
    """Changes with the arguments and with this code."""
    text = f"{astuple(market)} {inspect.getsource(inspect.getmodule(_run) or Path)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
