"""Training of a ranking model by the information coefficient, and its judgement beside simple rankings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from domains.forecasting.ranking.baselines import ORACLE, baseline_scores
from domains.forecasting.ranking.data import Days, RankingData
from domains.forecasting.ranking.features import RobustScale
from domains.forecasting.ranking.metrics import correlation, ranking_scores
from domains.forecasting.ranking.portfolio import Portfolio, simulate_portfolio
from zoo.errors import CheckpointError
from zoo.training.task import Mean, Task

BALANCE_WEIGHT = 0.002
"""Of the load-balancing loss beside the negative IC (the paper's setting)."""
SHOWN = {
    "IC": ("IC", "{:.3f}"),
    "ICIR": ("IC\nIR", "{:.2f}"),
    "RankIC": ("Rank\nIC", "{:.3f}"),
    "RankICIR": ("Rank\nICIR", "{:.2f}"),
    "annual_excess_return": ("excess\na year", "{:.0%}"),
    "IR": ("IR", "{:.2f}"),
    "max_drawdown": ("draw-\ndown", "{:.0%}"),
    "turnover": ("turn-\nover", "{:.0%}"),
}
"""Heading and format of what the terminal shows."""


class RankingTask(Task):
    """Minimises `-IC + 0.002 balance`, the mean over days; tests the ranking and a portfolio made by it.

    Args:
        model: a `MIGA` or `WindowRanker`.
        cfg: the run's config.
        facts: the `extra()` of the data that the model was made for.
    """

    monitor: ClassVar[str] = "val/rank_ic"
    mode: ClassVar[str] = "max"

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, cfg)
        self.ic, self.rank_ic = Mean(), Mean()
        self.scored: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @staticmethod
    def check(facts: Mapping[str, Any], data: RankingData, source: str) -> None:
        """Weights read the features that they were trained on."""
        if list(facts["features"]) != data.features:
            raise CheckpointError(features_differ(facts["features"], data.features, source))
        if facts["window"] != data.window:
            raise CheckpointError(
                f"{source} reads windows of {facts['window']} days, not of {data.window}. "
                f"Set data.window={facts['window']}."
            )

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: RankingData) -> None:
        """Features are scaled as they were for the weights."""
        data.use(RobustScale(**facts["scale"]))

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {"window": facts["window"]}

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def loss(self, batch: Days, stage: str) -> tuple[Tensor, Tensor]:
        out = self.model(batch.x, batch.mask)
        ic = correlation(out.scores.float(), batch.label, batch.mask)
        days = torch.tensor(float(len(ic)), device=ic.device)
        if stage != "train":
            scores, labels = (_ranks(values, batch.mask) for values in (out.scores.float(), batch.label))
            self.rank_ic.update(correlation(scores, labels, batch.mask).sum(), days)
            self.ic.update(ic.sum(), days)
        if stage == "test":
            self._keep(batch, out.scores)
        return BALANCE_WEIGHT * days * out.balance - ic.sum(), days

    def _keep(self, batch: Days, scores: Tensor) -> None:
        for (day, *stocks), row, mask in zip(
            batch.place.tolist(), scores.float().cpu(), batch.mask.cpu(), strict=True
        ):
            count = int(mask.sum())
            self.scored[day] = np.array(stocks[:count]), row[:count].numpy()

    def metrics(self, stage: str) -> dict[str, Tensor]:
        found = {"ic": self.ic.compute(), "rank_ic": self.rank_ic.compute()}
        self.ic.reset()
        self.rank_ic.reset()
        return found

    def on_test_epoch_start(self) -> None:
        self.scored = {}

    def on_test_epoch_end(self) -> None:
        """Gather what the processes have scored."""
        super().on_test_epoch_end()
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.scored)
            self.scored = {day: scored for part in parts for day, scored in part.items()}

    def scores(self, data: RankingData) -> dict[str, np.ndarray]:
        """Scores of the test days `(D, N)` by name, the model's own first; NaN outside of a cross-section."""
        own = np.full(data.returns.shape, np.nan)
        for day, (stocks, values) in self.scored.items():
            own[day, stocks] = values
        days = data.parts["test"]
        ranked = ~np.isnan(own[days])
        others = baseline_scores(data)
        return {self.name: own[days]} | {
            name: np.where(ranked, values[days], np.nan) for name, values in others.items()
        }

    def portfolio(self, scores: np.ndarray, data: RankingData) -> Portfolio:
        """Of the scores of the test days."""
        returns = data.returns[data.parts["test"]]
        return simulate_portfolio(scores, returns, top=data.top, horizon=data.horizon, cost=data.cost)

    def results(self, data: RankingData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        returns = data.returns[data.parts["test"]]
        rankings = {}
        for name, scores in self.scores(data).items():
            measured = ranking_scores(scores, returns) | self.portfolio(scores, data).summary()
            rankings[name] = {key: _rounded(value) for key, value in measured.items()}
        days = data.parts["test"]
        return {
            "data": data.name,
            "from": str(data.panel.dates[days[0]])[:10],
            "to": str(data.panel.dates[days[-1]])[:10],
            "horizon": data.horizon,
            "top": data.top,
            "cost": data.cost,
            "rankings": rankings,
        }

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        rankings = results["rankings"]
        days = rankings[self.name]["days"]
        table = Table(
            "ranking",
            *(heading for heading, _ in SHOWN.values()),
            title=f"{days} test days, {results['from']} to {results['to']}; portfolio of the best "
            f"{_top(results['top'])}, cost {results['cost']:g}",
            title_justify="left",
        )
        table.columns[0].no_wrap = True
        for name, values in rankings.items():
            cells = ("-" if values[k] is None else text.format(values[k]) for k, (_, text) in SHOWN.items())
            table.add_row(name, *cells, style="bold" if name == self.name else None)
        if ORACLE not in rankings:
            return [table]
        share = rankings[self.name]["RankIC"] / rankings[ORACLE]["RankIC"]
        return [table, f"{self.name} reaches {100 * share:.0f} % of the RankIC that this market allows."]

    def plots(self, data: RankingData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.forecasting.ranking.plots import draw_results

        draw_results(self, data, folder)


def features_differ(trained: Sequence[str], found: Sequence[str], source: str) -> str:
    """A message that names what is missing and what is too much."""
    lacking = [name for name in trained if name not in found]
    further = [name for name in found if name not in trained]
    parts = [f"the data lack {', '.join(lacking)}"] if lacking else []
    parts += [f"the data have {', '.join(further)} too"] if further else []
    return f"{source} was trained on other features: {'; '.join(parts) or 'their order differs'}."


def _ranks(values: Tensor, mask: Tensor) -> Tensor:
    """`(B, N)` ranks among the stocks of the mask, ties getting their mean."""
    order = torch.where(mask, values, torch.inf)
    smaller = (order[:, None, :] < order[:, :, None]).sum(-1)
    equal = (order[:, None, :] == order[:, :, None]).sum(-1)
    return smaller + (equal + 1) / 2


def _rounded(value: float) -> float | None:
    """Json-able: what is undefined is null."""
    if isinstance(value, int):
        return value
    return float(f"{value:.8g}") if np.isfinite(value) else None


def _top(top: float) -> str:
    return f"{100 * top:g} %" if top < 1 else f"{top:g}"
