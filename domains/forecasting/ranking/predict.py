"""From a table of prices and trained weights to a table of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

from domains.forecasting.ranking.data import CrossSections, collate, eligible
from domains.forecasting.ranking.features import RobustScale, features
from domains.forecasting.ranking.panel import Panel, read_panel
from domains.forecasting.ranking.plots import score_plot
from domains.forecasting.ranking.task import features_differ
from zoo.devices import chosen_device
from zoo.errors import ConfigError, DataError
from zoo.files import atomic_path


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Rank the stocks of `cfg.input` on the days asked for.

    Args:
        model: a `MIGA` or `WindowRanker` in eval mode, as `zoo.load_model` returns it.
        facts: the `extra` stored with it, as `RankingData.extra` makes it.
        cfg: as `configs/predict.yaml` with `configs/predict/forecasting/ranking.yaml`.

    Returns:
        The files written: a table with columns date, symbol, score and rank (1 = best), and where plots are
        asked for a picture of the last day.

    Raises:
        DataError: a table that cannot be used, or that has other features than the weights.
        ConfigError: a setting that cannot be.
    """
    output = Path(cfg.output)
    if output.suffix not in (".csv", ".parquet"):
        raise ConfigError(f"output={output}: the suffix must be .csv or .parquet.")
    if not cfg.input:
        raise ConfigError("zoo predict needs a table of prices: input=FILE.")
    panel = read_panel(cfg.input, date_column=cfg.date_column, symbol_column=cfg.symbol_column)
    days = _days(cfg.date, panel, int(facts["window"]))
    table = ranks(model, facts, panel, days, batch_size=cfg.batch_size, device=cfg.device)
    with atomic_path(output) as part:
        if output.suffix == ".csv":
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)
    if not cfg.plots:
        return [output]
    picture = Path(cfg.plots) / "scores.png"
    score_plot(cast(Any, table[table["date"] == table["date"].max()]), picture)
    return [output, picture]


def ranks(
    model: nn.Module,
    facts: Mapping[str, Any],
    panel: Panel,
    days: list[int],
    *,
    batch_size: int = 16,
    device: str = "auto",
) -> pd.DataFrame:
    """Columns date, symbol, score and rank, the best stock of each day first.

    Stocks that did not trade on a day, or not on as many days as the model reads, have no rank there.

    Raises:
        DataError: the features are not those of the weights, or no stock can be ranked on a day.
    """
    values, names = features(panel)
    if names != list(facts["features"]):
        raise DataError(features_differ(facts["features"], names, "The model"))
    window, may = int(facts["window"]), eligible(panel, int(facts["window"]))
    for day in days:
        if not may[day].any():
            raise DataError(
                f"{panel.source}: no stock traded on {_text(panel, day)} and on {window} days up to it."
            )
    unknown = np.full_like(panel.close, np.nan)
    sections = CrossSections(RobustScale(**facts["scale"])(values), unknown, may, days, window, unknown=True)
    place = chosen_device(device)
    model = model.to(place)
    tables = []
    for start in range(0, len(days), batch_size):
        batch = collate([sections[i] for i in range(start, min(start + batch_size, len(days)))])
        with torch.no_grad():
            scores = model(batch.x.to(place), batch.mask.to(place)).scores.float().cpu()
        for (day, *stocks), row in zip(batch.place.tolist(), scores, strict=True):
            stocks = [stock for stock in stocks if stock >= 0]
            tables.append(_ranked(panel, day, stocks, row[: len(stocks)].numpy()))
    return pd.concat(tables, ignore_index=True)


def _ranked(panel: Panel, day: int, stocks: list[int], scores: np.ndarray) -> pd.DataFrame:
    order = np.argsort(-scores, kind="stable")
    return pd.DataFrame(
        {
            "date": _text(panel, day),
            "symbol": [panel.symbols[stocks[i]] for i in order],
            "score": scores[order],
            "rank": np.arange(1, len(order) + 1),
        }
    )


def _days(date: str | None, panel: Panel, window: int) -> list[int]:
    """Indices of the days asked for: the last one, `all` on which some stock can be ranked, or one date."""
    if date is None:
        return [len(panel.dates) - 1]
    if date == "all":
        days = np.flatnonzero(eligible(panel, window).any(1)).tolist()
        if not days:
            raise DataError(f"{panel.source}: no stock traded on {window} days, which the model reads.")
        return days
    try:
        wanted = np.datetime64(str(date), "s")
    except ValueError:
        raise ConfigError(f"date={date} is no date such as 2024-01-31, and not all.") from None
    found = np.flatnonzero(panel.dates == wanted)
    if not len(found):
        before = panel.dates[panel.dates < wanted]
        nearest = str(before[-1] if len(before) else panel.dates[0])[:10]
        raise DataError(f"{panel.source} has no prices of {date}; the nearest day is {nearest}.")
    return [int(found[0])]


def _text(panel: Panel, day: int) -> str:
    """`2024-01-31`, with the time where there is one."""
    stamp = str(panel.dates[day])
    return stamp[:10] if stamp.endswith("T00:00:00") else stamp
