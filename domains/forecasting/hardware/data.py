"""Data of computers and their scores: tables, their split, and batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from omegaconf import Container, OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

from domains.forecasting.hardware.encode import Encoder
from domains.forecasting.hardware.simulate import COLUMNS, TARGET, TARGETS, simulate, simulate_runs
from domains.forecasting.hardware.tables import Columns, as_written, keys, numbers_of, read_table
from zoo.errors import ConfigError, DataError, did_you_mean
from zoo.files import atomic_path
from zoo.paths import cache_dir
from zoo.training.data import DataModule

NAMES = ("simulated", "simulated_runs", "file")
MOST_IN_BATCH = 64


class Batch(NamedTuple):
    """B rows."""

    numbers: Tensor
    """`(B, N)`"""
    codes: Tensor
    """`(B, L)`"""
    target: Tensor
    """`(B, targets)`, in the scale that is learnt."""
    rows: Tensor
    """`(B,)`, places in the data set."""


class HardwareRows(Dataset):
    """Rows of a table as the encoder reads them; gives whole batches."""

    def __init__(self, table: pd.DataFrame, encoder: Encoder, source: str) -> None:
        self.table = table
        self.measured = encoder.scores(table, source)
        inputs = encoder.inputs(table, source)
        self.numbers, self.codes = torch.from_numpy(inputs.numbers), torch.from_numpy(inputs.codes)
        self.target = torch.from_numpy(encoder.scaled(self.measured)).float()

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return Batch(self.numbers[rows], self.codes[rows], self.target[rows], rows)


class HardwareData(DataModule):
    """Rows that describe a computer and a workload, with one or several scores.

    One of `folds` parts is for the test and a share of the rest for validation; by rows, or with `leave_out`
    by whole machines, hosts or whatever that column names. All that is fitted is fitted on the training rows.

    Args:
        name: `simulated`, a row per computer with a score for every workload, or `simulated_runs`, a row per
            run; or `file`.
        path: CSV or Parquet, or a folder of them.
        test_path: test on this table instead of on a fold; without `path`, to evaluate trained weights on it.
        numeric: columns of numbers of each group, names or glob patterns; their order matters, as neighbours
            are seen together.
        text: columns of texts of each group.
        target: the column of the score, or several.
        workload: columns that name what was run, for the mean of the workload; None: group `workload_text`.
        log_target: learn the logarithm of the scores: relative errors count.
        scaling, vocabulary, missing: see `Encoder`.
        folds: parts; None: one for each value of `leave_out`.
        fold: the part to test on, from 0.
        leave_out: column, or several, whose values stay together in a part.
        validation: share of the rows, or of the values of `leave_out`, that are not for the test.
        machines, runs: size of the simulation.
        encoder: as stored with weights, instead of fitting one.
        batch_size: None: a tenth of the training rows, at most 64.
        num_workers, seed: see `DataModule`; the seed also draws the parts, and the simulation.

    Raises:
        ConfigError: an argument out of its range.
        DataError: in `setup`, if the table cannot be used.
    """

    encoder: Encoder
    train_set: HardwareRows
    val_set: HardwareRows
    test_set: HardwareRows

    def __init__(
        self,
        name: str = "simulated",
        path: str | Path | None = None,
        *,
        test_path: str | Path | None = None,
        numeric: Mapping[str, Sequence[str]] | None = None,
        text: Mapping[str, Sequence[str]] | None = None,
        target: str | Sequence[str] | None = None,
        workload: Sequence[str] | None = None,
        log_target: bool = False,
        scaling: str = "zscore",
        vocabulary: int = 100,
        missing: str = "error",
        folds: int | None = 5,
        fold: int = 0,
        leave_out: str | Sequence[str] | None = None,
        validation: float = 0.1,
        machines: int = 500,
        runs: int = 8,
        encoder: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size or MOST_IN_BATCH, num_workers=num_workers, seed=seed)
        if name not in NAMES:
            raise ConfigError(
                f"data.name={name} is not one of {', '.join(NAMES)}.{did_you_mean(name, NAMES)}"
            )
        if not 0 < validation < 1:
            raise ConfigError(f"data.validation={validation}: a share between 0 and 1 is needed.")
        self.name, self.path, self.test_path = name, path, test_path
        default = _of_simulation(name)
        self.asked: dict[str, Any] = {
            "numeric": _plain(numeric) or default["numeric"],
            "text": _plain(text) or default["text"],
            "target": _plain(target) or default["target"],
            "workload": _plain(workload),
        }
        self.fitting: dict[str, Any] = {
            "log_target": log_target,
            "scaling": scaling,
            "vocabulary": vocabulary,
            "missing": missing,
        }
        self.folds, self.fold, self.validation = folds, fold, validation
        self.leave_out = _names(_plain(leave_out))
        self.machines, self.runs = machines, runs
        self.given = None if encoder is None else Encoder.restored(_plain(encoder))
        self.automatic_batch = batch_size is None

    # ---- tables --------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode; once, whatever the stage."""
        if hasattr(self, "parts"):
            return
        self.parts = self._parts(stage)
        if self.given is not None:
            self.use(self.given)
        elif stage == "test" and not (
            any(self.asked["numeric"].values()) or any(self.asked["text"].values())
        ):
            return  # the weights to be evaluated know the columns
        elif "train" in self.parts:
            train, source = self.parts["train"], self.source
            columns = Columns.resolve(train, **self.asked, source=source)
            self.use(Encoder.fit(train, columns, **self.fitting, source=source))

    @property
    def source(self) -> str:
        """What to call the table in an error."""
        return str(self.path or "The simulated table")

    def _parts(self, stage: str | None) -> dict[str, pd.DataFrame]:
        """The table of each split."""
        if self.name == "file" and self.path is None:
            if self.test_path is None or stage != "test":
                raise ConfigError("data=hardware_file needs its table: data.path=FILE.")
            return {"test": read_table(self.test_path)}
        table = read_table(self.path or "") if self.name == "file" else self._simulated()
        places = split_rows(
            _together(table, self.leave_out, self.source),
            folds=self.folds,
            fold=self.fold,
            validation=self.validation,
            seed=self.seed,
            testing=self.test_path is None,
        )
        parts = {name: table.iloc[rows].reset_index(drop=True) for name, rows in places.items()}
        if self.test_path is not None:
            parts["test"] = read_table(self.test_path)
        return parts

    def _simulated(self) -> pd.DataFrame:
        if self.name == "simulated":
            return as_written(simulate(self.machines, self.seed))
        return as_written(simulate_runs(self.machines, self.runs, self.seed))

    def use(self, encoder: Encoder) -> None:
        """Read the tables by this encoder."""
        self.encoder = encoder
        for split, table in self.parts.items():
            path = self.test_path if split == "test" and self.test_path else self.source
            setattr(self, f"{split}_set", HardwareRows(table, encoder, str(path)))
        if self.automatic_batch and "train" in self.parts:
            self.batch_size = max(2, min(len(self.parts["train"]) // 10, MOST_IN_BATCH))

    @staticmethod
    def collate(samples: Batch) -> Batch:
        """The data set has made the batch."""
        return samples

    def model_kwargs(self) -> dict[str, Any]:
        """Groups and their sizes, and the numbers of scores and of character codes."""
        columns = self.encoder.columns
        return {
            "numeric": {name: len(group) for name, group in columns.numeric.items()},
            "text": {name: list(lengths) for name, lengths in self.encoder.lengths.items()},
            "num_targets": len(columns.target),
            "vocabulary": self.encoder.vocabulary,
        }

    def extra(self) -> dict[str, Any]:
        """What a checkpoint should say of what it was trained on; json-able."""
        return {"data": self.name, "encoder": self.encoder.state()}

    # ---- `zoo data` ----------------------------------------------------------------------------------------

    @staticmethod
    def make(output: Path | None = None, *, seed: int = 0, weeks: int | None = None) -> list[Path]:
        """Write the simulated table as `hardware.csv` into `output`, or else beside its cache."""
        if weeks is not None:
            raise ConfigError("A table of computers has no weeks.")
        path = (output or cache_dir() / "forecasting") / "hardware.csv"
        with atomic_path(path) as part:
            simulate(seed=seed).to_csv(part, index=False)
        return [path]

    @staticmethod
    def describe(path: Path, **reading: Any) -> tuple[dict[str, str], list[dict[str, str]]]:
        """Rows and columns of a table, and of each column whether it is of numbers or of texts."""
        if reading:
            raise ConfigError(f"There is no option {next(iter(reading))!r}: tables are read as they are.")
        table = read_table(path)
        facts = {"rows": str(len(table)), "columns": str(table.shape[1])}
        return facts, [_statistics(table, str(name)) for name in table]


def _statistics(table: pd.DataFrame, name: str) -> dict[str, str]:
    column: Any = table[name]
    found = {"column": name, "missing": str(int(column.isna().sum())), "values": str(column.nunique())}
    try:
        values = numbers_of(table, [name], name)[:, 0]
    except DataError:
        return found | {"kind": "text", "least": "", "most": "", "longest": str(int(column.str.len().max()))}
    if np.isnan(values).all():
        return found | {"kind": "empty", "least": "", "most": "", "longest": ""}
    extent = {"least": f"{np.nanmin(values):.6g}", "most": f"{np.nanmax(values):.6g}"}
    return found | {"kind": "number", **extent, "longest": ""}


def _of_simulation(name: str) -> dict[str, Any]:
    """The groups and scores of a simulated table; of another nothing is known."""
    if name == "file":
        return {"numeric": {}, "text": {}, "target": []}
    if name == "simulated_runs":
        return {**COLUMNS, "target": TARGET}
    text = {"system_text": COLUMNS["text"]["system_text"]}
    return {"numeric": COLUMNS["numeric"], "text": text, "target": list(TARGETS.values())}


# ---- splits ------------------------------------------------------------------------------------------------


def split_rows(
    keys: np.ndarray,
    *,
    folds: int | None,
    fold: int,
    validation: float,
    seed: int,
    testing: bool = True,
) -> dict[str, np.ndarray]:
    """Places of the rows of `train`, `val` and, unless `testing` is off, `test`; equal keys stay together.

    Args:
        keys: `(R,)`.
        folds: parts of the shuffled keys; None: one for each.

    Raises:
        ConfigError: a fold that does not exist, or fewer keys than parts.
    """
    names = np.random.default_rng(seed).permutation(np.unique(keys))
    count = len(names) if folds is None else folds
    least = max(3, count) if testing else 2
    if len(names) < least:
        raise ConfigError(f"{len(names)} rows, or values of data.leave_out, are too few for {least} parts.")
    if testing and count < 2:
        raise ConfigError(f"data.folds={count}: at least 2 are needed.")
    if testing and not 0 <= fold < count:
        raise ConfigError(f"data.fold={fold}: there are the folds 0 to {count - 1}.")
    held = np.array_split(names, count)[fold] if testing else names[:0]
    rest = names[~np.isin(names, held)]
    watched = rest[: min(len(rest) - 1, max(1, math.floor(validation * len(rest))))]
    parts = {"train": np.setdiff1d(rest, watched), "val": watched}
    parts |= {"test": held} if testing else {}
    return {name: np.flatnonzero(np.isin(keys, chosen)) for name, chosen in parts.items()}


def _together(table: pd.DataFrame, columns: Sequence[str], source: str) -> np.ndarray:
    """What must not be parted: the row itself, or the values of `columns`."""
    if not columns:
        return np.arange(len(table))
    for name in columns:
        if name not in table:
            raise DataError(
                f"{source} has no column {name!r} (data.leave_out).{did_you_mean(name, table.columns)}"
            )
    return keys(table, columns)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
