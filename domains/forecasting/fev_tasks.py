"""Tasks of fev (forecast evaluation, fev-bench) on local data: its windows to forecast, its metrics.

Letters in shapes: D targets, T steps, H horizon steps, L quantile levels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from domains.forecasting.backtest import Item, SeriesSet, Window
from domains.forecasting.metrics import LEVELS
from zoo.errors import ConfigError, DataError, did_you_mean, require

METRICS = ("MASE", "WQL", "SQL")
"""That are shown of every task beside its own; the last two where it has quantile levels."""


@dataclass(frozen=True)
class FevTask:
    """A task, and the forecasts to make for it.

    Attributes:
        task: a `fev.Task`, with `METRICS` among its metrics.
        series: what the forecasts are of, for tables and pictures.
        windows: of all evaluation windows of the task, one after another.
        sizes: how many each of them has.
    """

    task: Any
    series: SeriesSet
    windows: list[Window]
    sizes: list[int]

    def summary(self, forecasts: Sequence[np.ndarray], levels: Sequence[float], name: str) -> dict[str, Any]:
        """What fev finds of forecasts `[D, H, L]` of all windows; json-able.

        Args:
            levels: the L ascending quantile levels, those of the task and 0.5 among them.
            name: of the forecaster.
        """
        places = {"predictions": levels.index(0.5)}
        places |= {str(level): levels.index(level) for level in self.task.quantile_levels}
        bounds = np.cumsum([0, *self.sizes])
        parts = [
            {
                column: [
                    {key: made[d, :, i].tolist() for key, i in places.items()} for made in forecasts[a:b]
                ]
                for d, column in enumerate(self.task.target_columns)
            }
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)  # noqa: RUF007
        ]
        return self.task.evaluation_summary(parts, model_name=name)


def read_tasks(path: str | Path) -> list[FevTask]:
    """The tasks of a YAML file, as `fev.Benchmark.from_yaml` reads them: a list under `tasks`, or one task.

    A relative `dataset_path` is looked for beside the file, too.

    Raises:
        ConfigError: a task that fev refuses.
        DataError: there is no such file, or no such data.
        MissingExtra: fev is not installed.
    """
    fev: Any = require("fev", "forecasting")
    logging.getLogger("fev").setLevel(logging.WARNING)
    path = Path(path)
    tasks, names = [], set()
    for place, settings in enumerate(_settings(path)):
        where = f"{path}, task {place + 1}"
        task = _with_metrics(fev, _local(settings, path, where), where)
        name, number = task.task_name.replace("/", "_") or "task", 1
        while (unique := name if number == 1 else f"{name}_{number}") in names:
            number += 1
        names.add(unique)
        tasks.append(_cut(task, unique, where))
    return tasks


def _settings(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        nearby = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"There is no file {path}.{did_you_mean(path.name, nearby)}")
    try:
        found = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no YAML: {str(error).splitlines()[0]}.") from None
    tasks = found.get("tasks", [found]) if isinstance(found, Mapping) else found
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, Mapping) for task in tasks):
        raise DataError(
            f"{path} holds no tasks of fev: 'tasks:' with a list of dataset_path, horizon, seasonality, ..."
        )
    return [dict(task) for task in tasks]


def _local(settings: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """The task with a path to its data that there is."""
    given = settings.get("dataset_path")
    if not given:
        raise ConfigError(f"{where} has no dataset_path.")
    if settings.get("dataset_config") is not None or "://" in str(given):
        return settings
    places = [Path(given), path.parent / given]
    for place in places:
        if any(place.parent.glob(place.name)):
            return settings | {"dataset_path": str(place)}
    raise DataError(f"{where}: there is no file {given}, neither here nor beside {path.name}.")


def _with_metrics(fev: Any, settings: dict[str, Any], where: str) -> Any:
    with _named(where, ConfigError):
        task = fev.Task(**settings)
        given = [task.eval_metric, *task.extra_metrics]
        named = {metric["name"] if isinstance(metric, Mapping) else metric for metric in given}
        wanted = METRICS if task.quantile_levels else METRICS[:1]
        extra = [*task.extra_metrics, *(metric for metric in wanted if metric not in named)]
        return fev.Task(**(task.to_dict() | {"extra_metrics": extra}))


@contextmanager
def _named(where: str, kind: type[Exception]):
    """What fev raises, of any kind, as an error of this one that says where."""
    try:
        yield
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise kind(f"{where}: {' '.join(lines[:3]) or type(error).__name__}") from error


def _cut(task: Any, name: str, where: str) -> FevTask:
    windows, sizes = [], []
    with _named(where, DataError):
        for window in task.iter_windows(num_proc=1):
            past, _ = window.get_input_data()
            found = _items(task, window.full_dataset, past, window.get_ground_truth())
            windows += [Window(item, cut, task.horizon) for item, cut in found]
            sizes.append(len(found))
    items = list({window.item.name: window.item for window in windows}.values())
    series = SeriesSet(name, items, task.seasonality, task.horizon, tuple(task.target_columns))
    return FevTask(task, series, windows, sizes)


def _items(task: Any, full: Any, past: Any, truth: Any) -> list[tuple[Item, int]]:
    """The series of an evaluation window up to the end of its horizon, and where the forecast starts."""
    place = {str(name): i for i, name in enumerate(full[task.id_column])}
    found = []
    for history, later in zip(past, truth, strict=True):
        record = full[place[str(history[task.id_column])]]
        stamps = pd.DatetimeIndex(history[task.timestamp_column])
        end = pd.DatetimeIndex(later[task.timestamp_column])[-1]
        own: Any = pd.DatetimeIndex(record[task.timestamp_column])
        part = slice(own.get_loc(stamps[0]), own.get_loc(end) + 1)
        target = np.stack([np.asarray(record[column][part], np.float64) for column in task.target_columns])
        item = Item(
            str(history[task.id_column]),
            target,
            {column: np.asarray(record[column][part]) for column in task.past_dynamic_columns},
            {column: np.asarray(record[column][part]) for column in task.known_dynamic_columns},
            own[part],
        )
        found.append((item, len(stamps)))
    return found


def levels_of(tasks: Sequence[FevTask]) -> list[float]:
    """All quantile levels of the tasks, the deciles among them."""
    return sorted({*LEVELS, *(level for one in tasks for level in one.task.quantile_levels)})
