"""Traffic data for training: a series and its graph, cut into windows of history and horizon.

Letters in shapes: B samples, P history steps, Q horizon steps, N sensors, C input channels, T rows of the
series.
"""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from domains.traffic.formats import read_series, write_series
from domains.traffic.graph import (
    EMBEDDINGS,
    SensorGraph,
    correlation_adjacency,
    read_adjacency,
    read_locations,
    read_se,
)
from domains.traffic.series import TrafficSeries, listed, time_features, weekday
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path
from zoo.training.data import DataModule

log = logging.getLogger(__name__)

MISSING = ("zero", "nan", "mask")
PARTS = ("train", "val", "test")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


# ---- from readings to inputs and targets -------------------------------------------------------------------


@dataclass
class Preprocessing:
    """How readings in the units of the file become inputs and targets; stored in checkpoints.

    Attributes:
        channels: names of the input channels; the first is the target.
        missing: `zero` writes missing readings as 0, which then enters the input like any value (the
            published programs); `nan` writes the mean of the training data; `mask` does, too, and adds a last
            channel that is 1 where a reading is real.
        fill: `forward` carries the last real reading of a sensor over missing inputs; `none` does not.
        null_value: a reading of this value is missing, as NaN always is; None when every number is real.
        mean: of each input channel over the training windows, in the units of the file.
        std: its population standard deviation.
        weekdays: for each day of the week the one that stands for it, see `stand_ins`.
    """

    channels: list[str]
    missing: str = "zero"
    fill: str = "none"
    null_value: float | None = 0.0
    mean: list[float] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    weekdays: list[int] = field(default_factory=lambda: list(range(7)))

    def __post_init__(self) -> None:
        for name, options in (("missing", MISSING), ("fill", ("none", "forward"))):
            value = getattr(self, name)
            if value not in options:
                raise ConfigError(
                    f"data.{name}={value} is not one of {', '.join(options)}.{did_you_mean(value, options)}"
                )

    @property
    def in_channels(self) -> int:
        """Channels of the input, the mask included."""
        return len(self.channels) + (self.missing == "mask")

    def observed(self, values: np.ndarray) -> np.ndarray:
        """True where `values` holds a real reading."""
        real = ~np.isnan(values)
        return real if self.null_value is None else real & (values != np.float32(self.null_value))

    def fit(self, values: np.ndarray, weights: np.ndarray, source: str) -> None:
        """Set mean and standard deviation of the inputs.

        Args:
            values: `[T, N, C]` in the order of `channels`.
            weights: `[T]` how many training windows hold the row in their history.

        Raises:
            DataError: there is no real reading, or all are alike.
        """
        filled = self._filled(values)
        counted = np.ones_like(filled, dtype=bool) if self.missing == "zero" else self.observed(filled)
        for c, channel in enumerate(self.channels):
            weight = weights[:, None] * counted[:, :, c]
            total = weight.sum()
            if total == 0:
                raise DataError(f"{source}: channel {channel!r} has no readings in the training part.")
            readings = np.where(counted[:, :, c], filled[:, :, c], 0).astype(np.float64)
            mean = (weight * readings).sum() / total
            std = np.sqrt((weight * np.square(readings - mean)).sum() / total)
            if std <= 1e-6 * abs(mean):
                raise DataError(
                    f"{source}: every reading of channel {channel!r} in the training part is {mean:g}, so "
                    "it cannot be scaled (standard deviation 0)."
                )
            self.mean.append(float(mean))
            self.std.append(float(std))

    def inputs(self, values: np.ndarray) -> Tensor:
        """`[T, N, C]` readings to scaled inputs: float32 `[T, N]` of one channel, else `[T, N, C]`."""
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        filled = self._filled(values)
        if self.missing != "zero":
            filled = np.where(self.observed(filled), filled, mean)
        scaled = (filled - mean) / std
        if self.missing == "mask":
            real = self.observed(values[:, :, :1]).astype(np.float32)
            scaled = np.concatenate([scaled, real], axis=2)
        return torch.from_numpy(np.ascontiguousarray(scaled[:, :, 0] if scaled.shape[2] == 1 else scaled))

    def time(self, timestamps: np.ndarray, interval_minutes: int) -> Tensor:
        """`[T, 2]` int64: day of week (or the one that stands for it) and slot of the day."""
        features = time_features(timestamps, interval_minutes)
        features[:, 0] = np.asarray(self.weekdays)[features[:, 0]]
        return torch.from_numpy(features)

    def _filled(self, values: np.ndarray) -> np.ndarray:
        if self.fill == "forward":
            rows = np.arange(len(values))[:, None, None]
            last = np.maximum.accumulate(np.where(self.observed(values), rows, 0), axis=0)
            values = np.take_along_axis(values, last, axis=0)
        return np.nan_to_num(values) if self.missing == "zero" else values


