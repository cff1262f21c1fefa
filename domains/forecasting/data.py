"""Forecasting data: synthetic series to pre-train on, tables of series, the M4 files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from domains.forecasting.backtest import SeriesSet, Window, rolling_windows
from domains.forecasting.batches import (
    FixedWindows,
    ForecastWindows,
    RandomWindows,
    Rows,
    SyntheticSamples,
    collate,
)
from domains.forecasting.fev_tasks import FevTask, levels_of, read_tasks
from domains.forecasting.metrics import LEVELS
from domains.forecasting.series import listed
from domains.forecasting.sources import (
    embedded_sets,
    freq_name,
    m4_part,
    read_frame,
    read_m4,
    read_set,
)
from domains.forecasting.synthetic.sales import simulated_sales
from zoo.errors import ConfigError, did_you_mean
from zoo.files import atomic_path
from zoo.paths import cache_dir
from zoo.training.data import DataModule, ResumableLoader

HORIZON = 48
CONTEXT_LENGTH = 512
VALIDATION_STEPS = 16
VALIDATION_SEED = 1_000_003
"""Added to the seed of synthetic validation samples: they are none of the training samples."""


class ForecastData(DataModule):
    """What a forecaster is trained on, and the real series that it is tested on.

    `synthetic` trains on generated series and is tested zero-shot on the real series that ship with the zoo,
    or on those of `test_path`. A table or M4 folder is trained on up to two horizons before the end of each
    series; the last but one horizon is for validation, the last (with `windows`, several) for the test.
    Tasks of fev are for tests alone.

    Args:
        name: `synthetic`, `file`, `m4` or `fev`.
        path: of the table, of the M4 folder, or of the YAML file of fev's tasks.
        test_path: for `synthetic`: test on this table or M4 folder too.
        id_column, timestamp_column, target, past, known, freq, gaps: of tables, see `read_frame`.
        horizon: steps to forecast; None: that of the M4 part. For `synthetic`: the longest in training, 48
            by default.
        season: steps of a season; None: by the frequency.
        context_length: steps of history at most; None: 512, or what fine-tuned weights read.
        min_past: steps of history that a training window must have; None: the horizon.
        windows, stride: forecasts of each series in the test, and the steps between them (None: the horizon).
        steps: training steps of an epoch.
        rows, multivariate, generator: of synthetic samples, see `SyntheticSamples`.
        groups: False: every row is trained on and forecast alone, without covariates.
        baselines: names of what the forecasts are compared with, see `build_baseline`; seasonal naive always.
        batch_size: samples of a step: groups of `rows` synthetic rows, or series with their covariates.
        num_workers, seed: see `DataModule`.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the files cannot be used.
    """

    tests: list[SeriesSet]
    test_windows: list[list[Window]]
    fev: list[FevTask]
    """Its tasks, one for each set, where these are what is tested."""
    levels: Sequence[float]
    """Quantile levels that the test forecasts."""

    def __init__(
        self,
        name: str = "synthetic",
        path: str | Path | None = None,
        *,
        test_path: str | Path | None = None,
        id_column: str | None = None,
        timestamp_column: str | None = None,
        target: str | Sequence[str] | None = None,
        past: Sequence[str] = (),
        known: Sequence[str] = (),
        freq: str | None = None,
        gaps: str = "error",
        horizon: int | None = None,
        season: int | None = None,
        context_length: int | None = None,
        min_past: int | None = None,
        windows: int = 1,
        stride: int | None = None,
        steps: int = 50,
        rows: int = 8,
        multivariate: float = 0.3,
        generator: str | None = None,
        groups: bool = True,
        baselines: Sequence[str] = (),
        batch_size: int = 4,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        for key, value in {
            "horizon": horizon,
            "season": season,
            "context_length": context_length,
            "min_past": min_past,
            "windows": windows,
            "steps": steps,
            "rows": rows,
        }.items():
            if value is not None and value < 1:
                raise ConfigError(f"data.{key}={value}: at least 1 is needed.")
        self.name, self.path, self.test_path = name, path, test_path
        self.columns: dict[str, Any] = {
            "id_column": id_column,
            "timestamp_column": timestamp_column,
            "target": target,
            "past": list(past),
            "known": list(known),
            "freq": freq,
            "gaps": gaps,
        }
        self.horizon, self.season = horizon, season
        self.context_length = CONTEXT_LENGTH if context_length is None else context_length
        self._reads_as_its_model = context_length is None
        self.min_past, self.windows, self.stride, self.steps = min_past, windows, stride, steps
        self.rows, self.multivariate, self.generator = rows, multivariate, generator
        self.groups, self.baselines = groups, list(baselines)
        self.fev, self.levels = [], LEVELS

    def setup(self, stage: str | None = None) -> None:
        """Read and cut; once, whatever the stage."""
        if hasattr(self, "test_set"):
            return
        if self.name == "synthetic":
            self._set_up_synthetic()
        elif self.name == "fev":
            self._set_up_fev()
        else:
            self._set_up_real(self._read(self.path))
        self._set_up_test()

    def _set_up_test(self) -> None:
        self.test_set = ForecastWindows(
            self.test_windows, self.context_length, groups=self.groups, levels=self.levels
        )

    def fit_to(self, facts: Mapping[str, Any]) -> None:
        """Test as the weights were trained: on single rows if so, on as many steps as they read."""
        self.groups = self.groups and facts.get("groups", True)
        if self._reads_as_its_model:
            self.context_length = facts.get("context_length", self.context_length)
        self._set_up_test()

    def _set_up_synthetic(self) -> None:
        self.train_set, self.val_set = (
            SyntheticSamples(
                steps * self.batch_size,
                rows=self.rows,
                context_length=self.context_length,
                horizon=self.horizon or HORIZON,
                batch_size=self.batch_size,
                multivariate=self.multivariate,
                generator=self.generator,
                redraw=redraw,
                seed=seed,
            )
            for steps, redraw, seed in (
                (self.steps, True, self.seed),
                (VALIDATION_STEPS, False, self.seed + VALIDATION_SEED),
            )
        )
        self.tests = embedded_sets()
        if self.test_path is not None:
            self.tests.append(self._read(self.test_path))
        self.test_windows = [
            rolling_windows(series, series.horizon, self._test_windows(series), self.stride)
            for series in self.tests
        ]

    def _set_up_fev(self) -> None:
        if self.path is None:
            raise ConfigError("data=fev needs the file of its tasks: data.path=TASKS.yaml.")
        self.fev = read_tasks(self.path)
        self.levels = levels_of(self.fev)
        self.tests = [one.series for one in self.fev]
        self.test_windows = [one.windows for one in self.fev]

    def _test_windows(self, series: SeriesSet) -> int:
        """M4 has one test window of its own."""
        return 1 if series.name.startswith("m4_") else self.windows

    def _set_up_real(self, series: SeriesSet) -> None:
        horizon = self.horizon = series.horizon
        test = rolling_windows(series, horizon, self._test_windows(series), self.stride)
        kept_back = horizon + (self._test_windows(series) - 1) * (self.stride or horizon)
        before_test = series.split(kept_back)
        self.train_set = RandomWindows(
            before_test.split(horizon),
            self.steps * self.batch_size,
            horizon=horizon,
            min_past=self.min_past or horizon,
            context_length=self.context_length,
            seed=self.seed,
        )
        validation = rolling_windows(before_test, horizon)
        self.val_set = FixedWindows(validation, self.context_length)
        self.tests, self.test_windows = [series], [test]

    def _read(self, path: str | Path | None) -> SeriesSet:
        if path is None:
            raise ConfigError(f"data={self.name} needs its file: data.path=FILE.")
        part = m4_part(path)
        if part is not None:
            return read_m4(Path(path) if Path(path).is_dir() else Path(path).parent, part)
        if self.horizon is None:
            raise ConfigError("How many steps are to be forecast? data.horizon=24, for example.")
        return read_set(path, horizon=self.horizon, season=self.season, **self.columns)

    def train_dataloader(self) -> ResumableLoader:
        """In order: what is behind an index is drawn anew in every epoch."""
        if self.fev:
            raise ConfigError("data=fev is for zoo evaluate; train on data=synthetic, m4 or forecast_file.")
        return self.loader(self.train_set, shuffle=False)

    def loader(self, dataset: Dataset, *, shuffle: bool = False) -> ResumableLoader:
        loader = super().loader(dataset, shuffle=shuffle)
        loader.collate_fn = list if isinstance(dataset, ForecastWindows) else self._joined
        return loader

    def _joined(self, samples: Sequence[Rows]) -> Rows:
        rows = collate(samples)
        return rows if self.groups else rows._replace(groups=torch.arange(len(rows.groups)))

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        return {"context_length": self.context_length}

    def extra(self) -> dict[str, Any]:
        """What a checkpoint should say of what it was trained on; json-able."""
        trained = None if self.name == "synthetic" else self.tests[0]
        return {
            "data": self.name,
            "trained_on": "synthetic series" if trained is None else trained.name,
            "targets": None if trained is None else list(trained.targets),
            "past": self.columns["past"],
            "known": self.columns["known"],
            "freq": None if trained is None else freq_name(trained.freq),
            "season": None if trained is None else trained.season,
            "horizon": self.horizon,
            "context_length": self.context_length,
            "groups": self.groups,
        }

    # ---- `zoo data` --------------------------------------------------------------------------------------

    @staticmethod
    def make(output: Path | None = None, *, weeks: int = 104, seed: int = 0) -> list[Path]:
        """Write simulated sales with covariates as `sales.csv` into `output`, or else into the cache."""
        path = (output or cache_dir() / "forecasting") / "sales.csv"
        with atomic_path(path) as part:
            simulated_sales(weeks=weeks, seed=seed).to_csv(part, index=False, float_format="%.6g")
        return [path]

    @staticmethod
    def describe(path: Path, **options: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """What a table or M4 folder holds: facts by name, and one row of statistics per target."""
        part = m4_part(path)
        series = read_m4(path, part) if part else read_set(path, horizon=1, **_checked(options))
        lengths = [item.length for item in series.items]
        facts = {
            "series": f"{len(lengths)}: {listed([item.name for item in series.items])}",
            "steps": f"{min(lengths)} to {max(lengths)}",
            "frequency": freq_name(series.freq) or "unknown",
            "season": f"{series.season} steps",
        }
        values = np.concatenate([item.target for item in series.items], axis=1)
        return facts, [_statistics(name, row) for name, row in zip(series.targets, values, strict=True)]


def _statistics(name: str, values: np.ndarray) -> dict[str, str]:
    known = values[~np.isnan(values)]
    measured = {"mean": np.mean, "std": np.std, "min": np.min, "max": np.max}
    found = {key: f"{function(known):.4g}" if len(known) else "-" for key, function in measured.items()}
    return {"target": name, **found, "missing": f"{100 * np.isnan(values).mean():.2f} %"}


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    known = [*inspect.signature(read_frame).parameters][1:]
    for name in options:
        if name not in known:
            raise ConfigError(
                f"There is no option {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}."
            )
    return options
