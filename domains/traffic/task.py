"""Training and judging of traffic forecasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

from domains.traffic.baselines import Baseline, LastValue, Ridge, TimeOfDayMean, baseline_errors
from domains.traffic.data import TrafficData
from domains.traffic.losses import build_loss
from domains.traffic.metrics import NAMES, HorizonErrors
from domains.traffic.preprocessing import Preprocessing
from zoo.cli.console import console
from zoo.create import create_model
from zoo.errors import CheckpointError
from zoo.training.optim import period
from zoo.training.task import Task, checked, new_model
from zoo.weights.checkpoint import read_checkpoint

REPORTED_MINUTES = (15, 30, 60)


class TrafficTask(Task):
    """Trains a forecaster on scaled readings, with loss and metrics in original units.

    Args:
        model: `forward(x, time) -> [B, Q, N]`, scaled.
        cfg: the run's config; `loss` is read beside what `Task` reads.
        facts: the `extra()` of the data the model was made for: `mean`, `std`, `null_value`, `horizon`, ...
    """

    monitor: ClassVar[str] = "val/mae"
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, cfg: DictConfig, facts: Mapping[str, Any]) -> None:
        super().__init__(model, cfg)
        self.null_value = facts["null_value"]
        self.register_buffer("mean", torch.tensor(facts["mean"]), persistent=False)
        self.register_buffer("std", torch.tensor(facts["std"]), persistent=False)
        options = checked("loss", build_loss, OmegaConf.select(cfg, "loss", default=OmegaConf.create()))
        options["name"] = options.get("name") or "masked_mae"
        self.error = build_loss(**({"null_value": self.null_value} | options))
        self.errors = HorizonErrors(facts["horizon"], null_value=self.null_value)
        self.test_errors: dict[str, Tensor] = {}

    @classmethod
    def build(cls, cfg: DictConfig, data: TrafficData, model: nn.Module | None = None) -> Self:
        """The task for `data`, with `model`, or else a new one by `cfg.model`, bound to the sensor graph."""
        if model is None:
            model = new_model(cfg, data)
            bind(model, data)
        return cls(model, cfg, data.extra())

    @staticmethod
    def check(facts: Mapping[str, Any], data: TrafficData, source: str) -> None:
        """See that weights stored with `facts` are used on the sensors and steps they were trained on.

        Raises:
            CheckpointError: names the first sensors that differ, or the number that does.
        """
        own = data.extra()
        for key in ("history", "horizon", "interval_minutes", "channels"):
            if facts[key] != own[key]:
                raise CheckpointError(
                    f"{source} was trained with {key}={facts[key]}, the data have {own[key]}."
                )
        trained, given = facts["sensor_ids"], own["sensor_ids"]
        if list(trained) != list(given):
            raise CheckpointError(f"{source} belongs to other sensors: {_difference(trained, given)}")

    @staticmethod
    def data_options(facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        return {name: facts["preprocessing"][name] for name in ("missing", "fill", "null_value")}

    @staticmethod
    def prepare(facts: Mapping[str, Any], data: TrafficData) -> None:
        """Scale and date the inputs of `data` as those that weights stored with `facts` were trained on."""
        stored = Preprocessing(**facts["preprocessing"])
        if stored != data.preprocessing:
            channels = [data.series.channels.index(name) for name in stored.channels]
            inputs = stored.inputs(data.series.values[:, :, channels])
            time = stored.time(data.series.timestamps, data.series.interval_minutes)
            for windows in (data.train_set, data.val_set, data.test_set):
                windows.inputs, windows.time = inputs, time
            data.preprocessing = stored

    @classmethod
    def transfer(cls, path: Path, data: TrafficData) -> nn.Module:
        """The model of a checkpoint for the sensors of `data`.

        On the same sensors everything is taken over. On others the graph buffers are bound anew, and of the
        tensors with one entry per sensor those of the sensors known to the checkpoint.
        """
        model = super().transfer(path, data)
        state, meta = read_checkpoint(path)
        old, new = meta["extra"]["sensor_ids"], data.series.sensor_ids
        if list(old) == list(new):
            return model
        bind(model, data)
        names = carry_sensors(model, state, old, new)
        console.print(
            f"Sensors: {len(set(old) & set(new))} of {len(new)} are in the checkpoint. "
            "The sensor graph is that of the data."
            + (f" Entries of known sensors taken over in {', '.join(names)}." if names else ""),
            highlight=False,
        )
        return model

    def forecast(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The forecast `[B, Q, N]` in original units."""
        return self.model(batch["x"], batch["time"]) * self.std + self.mean

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if hasattr(self.model, "set_norm_decay"):
            model = cast(Any, self.model)
            steps = period(self.steps_per_epoch, None, model.norm_decay_epochs)
            model.set_norm_decay(self.global_step, steps)

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        return self.forecast(batch)

    def loss(self, batch: Mapping[str, Tensor], stage: str) -> tuple[Tensor, Tensor]:
        forecast = self.forecast(batch)
        if stage != "train":
            self.errors.update(forecast, batch["y"], batch["y_mask"])
        return self.error.sums(forecast, batch["y"], batch["y_mask"])

    def metrics(self, stage: str) -> dict[str, Tensor]:
        errors = self.errors.compute()
        self.errors.reset()
        if stage == "test":
            self.test_errors = {name: value.cpu() for name, value in errors.items()}
        return {name: errors[f"average_{name}"] for name in NAMES}

    def results(self, data: TrafficData) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        baselines: dict[str, Baseline] = {
            "last value": LastValue(),
            "time-of-day mean": TimeOfDayMean(data.steps_per_day),
            f"ridge on {data.history} lags": Ridge(),
        }
        metric = HorizonErrors(data.horizon, null_value=self.null_value, sync_on_compute=False)
        measured = {self.name: self.test_errors}
        measured |= baseline_errors(baselines, data.train_set, data.test_set, metric)
        return {
            "data": data.name,
            "split_windows": data.split_windows,
            "windows": {split: data.size(split) for split in ("train", "val", "test")},
            "interval_minutes": data.series.interval_minutes,
            "errors": {
                name: {
                    key: [round(v, 6) for v in values.flatten().tolist()] for key, values in errors.items()
                }
                for name, errors in measured.items()
            },
        }

    @property
    def name(self) -> str:
        return cast(Any, self.model).zoo_config["name"]

    def headline(self, results: dict[str, Any]) -> dict[str, float]:
        """Errors averaged over the horizon."""
        own = results["errors"][self.name]
        return {name.upper(): _error(own, name, None) for name in NAMES}

    def report(self, results: dict[str, Any]) -> Sequence[RenderableType]:
        steps, errors, own = _reported(results), results["errors"], self.name
        table = Table(
            "horizon",
            "forecast",
            "MAE",
            "RMSE",
            "MAPE",
            f"MAE of {own}",
            title="Test error, each horizon alone",
        )
        for label, step in [
            *((f"{minutes} min", step) for minutes, step in steps.items()),
            ("average", None),
        ]:
            for name in errors:
                mae, rmse, mape = (_error(errors[name], key, step) for key in ("mae", "rmse", "mape"))
                margin = "" if name == own else _lower(_error(errors[own], "mae", step), mae)
                style = "bold" if name == own else None
                table.add_row(label, name, f"{mae:.2f}", f"{rmse:.2f}", f"{mape:.1f} %", margin, style=style)
                label = ""
            table.add_section()
        return [table, *_verdict(results, steps, own)]

    def plots(self, data: TrafficData, results: dict[str, Any], folder: Path) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        from domains.traffic.plots import draw_results

        draw_results(self, data, results, folder)