def stand_ins(seen: Collection[int]) -> list[int]:
    """For each day of the week (Monday = 0) the latest `seen` one up to it, of its kind (working day or
    weekend) if there is any: what a model was never trained on would mean nothing to it."""

    def apart(day: int, other: int) -> tuple[bool, int]:
        return (day > 4) != (other > 4), (day - other) % 7

    return [min(seen, key=lambda other, day=day: apart(day, other)) for day in range(7)]


# ---- from rows to windows ----------------------------------------------------------------------------------


def split_rows(
    num_rows: int, history: int, horizon: int, split: Sequence[float], windows: str
) -> dict[str, tuple[int, int]]:
    """Row ranges of the three parts; the windows of a part are all those inside its range.

    Args:
        split: shares of train, val and test, in any unit (`0.7, 0.1, 0.2` or `34, 5, 5` days).
        windows: `inside` divides the rows first, so that no window crosses a border (GMAN): train is the
            first `round(0.7 T)` rows, test the last `round(0.2 T)`. `across` divides the list of all windows
            in the same way (DCRNN, Graph WaveNet, BasicTS), so that windows look back over the border.

    Raises:
        ConfigError: not three shares, or another word for `windows`.
    """
    if len(split) != 3 or min(split) <= 0:
        raise ConfigError(
            f"data.split={list(split)}: three positive shares for train, val and test are expected."
        )
    if windows not in ("inside", "across"):
        raise ConfigError(f"data.split_windows={windows} is not one of inside, across.")
    overlap = 0 if windows == "inside" else history + horizon - 1
    count = num_rows - overlap
    train, test = round(split[0] / sum(split) * count), round(split[2] / sum(split) * count)
    borders = (0, train, count - test, count)
    return {part: (borders[i], borders[i + 1] + overlap) for i, part in enumerate(PARTS)}


def window_starts(rows: tuple[int, int], length: int, jumps: np.ndarray) -> np.ndarray:
    """First rows of the windows of `length` inside a range of rows that hold no jump of the clock."""
    starts = np.arange(rows[0], rows[1] - length + 1)
    jumps_before = np.searchsorted(jumps, [starts, starts + length - 1], side="right")
    return starts[jumps_before[0] == jumps_before[1]]


def history_counts(starts: np.ndarray, history: int, num_rows: int) -> np.ndarray:
    """`[T]`: in how many windows each row is part of the history."""
    change = (
        np.bincount(starts, minlength=num_rows + 1)
        - np.bincount(starts + history, minlength=num_rows + 1)[: num_rows + 1]
    )
    return change.cumsum()[:num_rows]


class Windows(Dataset):
    """Windows as views on the tensors of a series; a batch is one gather from each.

    Args:
        inputs: `[T, N]` or `[T, N, C]` scaled.
        targets: `[T, N]` in the units of the file, 0 where missing.
        observed: `[T, N]` True where the target is real.
        time: `[T, 2]` day of week and slot of day.
        starts: `[S]` first row of each window.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        observed: Tensor,
        time: Tensor,
        starts: Tensor,
        history: int,
        horizon: int,
    ) -> None:
        self.inputs, self.targets, self.observed, self.time, self.starts = (
            inputs,
            targets,
            observed,
            time,
            starts,
        )
        self.history, self.horizon = history, horizon
        self._steps = torch.arange(history + horizon)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = int(self.starts[index])
        now, end = start + self.history, start + self.history + self.horizon
        return {
            "x": self.inputs[start:now],
            "y": self.targets[now:end],
            "y_mask": self.observed[now:end],
            "time": self.time[start:end],
        }

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch of these windows: x `[B, P, N(, C)]`, y and y_mask `[B, Q, N]`, time `[B, P+Q, 2]`."""
        rows = self.starts[torch.as_tensor(indices)][:, None] + self._steps
        past, future = rows[:, : self.history], rows[:, self.history :]
        return {
            "x": self.inputs[past],
            "y": self.targets[future],
            "y_mask": self.observed[future],
            "time": self.time[rows],
        }


# ---- the data module ---------------------------------------------------------------------------------------


