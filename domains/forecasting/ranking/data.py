"""Days of a price panel as training samples: the stocks of a day with their histories and next returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domains.forecasting.ranking.features import RobustScale, cross_section, features, future_returns
from domains.forecasting.ranking.panel import Panel, read_panel, write_panel
from domains.forecasting.ranking.simulate import Market, simulated
from domains.forecasting.series import listed
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.paths import cache_dir
from zoo.training.data import DataModule

WEEK = 5
"""Trading days."""


class Days(NamedTuple):
    """The stocks of B days, padded to the largest number N of them."""

    x: Tensor
    """`(B, N, T, F)` scaled features of the last T days; 0 where unknown, and in the padding."""
    label: Tensor
    """`(B, N)` z-scores of the returns among the stocks of the day."""
    mask: Tensor
    """bool `(B, N)`, False = padding."""
    place: Tensor
    """`(B, N + 1)` index of the day, then those of the stocks, -1 in the padding."""


class CrossSections(Dataset):
    """A sample for each of `days`: its stocks that have a return, or with `unknown` all that traded.

    Args:
        values: `(D, stocks, F)` scaled features.
        returns: `(D, stocks)` to be ranked.
        eligible: bool `(D, stocks)`, stocks that may be ranked.
        days: indices of the days.
        window: T.
        unknown: keep stocks whose return is not known, for prediction.
    """

    def __init__(
        self,
        values: np.ndarray,
        returns: np.ndarray,
        eligible: np.ndarray,
        days: Sequence[int],
        window: int,
        *,
        unknown: bool = False,
    ) -> None:
        self.values, self.days, self.window = values, list(days), window
        self.stocks = eligible if unknown else eligible & ~np.isnan(returns)
        self.labels = np.nan_to_num(cross_section(np.where(self.stocks, returns, np.nan)))

    def __len__(self) -> int:
        return len(self.days)

    def __getitem__(self, index: int) -> Days:
        day = self.days[index]
        stocks = np.flatnonzero(self.stocks[day])
        window = self.values[day + 1 - self.window : day + 1, stocks]
        return Days(
            torch.from_numpy(np.ascontiguousarray(window.swapaxes(0, 1))),
            torch.from_numpy(self.labels[day, stocks].astype(np.float32)),
            torch.ones(len(stocks), dtype=torch.bool),
            torch.from_numpy(np.concatenate([[day], stocks])),
        )


def collate(samples: Sequence[Days]) -> Days:
    """Pad days to one number of stocks."""
    pad = torch.nn.utils.rnn.pad_sequence
    x, label, mask, place = (list(parts) for parts in zip(*samples, strict=True))
    return Days(
        pad(x, batch_first=True),
        pad(label, batch_first=True),
        pad(mask, batch_first=True),
        pad(place, batch_first=True, padding_value=-1),
    )


class RankingData(DataModule):
    """A price panel cut by date into days to train on, to validate on and to test on.

    A stock is in the cross-section of a day on which it traded, once it has traded on `window` days. Its
    label, the return from the close of the next day to that `horizon` days later, is a z-score among the
    stocks of the day. Features are scaled by the training days. Between two parts lie as many days unused as
    a label reaches ahead.

    Args:
        name: `simulated`, or `file`.
        path: of the table, see `read_panel`.
        date_column, symbol_column: of the table; None: the usual names.
        market: arguments of the simulated market, see `Market`.
        window: T, days of history that the model reads.
        horizon: days over which the return to be ranked is earned.
        val_start, test_start: first dates of these parts; None: after 60 % and 80 % of the days.
        top: stocks of the test's portfolio; below 1 a share of the cross-section.
        cost: of what the portfolio buys or sells, as a share.
        batch_size: days of a step.
        num_workers, seed: see `DataModule`.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the table cannot be used.
    """

    panel: Panel
    returns: np.ndarray
    """`(D, N)` of `future_returns`."""
    eligible: np.ndarray
    scale: RobustScale

    def __init__(
        self,
        name: str = "simulated",
        path: str | Path | None = None,
        *,
        date_column: str | None = None,
        symbol_column: str | None = None,
        market: Mapping[str, Any] | None = None,
        window: int = 20,
        horizon: int = 1,
        val_start: str | None = None,
        test_start: str | None = None,
        top: float = 0.1,
        cost: float = 0.0,
        batch_size: int = 1,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for key, value in {"window": window, "horizon": horizon}.items():
            if value < 1:
                raise ConfigError(f"data.{key}={value}: at least 1 is needed.")
        if name not in ("simulated", "file"):
            raise ConfigError(f"data.name={name} is neither simulated nor file.")
        self.name, self.path = name, path
        self.columns = {"date_column": date_column, "symbol_column": symbol_column}
        self.market = dict(market or {})
        self.window, self.horizon, self.top, self.cost = window, horizon, top, cost
        self.starts = {"data.val_start": val_start, "data.test_start": test_start}

    def setup(self, stage: str | None = None) -> None:
        """Read, measure and cut; once, whatever the stage."""
        if hasattr(self, "panel"):
            return
        self.panel = self._read()
        self.values, self.features = features(self.panel)
        self.returns = future_returns(self.panel, self.horizon)
        self.eligible = eligible(self.panel, self.window)
        self.parts = self._cut()
        self.use(RobustScale.fit(self.values[: self.parts["train"][-1] + 1]))

    def use(self, scale: RobustScale) -> None:
        """Scale the features by `scale`: those of the training days, or of the weights' own."""
        self.scale = scale
        scaled = scale(self.values)
        self.train_set, self.val_set, self.test_set = (
            CrossSections(scaled, self.returns, self.eligible, self.parts[part], self.window)
            for part in ("train", "val", "test")
        )

    @staticmethod
    def collate(samples: Sequence[Days]) -> Days:
        return collate(samples)

    def _read(self) -> Panel:
        if self.name == "simulated":
            return simulated(build_market(self.market, self.seed))
        if self.path is None:
            raise ConfigError("data=price_panel needs its table: data.path=FILE.")
        return read_panel(self.path, **self.columns)

    def _cut(self) -> dict[str, list[int]]:
        """The days of each part: those with at least two stocks whose return is known."""
        usable = (self.eligible & ~np.isnan(self.returns)).sum(1) >= 2
        found = np.flatnonzero(usable)
        if len(found) < 3:
            raise DataError(
                f"{self.panel.source}: {len(found)} days have two stocks with {self.window} days of history "
                f"and a return {self.horizon + 1} days ahead; at least 3 are needed. Lower data.window."
            )
        bounds = [
            int(np.searchsorted(self.panel.dates, _date(key, given)))
            if given
            else int(found[0] + share * span)
            for (key, given), share, span in zip(
                self.starts.items(), (0.6, 0.8), [found[-1] + 1 - found[0]] * 2, strict=True
            )
        ]
        edges, apart = [0, *bounds, len(usable)], self.horizon + 1
        parts = {}
        for name, start, end in zip(("train", "val", "test"), edges[:-1], edges[1:], strict=True):
            end = end if name == "test" else end - apart
            parts[name] = [int(day) for day in found if start <= day < end]
            if not parts[name]:
                raise DataError(
                    f"{self.panel.source} leaves no day for the part {name!r}: its days with known returns "
                    f"are {self._day(found[0])} to {self._day(found[-1])}; the parts for validation and test "
                    f"start on {' and '.join(self._day(min(b, len(usable) - 1)) for b in bounds)}. "
                    "Choose data.val_start and data.test_start."
                )
        return parts

    def _day(self, index: int) -> str:
        return str(self.panel.dates[index])[:10]

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        return {"num_features": len(self.features), "window": self.window}

    def extra(self) -> dict[str, Any]:
        """What a checkpoint should say of what it was trained on; json-able."""
        return {
            "data": self.name,
            "features": self.features,
            "scale": self.scale.facts(),
            "window": self.window,
            "horizon": self.horizon,
            "trained_until": self._day(self.parts["train"][-1]),
        }

    # ---- `zoo data` --------------------------------------------------------------------------------------

    @staticmethod
    def make(output: Path | None = None, *, weeks: int | None = None, seed: int = 0) -> list[Path]:
        """Write the simulated market as `prices.csv` into `output`, or else beside its cache."""
        market = Market(seed=seed) if weeks is None else Market(days=WEEK * weeks, seed=seed)
        path = (output or cache_dir() / "forecasting") / "prices.csv"
        write_panel(simulated(market), path)
        return [path]

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """What a table of prices holds: facts by name, and one row of statistics per column."""
        known = [*inspect.signature(read_panel).parameters][1:]
        for name in reading:
            if name not in known:
                raise ConfigError(f"There is no option {name!r}.{did_you_mean(name, known)}")
        panel = read_panel(path, **reading)
        present = ~np.isnan(panel.close)
        facts = {
            "stocks": f"{len(panel.symbols)}: {listed(panel.symbols)}",
            "days": f"{len(panel.dates)}, {str(panel.dates[0])[:10]} to {str(panel.dates[-1])[:10]}",
            "stocks of a day": f"{present.sum(1).min()} to {present.sum(1).max()}",
            "features": f"{len(features(panel)[1])}",
        }
        return facts, [_statistics(n, v[present]) for n, v in (panel.fields | panel.extra).items()]


