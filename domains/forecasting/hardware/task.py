"""Training of score predictors, and their judgement beside predictions that need no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from domains.forecasting.hardware.baselines import MEAN, WORKLOAD_MEAN, baselines
from domains.forecasting.hardware.data import Batch, HardwareData
from domains.forecasting.hardware.encode import Encoder
from domains.forecasting.hardware.metrics import METRICS, errors
from zoo.errors import CheckpointError, ConfigError
from zoo.training.task import Mean, Task, new_model

FEW = 300
"""Training rows below which the tested errors do not rank models."""
SHOWN = tuple(name for name in METRICS if name not in ("MSE", "APE<3", "P95 APE"))
PERCENTAGES = tuple(name for name in METRICS if "AP" in name)
"""What can be said of scores of several units together."""


class Tested(NamedTuple):
    """R rows and their scores."""

    table: pd.DataFrame
    measured: np.ndarray
    """`(R, targets)`"""
    predicted: dict[str, np.ndarray]
    """`(R, targets)` by the model, then by the baselines, the best expected first."""


class HardwareTask(Task):
    """Learns scores by the Huber loss (Li et al. 2024: delta = 1) in the scale of the encoder.

    Args:
        model: an NCPP, or any module of the same inputs.
        cfg: the run's config; `loss.delta` of the Huber loss.
        facts: the `extra()` of the data that the model was made for.
    """

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(model, cfg)
        self.encoder = Encoder.restored((facts or {})["encoder"])
        self.delta = float(OmegaConf.select(cfg, "loss.delta", default=None) or 1.0)
        self.percentage = Mean()
        self.predicted: dict[int, np.ndarray] = {}
        self._tested: Tested | None = None

    @classmethod
    def build(cls, cfg: DictConfig, data: HardwareData, model: nn.Module | None = None) -> Self:
        model = model or new_model(cfg, data)
        codes: Any = model
        if data.encoder.lengths and codes.vocabulary < data.encoder.vocabulary:
            raise ConfigError(
                f"model.vocabulary={codes.vocabulary} is less than data.vocabulary={data.encoder.vocabulary}."
            )
        return cls(model, cfg, data.extra())

    @staticmethod
    def check(facts: Mapping[str, Any], data: HardwareData, source: str) -> None:
        """Weights without columns, scaling and characters cannot read a table."""
        encoder_of(facts, source)

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: HardwareData) -> None:
        data.use(Encoder.restored(facts["encoder"]))

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Fine-tuning reads tables as the weights do."""
        return {"encoder": encoder_of(facts, "The checkpoint").state()}

    def loss(self, batch: Batch, stage: str) -> tuple[Tensor, Tensor]:
        scores = self.model(batch.numbers, batch.codes)
        total = F.huber_loss(scores.float(), batch.target, reduction="sum", delta=self.delta)
        if stage == "val":
            self._note_percentages(scores.detach(), batch.target)
        elif stage == "test":
            values = self.encoder.unscaled(scores.float().cpu().numpy())
            self.predicted |= dict(zip(batch.rows.tolist(), values, strict=True))
        return total, torch.tensor(float(batch.target.numel()), device=total.device)

    def _note_percentages(self, scores: Tensor, target: Tensor) -> None:
        """Of a part of the validation rows, those whose score is not 0."""
        values, measured = (self.encoder.unscaled(x.float().cpu().numpy()) for x in (scores, target))
        known = np.abs(measured) > 1e-12
        share = np.abs(values[known] - measured[known]) / np.abs(measured[known])
        total, count = (
            torch.tensor(x, device=scores.device) for x in (100 * share.sum(), float(known.sum()))
        )
        self.percentage.update(total, count)

    def metrics(self, stage: str) -> dict[str, Tensor]:
        if stage != "val":
            return {}
        value = self.percentage.compute()
        self.percentage.reset()
        return {"mape": value}

    def on_test_epoch_start(self) -> None:
        self.predicted, self._tested = {}, None

    def on_test_epoch_end(self) -> None:
        """Gather what the processes have predicted."""
        super().on_test_epoch_end()
        if dist.is_initialized():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, self.predicted)
            self.predicted = {row: values for part in parts for row, values in part.items()}

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def tested(self, data: HardwareData) -> Tested:
        """What the test has seen: all of its rows, unless `trainer.limit_test_batches` ends it earlier."""
        if self._tested is None:
            self._tested = self._beside_baselines(data)
        return self._tested

    def _beside_baselines(self, data: HardwareData) -> Tested:
        rows = sorted(self.predicted)
        table = data.parts["test"].iloc[rows].reset_index(drop=True)
        predicted = {self.name: np.stack([self.predicted[row] for row in rows])}
        if "train" in data.parts:
            others = baselines(data.parts["train"], table, data.encoder)
            predicted |= dict(reversed(others.items()))
        return Tested(table, data.test_set.measured[rows], predicted)

    def results(self, data: HardwareData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        table, measured, predicted = self.tested(data)
        targets = {
            target: {name: _rounded(errors(measured[:, i], made[:, i])) for name, made in predicted.items()}
            for i, target in enumerate(data.encoder.columns.target)
        }
        rows = {split: len(part) for split, part in data.parts.items()} | {"test": len(table)}
        found = {"data": data.name, "rows": rows, "leave_out": data.leave_out, "targets": targets}
        if len(targets) > 1:
            pooled = {name: errors(measured.ravel(), made.ravel()) for name, made in predicted.items()}
            found["all"] = {n: _rounded({m: e[m] for m in PERCENTAGES}) for n, e in pooled.items()}
        return found

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        rows, targets = results["rows"], results["targets"]
        title = f"errors in {rows['test']} test rows"
        if len(targets) == 1:
            ((target, found),) = targets.items()
            parts: list[RenderableType] = [self._table(f"{target}: {title}", found, SHOWN)]
        else:
            found, target = results["all"], "all scores"
            parts = [self._table(f"{target}: {title}", found, PERCENTAGES), self._by_target(targets)]
        for name in (MEAN, WORKLOAD_MEAN):
            pair = found[self.name]["MAPE"], found.get(name, {}).get("MAPE")
            if None not in pair:
                parts.append(f"{target}: MAPE {_margin(*pair)} than the {name}.")
        if results["data"] != "file":
            parts.append("The data are simulated, not measured.")
        if rows.get("train", FEW) < FEW:
            parts.append(f"{rows['train']} training rows are too few to say which method is better.")
        return parts

    def _table(self, title: str, found: Mapping[str, Any], shown: Sequence[str]) -> Table:
        table = Table("prediction", *shown, title=title, title_justify="left")
        for name, values in found.items():
            table.add_row(
                name, *(_cell(values[m]) for m in shown), style="bold" if name == self.name else None
            )
        return table

    def _by_target(self, targets: Mapping[str, Any]) -> Table:
        methods = list(next(iter(targets.values())))
        table = Table("MAPE of", *methods)
        for target, found in targets.items():
            table.add_row(target, *(_cell(found[name]["MAPE"]) for name in methods))
        return table

    def plots(self, data: HardwareData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.forecasting.hardware.plots import draw_results

        draw_results(self, data, folder)


def encoder_of(facts: Mapping[str, Any], source: str) -> Encoder:
    """How the weights read tables.

    Raises:
        CheckpointError: they do not say.
    """
    if "encoder" not in facts:
        raise CheckpointError(
            f"{source} does not say which columns it reads and how they are scaled: only weights of a run do "
            "(zoo train domain=forecasting model=ncpp)."
        )
    return Encoder.restored(facts["encoder"])


def _rounded(found: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else float(f"{value:.8g}") for name, value in found.items()}


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.2g}"


def _margin(own: float, other: float) -> str:
    gain = 100 * (1 - own / max(other, 1e-12))
    return f"{abs(gain):.1f} % {'lower' if gain >= 0 else 'higher'}"