class TrafficData(DataModule):
    """Windows of a traffic series for training, validation and test.

    After `setup`: `series`, `graph`, `preprocessing`, `parts` (row ranges), `mean`, `std` (of the target),
    `steps_per_day`, and the three `Windows`.

    Args:
        name: of the data set, for reports; `simulated` without a path is the embedded data.
        path: a file or folder that `read_series` reads.
        adjacency: a file that `read_adjacency` reads; without one, edges join correlated sensors.
        adjacency_rule: its `rule`.
        locations: a file that `read_locations` reads.
        spatial_embedding: a word2vec text file, or `auto`, `node2vec`, `laplacian` (see `SensorGraph`).
        history: steps P that a model sees.
        horizon: steps Q that it forecasts.
        split: shares of train, val and test; None takes the split of the file, else 70/10/20.
        split_windows: `across` or `inside`, see `split_rows`.
        target: name of the channel to forecast; None is the first.
        channels: names of further input channels.
        missing, fill, null_value: see `Preprocessing`.
        dead_sensors: `error`, `drop` or `keep` sensors that never report.
        format, key, start, interval_minutes, weekdays_only, sensor_ids, columns, header, gaps: see
            `read_series`.
        weeks: length of the simulated data.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the files cannot be used.
    """

    series: TrafficSeries
    graph: SensorGraph
    preprocessing: Preprocessing
    parts: dict[str, tuple[int, int]]
    train_set: Windows
    val_set: Windows
    test_set: Windows

    def __init__(
        self,
        name: str = "simulated",
        path: str | Path | None = None,
        *,
        adjacency: str | Path | None = None,
        adjacency_rule: str = "auto",
        locations: str | Path | None = None,
        spatial_embedding: str = "auto",
        history: int = 12,
        horizon: int = 12,
        split: Sequence[float] | None = None,
        split_windows: str = "across",
        target: str | None = None,
        channels: Sequence[str] = (),
        missing: str = "zero",
        fill: str = "none",
        null_value: float | None = 0.0,
        dead_sensors: str = "error",
        format: str = "auto",
        key: str | None = None,
        start: str | None = None,
        interval_minutes: int | None = None,
        weekdays_only: bool | None = None,
        sensor_ids: str | Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
        header: bool | None = None,
        gaps: str = "error",
        weeks: int = 4,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, seed=seed)
        if history < 1 or horizon < 1:
            raise ConfigError(f"data.history={history} and data.horizon={horizon} must be at least 1.")
        if dead_sensors not in ("error", "drop", "keep"):
            raise ConfigError(f"data.dead_sensors={dead_sensors} is not one of error, drop, keep.")
        self.name, self.path, self.weeks = name, path, weeks
        self.reading: dict[str, Any] = {
            "format": format,
            "key": key,
            "start": start,
            "interval_minutes": interval_minutes,
            "weekdays_only": weekdays_only,
            "sensor_ids": sensor_ids,
            "columns": columns,
            "header": header,
            "gaps": gaps,
        }
        self.adjacency, self.adjacency_rule, self.locations = adjacency, adjacency_rule, locations
        self.spatial_embedding, self.dead_sensors = spatial_embedding, dead_sensors
        self.history, self.horizon, self.split, self.split_windows = history, horizon, split, split_windows
        self.target, self.channels = target, list(channels)
        self.missing, self.fill, self.null_value = missing, fill, null_value

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and scale; once, whatever the stage."""
        if hasattr(self, "train_set"):
            return
        series = read_series(self._find(), **self.reading)
        if self.dead_sensors == "error":
            series.check_dead_sensors()
        graph = self._read_graph(series)
        if self.dead_sensors == "drop":
            series, graph = _without_dead_sensors(series, graph)
        self.series, self.graph = series, graph
        self._cut(self._channels())

    def prepare_data(self) -> None:
        """Make the embedded data, if they are what is asked for and not in the cache yet."""
        self._find()

    def _find(self) -> str | Path:
        """The series file; the embedded data bring their own graph."""
        if self.path is None and self.name != "simulated":
            raise ConfigError(f"data.name={self.name} needs its file: set data.path=FILE.")
        if self.path is None:
            self.path, self.adjacency, self.locations = _embedded(self.weeks)
        return self.path

    def _read_graph(self, series: TrafficSeries) -> SensorGraph:
        ids, choice = series.sensor_ids, self.spatial_embedding
        is_file = choice not in EMBEDDINGS
        if is_file and not Path(choice).exists():
            raise DataError(
                f"data.spatial_embedding={choice} is no file, and not one of {', '.join(EMBEDDINGS)}."
                + did_you_mean(choice, EMBEDDINGS)
            )
        return SensorGraph(
            ids,
            adjacency=read_adjacency(self.adjacency, ids, rule=self.adjacency_rule)
            if self.adjacency
            else None,
            coordinates=read_locations(self.locations, ids) if self.locations else None,
            embedding_table=read_se(choice, len(ids)) if is_file else None,
            embedding="file" if is_file else choice,
            seed=self.seed,
            source=str(choice if is_file else self.adjacency),
        )

    def _channels(self) -> list[str]:
        """Input channels, the target first."""
        known = self.series.channels
        wanted = [self.target or known[0], *self.channels]
        for channel in wanted:
            if channel not in known:
                raise DataError(
                    f"{self.series.source} has no channel {channel!r}; it has {', '.join(known)}."
                    + did_you_mean(channel, known)
                )
        return list(dict.fromkeys(wanted))

    def _cut(self, channels: list[str]) -> None:
        series, length = self.series, self.history + self.horizon
        values = series.values[:, :, [series.channels.index(channel) for channel in channels]]
        if self.split is None and series.parts is not None:
            self.parts = series.parts
        else:
            split = self.split or (0.7, 0.1, 0.2)
            self.parts = split_rows(len(values), self.history, self.horizon, split, self.split_windows)
        jumps = series.jumps()
        starts = {part: window_starts(rows, length, jumps) for part, rows in self.parts.items()}
        self._check_windows(starts)

        self.preprocessing = Preprocessing(channels, self.missing, self.fill, self.null_value)
        self.preprocessing.fit(
            values, history_counts(starts["train"], self.history, len(values)), series.source
        )
        self._name_weekdays(starts["train"])
        self._report_missing(values[:, :, 0])
        if self.graph.adjacency is None:
            self._join_correlated(values[:, :, 0])

        inputs = self.preprocessing.inputs(values)
        observed = self.preprocessing.observed(values[:, :, 0])
        targets = torch.from_numpy(np.where(observed, values[:, :, 0], np.float32(0)))
        time = self.preprocessing.time(series.timestamps, series.interval_minutes)
        self.train_set, self.val_set, self.test_set = (
            Windows(
                inputs,
                targets,
                torch.from_numpy(observed),
                time,
                torch.from_numpy(starts[part]),
                self.history,
                self.horizon,
            )
            for part in PARTS
        )

    def _check_windows(self, starts: dict[str, np.ndarray]) -> None:
        for part, first in starts.items():
            if not len(first):
                begin, end = self.parts[part]
                raise DataError(
                    f"{self.series.source} has {len(self.series.values)} steps, {max(0, end - begin)} of "
                    f"them in the {part} part; one window needs {self.history + self.horizon} in a row "
                    f"(history {self.history} + horizon {self.horizon}). Lower data.history or "
                    "data.horizon, or give more data."
                )

    def _name_weekdays(self, train_starts: np.ndarray) -> None:
        """Let days of the week that no training window holds be taken for others."""
        days = weekday(self.series.timestamps)
        length = self.history + self.horizon
        seen = np.unique(days[np.unique(train_starts[:, None] + np.arange(length))]).tolist()
        self.preprocessing.weekdays = stand_ins(seen)
        if unseen := sorted(set(days.tolist()) - set(seen)):
            log.warning(
                "%s: days of the week that the training part does not have: %s.",
                self.series.source,
                ", ".join(
                    f"{DAYS[day]} (taken for {DAYS[self.preprocessing.weekdays[day]]})" for day in unseen
                ),
            )

    def _report_missing(self, target: np.ndarray) -> None:
        """Refuse a part without targets; say once where readings are missing."""
        observed = self.preprocessing.observed(target)
        for part, (begin, end) in self.parts.items():
            if not observed[begin + self.history : end].any():
                raise DataError(
                    f"{self.series.source}: every target of the {part} part (rows {begin} to {end}) is "
                    "missing."
                )
        log.info("%s: %.2f %% of the readings are missing", self.series.source, 100 * (1 - observed.mean()))
        if np.isnan(target).any():
            row, sensor, steps = longest_run(np.isnan(target))
            log.warning(
                "%s: %.2f %% of the readings are NaN; the longest block is sensor %s, rows %d to %d. They "
                "are treated as missing (data.missing=%s).",
                self.series.source,
                100 * np.isnan(target).mean(),
                self.series.sensor_ids[sensor],
                row,
                row + steps - 1,
                self.missing,
            )

    def _join_correlated(self, target: np.ndarray) -> None:
        """Edges from the training readings, where no file has any."""
        begin, end = self.parts["train"]
        readings = np.where(self.preprocessing.observed(target), target, np.nan)[begin:end]
        self.graph.adjacency = correlation_adjacency(readings)
        if self.graph.embedding_table is None:
            self.graph.source = "correlations of the training part"

    @staticmethod
    def collate(samples: Any) -> Any:
        """`Windows.__getitems__` has made the batch already."""
        return samples

    @property
    def mean(self) -> float:
        """Mean of the target channel, in the units of the file."""
        return self.preprocessing.mean[0]

    @property
    def std(self) -> float:
        """Standard deviation of the target channel."""
        return self.preprocessing.std[0]

    @property
    def steps_per_day(self) -> int:
        return self.series.steps_per_day

    def model_kwargs(self) -> dict[str, Any]:
        """What the data decide of a model's arguments."""
        return {
            "num_nodes": len(self.series.sensor_ids),
            "history": self.history,
            "horizon": self.horizon,
            "steps_per_day": self.steps_per_day,
            "in_channels": self.preprocessing.in_channels,
        }

    def extra(self) -> dict[str, Any]:
        """What a checkpoint must know of the data to forecast from new readings; json-able."""
        coordinates = self.graph.coordinates
        return {
            "data": self.name,
            "sensor_ids": self.series.sensor_ids,
            "interval_minutes": self.series.interval_minutes,
            "history": self.history,
            "horizon": self.horizon,
            "channels": self.preprocessing.channels,
            "mean": self.mean,
            "std": self.std,
            "null_value": self.null_value,
            "preprocessing": asdict(self.preprocessing),
            "split_windows": self.split_windows,
            "spatial_embedding": f"{self.graph.embedding_method} ({self.graph.source})",
            "coordinates": None if coordinates is None else coordinates.tolist(),
        }

    # ---- `zoo data` --------------------------------------------------------------------------------------

    @staticmethod
    def make(output: Path | None = None, *, weeks: int = 4, seed: int = 0) -> list[Path]:
        """Make the embedded data; the files are in `output`, or else in the cache."""
        files = _embedded(weeks, seed)
        if output is None:
            return list(files)
        for file in files:
            with atomic_path(output / file.name) as part:
                shutil.copyfile(file, part)
        return [output / file.name for file in files]

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """What a file holds: facts by name, and one row of statistics per channel."""
        series = read_series(path, **_checked({"gaps": "keep", **reading}))
        return series.facts(), series.statistics()

    @staticmethod
    def convert(source: Path, target: Path, **reading: Any) -> TrafficSeries:
        """Read any format and write h5, npz, csv or parquet, by the suffix of `target`."""
        series = read_series(source, **_checked(reading))
        write_series(series, target)
        return series


