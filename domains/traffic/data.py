"""Traffic data for training: a series and its graph, cut into windows of history and horizon."""

from __future__ import annotations

import inspect
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from domains.traffic.formats import read_series, write_series
from domains.traffic.graph import (
    EMBEDDINGS,
    SensorGraph,
    correlation_adjacency,
    read_adjacency,
    read_locations,
    read_se,
)
from domains.traffic.preprocessing import Preprocessing, stand_ins
from domains.traffic.series import TrafficSeries, listed, weekday
from domains.traffic.windows import PARTS, Windows, history_counts, split_rows, window_starts
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path
from zoo.training.data import DataModule

log = logging.getLogger(__name__)

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


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
