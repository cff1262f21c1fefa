"""Training of forecasters, and their judgement on real series beside forecasts that need no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from domains.forecasting.backtest import backtest, judged
from domains.forecasting.baselines import build_baseline
from domains.forecasting.batches import Forecastable, Rows, patches_for
from domains.forecasting.data import ForecastData
from domains.forecasting.metrics import BASELINE, LEVELS, Judged, leaderboard, scores
from domains.forecasting.pipeline.forecaster import Forecaster
from zoo.cli.console import console
from zoo.registry import create_model
from zoo.training.task import Task, new_model
from zoo.weights.checkpoint import load_state, read_checkpoint

COMPARED = ("MASE", "WQL", "SQL", "CRPS", "coverage")
SHOWN_BASELINES = {"seasonal_naive": BASELINE, "gaussian_seasonal_naive": "seasonal naive, normal"}

Place = tuple[int, int, int | None]
"""Number of the set, of the window in it, and of the target where that was forecast alone."""


class ForecastTask(Task):
    """Trains a forecaster by its own quantile loss; tests it on the windows of `ForecastData`.

    Args:
        model: a Chronos-2.
        cfg: the run's config.
        facts: the `extra()` of the data that the model was made for.
    """

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, cfg)
        self.forecasts: dict[Place, np.ndarray] = {}

    @classmethod
    def build(cls, cfg: DictConfig, data: ForecastData, model: nn.Module | None = None) -> Self:
        return cls(model or new_model(cfg, data), cfg)

    @staticmethod
    def facts_of(model: nn.Module) -> dict[str, Any]:
        """Official weights read as many steps as their config says."""
        return {"context_length": model.context_length}

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        if given.get("context_length") is None:
            return {"context_length": facts["context_length"]}
        return {}

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: ForecastData) -> None:
        """Weights that were trained on single rows are tested on single rows."""
        if not facts.get("groups", True):
            data.ungroup()

    @classmethod
    def transfer(cls, path: Path, data: ForecastData) -> nn.Module:
        """The model of a checkpoint; it reads and forecasts at least as far as the new data need.

        As after the official `fit`, context length and number of output patches grow, the scale of the time
        index stays.
        """
        state, meta = read_checkpoint(path)
        built = meta["model"]
        name = f"{built['domain']}/{built['name']}"
        old = cast(Any, create_model(name, **built["config"]))
        reach = max(patches_for(series.horizon, old.patch_size) for series in data.tests)
        grown = {
            "context_length": max(old.context_length, data.context_length),
            "max_output_patches": max(old.max_output_patches, reach),
            "time_encoding_scale": old.time_encoding_scale,
        }
        model = create_model(name, **(built["config"] | grown))
        console.print(load_state(model, state, source=str(path)))
        return model

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def loss(self, batch: Rows, stage: str) -> tuple[Tensor, Tensor]:
        model: Any = self.model
        out = model(
            batch.context,
            group_ids=batch.groups,
            future_covariates=batch.future,
            num_output_patches=patches_for(batch.future.shape[1], model.patch_size),
            future_target=batch.target,
        )
        rows = torch.tensor(float(len(batch.context)), device=out.loss.device)
        return out.loss * rows, rows

    def on_test_epoch_start(self) -> None:
        self.forecasts = {}

    def test_step(self, batch: Sequence[Forecastable], batch_idx: int) -> None:
        forecaster = Forecaster(cast(Any, self.model))
        for horizon, part in groupby(batch, key=lambda one: (one.which, one.horizon)):
            made = list(part)
            quantiles, _ = forecaster.predict_quantiles([one.inputs for one in made], horizon[1], LEVELS)
            for one, forecast in zip(made, quantiles, strict=True):
                self.forecasts[one.which, one.window, one.row] = forecast.numpy()

    def on_test_epoch_end(self) -> None:
        """Gather what the processes have forecast."""
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.forecasts)
            self.forecasts = {place: forecast for part in parts for place, forecast in part.items()}

    def judged(self, data: ForecastData) -> list[Judged]:
        """The forecasts of the test, set by set."""
        found = []
        for which, (series, windows) in enumerate(zip(data.tests, data.test_windows, strict=True)):
            made = [self._forecast(which, i, len(series.targets)) for i in range(len(windows))]
            found.append(judged(windows, made, season=series.season))
        return found

    def _forecast(self, which: int, window: int, rows: int) -> np.ndarray:
        """`[D, H, L]`"""
        together = self.forecasts.get((which, window, None))
        if together is not None:
            return together
        return np.concatenate([self.forecasts[which, window, row] for row in range(rows)])

    def results(self, data: ForecastData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = list(dict.fromkeys([*SHOWN_BASELINES, *data.baselines]))
        sets = {}
        for series, windows, own in zip(data.tests, data.test_windows, self.judged(data), strict=True):
            measured = {self.name: scores(own)}
            for name in names:
                judgement = backtest(build_baseline(name, series.season), windows, season=series.season)
                measured[SHOWN_BASELINES.get(name, name)] = scores(judgement)
            sets[series.name] = {
                "series": len(series.items),
                "forecasts": len(windows),
                "horizon": windows[0].horizon,
                "season": series.season,
                "errors": {name: _rounded(errors) for name, errors in measured.items()},
            }
        return {"data": data.name, "sets": sets, "leaderboards": _leaderboards(sets)}

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        tables = [self._table(name, facts) for name, facts in results["sets"].items()]
        lines = [
            f"{metric}: skill score against {BASELINE} {100 * board['skill_score'][self.name]:.1f} %, "
            f"win rate {100 * board['win_rate'][self.name]:.0f} % over {len(results['sets'])} sets."
            for metric, board in results["leaderboards"].items()
        ]
        return [*tables, *lines]

    def _table(self, name: str, facts: Mapping[str, Any]) -> Table:
        table = Table(
            "forecast",
            *COMPARED,
            f"WQL of {self.name}",
            title=f"{name}: {facts['forecasts']} forecasts of {facts['horizon']} steps, "
            f"season {facts['season']}",
            title_justify="left",
        )
        errors = facts["errors"]
        for other, values in errors.items():
            own = other == self.name
            margin = "" if own else _lower(errors[self.name]["WQL"], values["WQL"])
            cells = ["-" if values[m] is None else f"{values[m]:.4g}" for m in COMPARED]
            table.add_row(other, *cells, margin, style="bold" if own else None)
        return table

    def plots(self, data: ForecastData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.forecasting.plots import draw_results

        draw_results(self, data, results, folder)


def _rounded(errors: Mapping[str, float]) -> dict[str, float | None]:
    """Json-able: a metric that is undefined is null."""
    return {name: float(f"{value:.8g}") if np.isfinite(value) else None for name, value in errors.items()}


def _leaderboards(sets: Mapping[str, Any]) -> dict[str, Any]:
    """Skill scores and win rates over the sets, by metric."""
    boards = {}
    for metric in ("WQL", "MASE"):
        errors = pd.DataFrame(
            {name: {m: v[metric] for m, v in facts["errors"].items()} for name, facts in sets.items()}
        ).T
        boards[metric] = leaderboard(errors.astype(float)).round(6).to_dict()
    return boards


def _lower(own: float, other: float) -> str:
    gain = 100 * (1 - own / max(other, 1e-12))
    return f"{abs(gain):.1f} % {'lower' if gain >= 0 else 'higher'}"