def _embedded(weeks: int, seed: int = 0) -> tuple[Path, Path, Path]:
    """Series, adjacency and locations of the embedded data, made if they are not in the cache."""
    from domains.traffic.simulate import ADJACENCY_FILE, LOCATIONS_FILE, make

    path = make(weeks, seed)
    return path, path.with_name(ADJACENCY_FILE), path.with_name(LOCATIONS_FILE)


def _checked(reading: dict[str, Any]) -> dict[str, Any]:
    known = [name for name in inspect.signature(read_series).parameters if name != "path"]
    for name in reading:
        if name not in known:
            raise ConfigError(
                f"There is no option {name!r}.{did_you_mean(name, known)} Options: {', '.join(known)}."
            )
    return reading


def longest_run(flags: np.ndarray) -> tuple[int, int, int]:
    """First row, column and length of the longest run of True down a column of `[T, N]`."""
    rows = np.arange(len(flags))[:, None]
    before = np.maximum.accumulate(np.where(flags, -1, rows), axis=0)
    length = np.where(flags, rows - before, 0)
    row, column = np.unravel_index(length.argmax(), length.shape)
    steps = int(length[row, column])
    return int(row) - steps + 1, int(column), steps


def _without_dead_sensors(series: TrafficSeries, graph: SensorGraph) -> tuple[TrafficSeries, SensorGraph]:
    dead = series.dead_sensors()
    if not dead:
        return series, graph
    log.warning("%s: left out %s that never report", series.source, listed(dead, "sensor"))
    alive = [sensor for sensor in series.sensor_ids if sensor not in set(dead)]
    return series.select(alive), graph.select(alive)