def bind(model: nn.Module, data: TrafficData) -> None:
    """Give the model the sensor graph of `data`, if it uses one."""
    if hasattr(model, "bind"):
        cast(Any, model).bind(data.graph)


@torch.no_grad()
def carry_sensors(
    model: nn.Module, state: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> list[str]:
    """Set the parameters with one entry per sensor: those of `state` for known sensors, else freshly drawn.

    Returns:
        The names of these parameters.
    """
    built = cast(Any, model).zoo_config
    if "num_nodes" not in built["config"]:
        return []
    name = f"{built['domain']}/{built['name']}"
    fresh = create_model(name, **built["config"])
    with torch.device("meta"):
        larger = create_model(name, **(built["config"] | {"num_nodes": len(new) + 1}))
    shapes = {key: value.shape for key, value in larger.named_parameters()}
    place = {sensor: i for i, sensor in enumerate(old)}
    known = [(i, place[sensor]) for i, sensor in enumerate(new) if sensor in place]
    to, source = (
        torch.tensor(column, dtype=torch.long) for column in (zip(*known, strict=True) if known else ((), ()))
    )
    names = []
    for key, value in model.named_parameters():
        axes = [i for i, size in enumerate(value.shape) if shapes[key][i] != size]
        if axes:
            value.copy_(fresh.get_parameter(key))
            value.index_copy_(axes[0], to, state[key].index_select(axes[0], source))
            names.append(key)
    return names


def _reported(results: dict[str, Any]) -> dict[int, int]:
    """Minutes -> index of the horizon step: 15, 30 and 60 where they exist, else the last step."""
    interval = results["interval_minutes"]
    horizon = len(next(iter(results["errors"].values()))["mae"])
    steps = {m: m // interval - 1 for m in REPORTED_MINUTES if m % interval == 0 and m // interval <= horizon}
    return steps or {horizon * interval: horizon - 1}


def _error(errors: dict[str, list[float]], key: str, step: int | None) -> float:
    """The error at a horizon step, or over all steps together."""
    return errors[f"average_{key}"][0] if step is None else errors[key][step]


def _lower(own: float, other: float) -> str:
    gain = 100 * (1 - own / max(other, 1e-12))
    return f"{abs(gain):.1f} % {'lower' if gain >= 0 else 'higher'}"


def _verdict(results: dict[str, Any], steps: dict[int, int], own: str) -> list[str]:
    """One sentence per horizon: how the model stands to the best of the baselines."""
    errors, lines = results["errors"], []
    for minutes, step in steps.items():
        best = min((name for name in errors if name != own), key=lambda name: errors[name]["mae"][step])
        mae, other = errors[own]["mae"][step], errors[best]["mae"][step]
        margin = _lower(mae, other)
        lines.append(f"{minutes} min: MAE {mae:.2f}, {margin} than the best baseline ({best}, {other:.2f}).")
    return lines


def _difference(trained: Sequence[str], given: Sequence[str]) -> str:
    missing = [sensor for sensor in trained if sensor not in set(given)]
    new = [sensor for sensor in given if sensor not in set(trained)]
    if not missing and not new:
        return "the same sensors in another order; reorder the columns of the data as in training."
    return (
        f"it knows {len(trained)}, the data have {len(given)}; "
        f"only in the checkpoint: {', '.join(missing[:3]) or 'none'}; "
        f"only in the data: {', '.join(new[:3]) or 'none'}. "
        "Use the data it was trained on, or adapt it with zoo finetune."
    )