def eligible(panel: Panel, window: int) -> np.ndarray:
    """Bool `(D, N)`: traded on the day, and on `window` days up to it."""
    present = ~np.isnan(panel.close)
    ready = np.arange(len(present))[:, None] >= window - 1
    return present & ready & (present.cumsum(0) >= window)


def build_market(given: Mapping[str, Any], seed: int) -> Market:
    """The market of `data.market`; its seed is that of the data unless it has one.

    Raises:
        ConfigError: an argument that `Market` does not have, or out of its range.
    """
    known = inspect.signature(Market).parameters
    for name in given:
        if name not in known:
            raise ConfigError(f"Unknown key data.market.{name}.{did_you_mean(name, known)}")
    return Market(**{"seed": seed, **cast(Any, given)})


def _date(key: str, text: str) -> np.datetime64:
    try:
        return np.datetime64(str(text), "s")
    except ValueError:
        raise ConfigError(f"{key}={text} is no date such as 2024-01-31.") from None


def _statistics(name: str, values: np.ndarray) -> dict[str, str]:
    known = values[~np.isnan(values)]
    measured = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    found = {key: f"{function(known):.4g}" if len(known) else "-" for key, function in measured.items()}
    return {"column": name, **found, "missing": f"{100 * np.isnan(values).mean():.2f} %"}
