"""The pictures of a ranking: its information coefficient over time, its portfolio, its returns by decile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from domains.forecasting.ranking.baselines import ORACLE
from domains.forecasting.ranking.metrics import daily_rank_ic, quantile_returns
from zoo import plots
from zoo.plots import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION, canvas

if TYPE_CHECKING:
    from domains.forecasting.ranking.data import RankingData
    from domains.forecasting.ranking.portfolio import Portfolio
    from domains.forecasting.ranking.task import RankingTask

STYLE: dict[Any, Any] = plots.STYLE | plots.GRID | {"lines.linewidth": 1.4}
_canvas = partial(canvas, style=STYLE)
COLOURS = (VERMILION, BLUE, GREEN, PURPLE, SKY)


def draw_results(task: RankingTask, data: RankingData, folder: Path) -> None:
    """All pictures of a tested model."""
    days = data.parts["test"]
    dates, returns = data.panel.dates[days], data.returns[days]
    scores = task.scores(data)
    cumulative_ic({name: daily_rank_ic(x, returns) for name, x in scores.items()}, dates, folder / "ic.png")
    held = {name: task.portfolio(x, data) for name, x in scores.items() if name != ORACLE}
    portfolio_curve(held, dates, folder / "portfolio.png")
    quantile_plot(quantile_returns(scores[task.name], returns), data.horizon, folder / "quantiles.png")


def _labelled(ax: Any, ylabel: str) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=8)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False)


def cumulative_ic(daily: Mapping[str, np.ndarray], dates: np.ndarray, path: str | Path) -> None:
    """The sum of the daily RankICs `(D,)` up to each date: a steady slope is a steady signal."""
    with _canvas(path, (6.4, 3.4)) as (_, axes):
        ax = axes.flat[0]
        for i, (name, values) in enumerate(daily.items()):
            style = {"color": GREY, "linestyle": "--"} if name == ORACLE else {"color": COLOURS[i % 5]}
            label = f"{name}: mean {np.nanmean(values):.3f}"
            ax.plot(dates, np.nancumsum(values), label=label, **style)
        _labelled(ax, "cumulative RankIC")


def portfolio_curve(held: Mapping[str, Portfolio], dates: np.ndarray, path: str | Path) -> None:
    """The value of what was held, beside all stocks in equal parts; logarithmic."""
    with _canvas(path, (6.4, 3.4)) as (_, axes):
        ax = axes.flat[0]
        for i, (name, one) in enumerate(held.items()):
            ax.plot(dates[one.days], np.cumprod(1 + one.returns), color=COLOURS[i % 5], label=name)
        one = next(iter(held.values()))
        everything = np.cumprod(1 + one.universe)
        ax.plot(dates[one.days], everything, color=GREY, linestyle="--", label="all stocks")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        _labelled(ax, "value, 1 at the start")


def quantile_plot(excess: np.ndarray, horizon: int, path: str | Path) -> None:
    """Mean return of the stocks of each tenth of the scores, less that of all, in basis points."""
    with _canvas(path, (4.8, 3.0)) as (_, axes):
        ax = axes.flat[0]
        places = np.arange(1, len(excess) + 1)
        ax.bar(places, 1e4 * excess, color=np.where(excess >= 0, BLUE, VERMILION))
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_xticks(places)
        days = "a day" if horizon == 1 else f"over {horizon} days"
        ax.set(xlabel="tenth of the scores, the highest on the right", ylabel=f"excess return {days} (bp)")


def score_plot(table: pd.DataFrame, path: str | Path, shown: int = 15) -> None:
    """The best and the worst stocks of one day, of a table with columns date, symbol, score and rank."""
    table = table.sort_values("rank")
    table["score"] -= table["score"].mean()
    if len(table) > 2 * shown:
        table = pd.concat([table.head(shown), table.tail(shown)])
    with _canvas(path, (4.6, 0.9 + 0.17 * len(table))) as (_, axes):
        ax = axes.flat[0]
        places = np.arange(len(table))
        colours = np.where(table["score"] >= 0, BLUE, VERMILION)
        ax.barh(places, table["score"], color=colours, height=0.75)
        ax.set_yticks(places, [f"{s}  {r}" for s, r in zip(table["symbol"], table["rank"], strict=True)])
        ax.tick_params(axis="y", labelsize=7)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(
            xlabel="score less the mean of the day", title=f"{table['date'].iloc[0]}: stocks and their ranks"
        )
