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
from domains.forecasting.fev_tasks import METRICS
from domains.forecasting.metrics import BASELINE, LEVELS, Judged, leaderboard, scores
from domains.forecasting.pipeline.forecaster import Forecaster
from domains.forecasting.weights import is_adapted, save_adapter
from zoo.cli.console import console
from zoo.create import create_model
from zoo.training.task import Task, new_model
from zoo.weights.checkpoint import load_state, read_checkpoint

FEV_METRICS = ("test_error", *METRICS)
COMPARED = ("test_error", "MASE", "WQL", "SQL", "CRPS", "coverage")
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
        data.fit_to(facts)

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
            quantiles, _ = forecaster.predict_quantiles(
                [one.inputs for one in made], horizon[1], made[0].levels
            )
            for one, forecast in zip(made, quantiles, strict=True):
                self.forecasts[one.which, one.window, one.row] = forecast.numpy()

    def on_test_epoch_end(self) -> None:
        """Gather what the processes have forecast."""
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.forecasts)
            self.forecasts = {place: forecast for part in parts for place, forecast in part.items()}

    def on_test_end(self) -> None:
        """After a training of LoRA updates alone, write them as the official program reads them."""
        if not (self.trainer.is_global_zero and is_adapted(self.model)):
            return
        folder = Path(self.trainer.default_root_dir) / "adapter"
        save_adapter(self.model, folder, base=str(self.cfg.finetune.get("official") or ""))
        console.print(f"LoRA adapter for the official program: {folder}", highlight=False, soft_wrap=True)

    def judged(self, data: ForecastData) -> list[Judged]:
        """The forecasts of the test, set by set."""
        deciles = [data.levels.index(level) for level in LEVELS]
        return [
            judged(windows, [made[..., deciles] for made in self._made(data, which)], season=series.season)
            for which, (series, windows) in enumerate(zip(data.tests, data.test_windows, strict=True))
        ]

    def _made(self, data: ForecastData, which: int) -> list[np.ndarray]:
        """The forecasts `[D, H, L]` of all windows of a set, at all levels of the data."""
        rows = len(data.tests[which].targets)
        return [self._forecast(which, i, rows) for i in range(len(data.test_windows[which]))]

    def _forecast(self, which: int, window: int, rows: int) -> np.ndarray:
        """`[D, H, L]`"""
        together = self.forecasts.get((which, window, None))
        if together is not None:
            return together
        return np.concatenate([self.forecasts[which, window, row] for row in range(rows)])

    def results(self, data: ForecastData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        names = list(dict.fromkeys([*SHOWN_BASELINES, *data.baselines]))
        if data.fev:
            return self._fev_results(data, names)
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

    def _fev_results(self, data: ForecastData, names: Sequence[str]) -> dict[str, Any]:
        """As `results`, the errors those that fev finds, and its summaries as they are."""
        sets, summaries = {}, []
        for which, one in enumerate(data.fev):
            made = {self.name: self._made(data, which)}
            inputs = [window.inputs() for window in one.windows]
            for name in names:
                baseline = build_baseline(name, one.series.season)
                made[SHOWN_BASELINES.get(name, name)] = baseline(inputs, one.series.horizon, data.levels)
            found = {name: one.summary(forecasts, data.levels, name) for name, forecasts in made.items()}
            summaries += found.values()
            metrics = [name for name in FEV_METRICS if name in next(iter(found.values()))]
            sets[one.series.name] = {
                "series": len(one.series.items),
                "forecasts": len(one.windows),
                "horizon": one.series.horizon,
                "season": one.series.season,
                "errors": {
                    name: _rounded({metric: summary[metric] for metric in metrics})
                    for name, summary in found.items()
                },
            }
        shared = [m for m in FEV_METRICS if all(m in f["errors"][self.name] for f in sets.values())]
        return {
            "data": data.name,
            "sets": sets,
            "leaderboards": _leaderboards(sets, shared),
            "summaries": summaries,
        }

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        """Errors set by set, and the skill scores over them."""
        boards = results["leaderboards"]
        errors = {
            f"{metric}, {name}": facts["errors"][self.name][metric]
            for name, facts in results["sets"].items()
            for metric in boards
            if facts["errors"][self.name].get(metric) is not None
        }
        skill = {
            f"{metric}, skill score %": 100 * board["skill_score"][self.name]
            for metric, board in boards.items()
        }
        return errors | skill

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        tables = [self._table(name, facts) for name, facts in results["sets"].items()]
        if results["data"] == "fev":
            tables += [_board(metric, board) for metric, board in results["leaderboards"].items()]
            return tables
        sets = "1 set" if len(results["sets"]) == 1 else f"{len(results['sets'])} sets"
        lines = [
            f"{metric}: skill score against {BASELINE} {100 * board['skill_score'][self.name]:.1f} %, "
            f"win rate {100 * board['win_rate'][self.name]:.0f} % over {sets}."
            for metric, board in results["leaderboards"].items()
        ]
        return [*tables, *lines]

    def _table(self, name: str, facts: Mapping[str, Any]) -> Table:
        shown = [metric for metric in COMPARED if metric in facts["errors"][self.name]]
        judge = "WQL" if "WQL" in shown else shown[0]
        table = Table(
            "forecast",
            *shown,
            f"{judge} of {self.name}",
            title=f"{name}: {facts['forecasts']} forecasts of {facts['horizon']} steps, "
            f"season {facts['season']}",
            title_justify="left",
        )
        errors = facts["errors"]
        for other, values in errors.items():
            own = other == self.name
            margin = "" if own else _lower(errors[self.name][judge], values[judge])
            cells = ["-" if values[m] is None else f"{values[m]:.4g}" for m in shown]
            table.add_row(other, *cells, margin, style="bold" if own else None)
        return table

    def plots(self, data: ForecastData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.forecasting.plots import draw_results

        draw_results(self, data, results, folder)


def _rounded(errors: Mapping[str, float]) -> dict[str, float | None]:
    """Json-able: a metric that is undefined is null."""
    return {name: float(f"{value:.8g}") if np.isfinite(value) else None for name, value in errors.items()}


def _board(metric: str, board: Mapping[str, Any]) -> Table:
    """Win rate and skill score of each forecaster over the tasks, with 95 % intervals."""
    table = Table("forecast", "win rate %", "skill score %", title=f"{metric} over the tasks")
    for name in board["win_rate"]:
        cells = [
            f"{100 * board[key][name]:.1f} ({100 * board[f'{key}_low'][name]:.0f} to "
            f"{100 * board[f'{key}_high'][name]:.0f})"
            for key in ("win_rate", "skill_score")
        ]
        table.add_row(name, *cells)
    return table


def _leaderboards(sets: Mapping[str, Any], metrics: Sequence[str] = ("WQL", "MASE")) -> dict[str, Any]:
    """Skill scores and win rates over the sets, by metric."""
    boards = {}
    for metric in metrics:
        errors = pd.DataFrame(
            {name: {m: v[metric] for m, v in facts["errors"].items()} for name, facts in sets.items()}
        ).T
        boards[metric] = leaderboard(errors.astype(float)).round(6).to_dict()
    return boards


def _lower(own: float, other: float) -> str:
    gain = 100 * (1 - own / max(other, 1e-12))
    return f"{abs(gain):.1f} % {'lower' if gain >= 0 else 'higher'}"
