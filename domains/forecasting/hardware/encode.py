"""From columns to what the model reads, and back: scaling of numbers, codes of characters, range of scores.

All of it is fitted on training rows alone and stored with the weights.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd

from domains.forecasting.hardware.tables import Columns, numbers_of
from zoo.errors import ConfigError, DataError, did_you_mean

log = logging.getLogger(__name__)

SCALINGS = ("zscore", "minmax")
MISSING = ("error", "fill")
EPS = 1e-9
RANGE = 100.0
"""Scores of the training rows lie between 0 and this."""


@dataclass(frozen=True)
class Inputs:
    """What describes R rows, for the model.

    Attributes:
        numbers: float32 `(R, N)`, scaled.
        codes: int64 `(R, L)`, 0 where padded.
    """

    numbers: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Reads tables as the training rows were read.

    Attributes:
        columns: of the tables.
        centre, spread: `(N,)` of the columns of numbers: `(x - centre) / spread`; a spread of 0 stands for a
            column that was constant, which is always 0 to the model.
        characters: the characters of each group of texts; the first has the code 1.
        lengths: characters of each column of texts, by group.
        low, high: `(targets,)` the training scores' range, of their logarithm where `log_target`.
        log_target: scores are learnt by their logarithm.
        vocabulary: codes at most, padding included.
        missing: `error`; or `fill`: an empty number becomes the centre, an empty text no characters.
    """

    columns: Columns
    centre: np.ndarray
    spread: np.ndarray
    characters: dict[str, str]
    lengths: dict[str, list[int]]
    low: np.ndarray
    high: np.ndarray
    log_target: bool
    vocabulary: int
    missing: str

    @classmethod
    def fit(
        cls,
        table: pd.DataFrame,
        columns: Columns,
        *,
        scaling: str = "zscore",
        log_target: bool = False,
        missing: str = "error",
        vocabulary: int = 100,
        source: str = "The table",
    ) -> Self:
        """Learn scaling, characters and range of `table`, the training rows.

        Args:
            scaling: `zscore`, by mean and sample standard deviation; `minmax`, to 0 and 1.
            vocabulary: see above; rarer characters are left out.

        Raises:
            DataError: cells that cannot be used, or scores that are all the same.
            ConfigError: an unknown scaling or way with missing values, or no room for characters.
        """
        for key, value, known in (("scaling", scaling, SCALINGS), ("missing", missing, MISSING)):
            if value not in known:
                raise ConfigError(
                    f"data.{key}={value} is not one of {', '.join(known)}.{did_you_mean(str(value), known)}"
                )
        if vocabulary < 2:
            raise ConfigError(f"data.vocabulary={vocabulary}: padding and one character are the least.")
        values = _known(numbers_of(table, columns.numbers, source), columns.numbers, missing, source)
        centre, spread = _scale(values, columns.numbers, scaling)
        texts = {name: _texts(table, group, missing, source) for name, group in columns.text.items()}
        scores = _scores(table, columns, log_target, source)
        low, high = scores.min(0), scores.max(0)
        for name, least, most in zip(columns.target, low, high, strict=True):
            if least == most:
                raise DataError(f"{source}: every training row has the same {name!r}: nothing can be learnt.")
        return cls(
            columns=columns,
            centre=centre,
            spread=spread,
            characters={name: _characters(group, vocabulary) for name, group in texts.items()},
            lengths={name: [max(1, *map(len, text)) for text in group] for name, group in texts.items()},
            low=low,
            high=high,
            log_target=log_target,
            vocabulary=vocabulary,
            missing=missing,
        )

    # ---- tables to tensors ---------------------------------------------------------------------------------

    def inputs(self, table: pd.DataFrame, source: str = "The table") -> Inputs:
        """What the model reads of the rows; a text longer than all in training is cut, which is said.

        Raises:
            DataError: missing columns or cells that cannot be used.
        """
        self.check(table, source)
        values = _known(
            numbers_of(table, self.columns.numbers, source), self.columns.numbers, self.missing, source
        )
        centred = np.where(np.isnan(values), 0.0, values - self.centre)
        scaled = np.divide(centred, self.spread, out=np.zeros_like(centred), where=self.spread > 0)
        parts = [
            self._codes(text, column, name, length)
            for name, group in self.columns.text.items()
            for column, length, text in zip(
                group, self.lengths[name], _texts(table, group, self.missing, source), strict=True
            )
        ]
        codes = np.concatenate(parts, 1) if parts else np.zeros((len(table), 0), dtype=np.int64)
        return Inputs(scaled.astype(np.float32), codes)

    def check(self, table: pd.DataFrame, source: str) -> None:
        """Refuse a table without a column that the model reads."""
        for name in [*self.columns.numbers, *self.columns.texts]:
            if name not in table:
                hint = did_you_mean(name, table.columns)
                raise DataError(f"{source} has no column {name!r}, which the model reads.{hint}")

    def _codes(self, texts: Sequence[str], column: str, group: str, length: int) -> np.ndarray:
        """`(R, length)`; characters that training has not seen are left out."""
        code = {character: i + 1 for i, character in enumerate(self.characters[group])}
        known = [[code[c] for c in text if c in code] for text in texts]
        cut = sum(len(codes) > length for codes in known)
        if cut:
            log.warning(
                "%s texts of %r are longer than the %s characters of training: cut.", cut, column, length
            )
        found = np.zeros((len(texts), length), dtype=np.int64)
        for row, codes in enumerate(known):
            found[row, : len(codes)] = codes[:length]
        return found

    # ---- scores --------------------------------------------------------------------------------------------

    def scores(self, table: pd.DataFrame, source: str = "The table") -> np.ndarray:
        """The measured scores, in their own unit: float64 `(R, targets)`."""
        for name in self.columns.target:
            if name not in table:
                raise DataError(
                    f"{source} has no column {name!r}, the score.{did_you_mean(name, table.columns)}"
                )
        return _measured(table, self.columns, self.log_target, source)

    def scaled(self, scores: np.ndarray) -> np.ndarray:
        """Scores in the scale that is learnt, 0 to 100 in training."""
        values = np.log(scores) if self.log_target else scores
        return RANGE * (values - self.low) / (self.high - self.low)

    def unscaled(self, scaled: np.ndarray) -> np.ndarray:
        """Back to the unit of the scores."""
        values = np.asarray(scaled, dtype=np.float64) / RANGE * (self.high - self.low) + self.low
        return np.exp(values) if self.log_target else values

    # ---- with the weights ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Json-able."""
        return {
            "columns": self.columns.state(),
            "centre": self.centre.tolist(),
            "spread": self.spread.tolist(),
            "characters": self.characters,
            "lengths": self.lengths,
            "low": self.low.tolist(),
            "high": self.high.tolist(),
            "log_target": self.log_target,
            "vocabulary": self.vocabulary,
            "missing": self.missing,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Self:
        """From `state`."""
        arrays = {
            key: np.asarray(state[key], dtype=np.float64) for key in ("centre", "spread", "low", "high")
        }
        rest = {key: state[key] for key in ("characters", "lengths", "log_target", "vocabulary", "missing")}
        return cls(columns=Columns(**state["columns"]), **arrays, **rest)


def _known(values: np.ndarray, names: Sequence[str], missing: str, source: str) -> np.ndarray:
    gaps = np.isnan(values)
    if missing == "error" and gaps.any():
        column = int(gaps.any(0).argmax())
        row = int(gaps[:, column].argmax())
        raise DataError(
            f"{source}: column {names[column]!r} is empty in {int(gaps[:, column].sum())} rows, first in row "
            f"{row + 1}. Fill them, leave the column out, or set data.missing=fill."
        )
    return values


def _scale(values: np.ndarray, names: Sequence[str], scaling: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre and spread of each column; spread 0 where it is constant or has no value."""
    known = [column[~np.isnan(column)] for column in values.T]
    constant = [
        name for name, column in zip(names, known, strict=True) if not len(column) or np.ptp(column) == 0
    ]
    if constant:
        log.warning("Constant in the training rows, so that they tell nothing: %s", ", ".join(constant))
    centre, spread = np.zeros(len(names)), np.zeros(len(names))
    for i, column in enumerate(known):
        if names[i] in constant:
            centre[i] = column[0] if len(column) else 0.0
        elif scaling == "zscore":
            centre[i], spread[i] = column.mean(), column.std(ddof=1) + EPS
        else:
            centre[i], spread[i] = column.min(), np.ptp(column)
    return centre, spread


def _texts(table: pd.DataFrame, columns: Sequence[str], missing: str, source: str) -> list[list[str]]:
    """The texts of each column, in lower case."""
    found = []
    for column in columns:
        empty = table[column].isna().to_numpy()
        if missing == "error" and empty.any():
            raise DataError(
                f"{source}: column {column!r} is empty in {int(empty.sum())} rows, first in row "
                f"{int(empty.argmax()) + 1}. Fill them, leave the column out, or set data.missing=fill."
            )
        found.append([str(text).lower() for text in table[column].fillna("")])
    return found


def _characters(texts: Sequence[Sequence[str]], vocabulary: int) -> str:
    """The most frequent first; of equally frequent ones that which comes first."""
    counts = Counter(character for column in texts for text in column for character in text)
    return "".join(character for character, _ in counts.most_common(vocabulary - 1))


def _measured(table: pd.DataFrame, columns: Columns, log_target: bool, source: str) -> np.ndarray:
    values = _known_scores(numbers_of(table, columns.target, source), columns.target, source)
    if log_target and (values <= 0).any():
        row, column = (int(i) for i in np.argwhere(values <= 0)[0])
        raise DataError(
            f"{source}: {columns.target[column]!r} is {values[row, column]:g} in row {row + 1}, which has no "
            "logarithm: set data.log_target=false."
        )
    return values


def _scores(table: pd.DataFrame, columns: Columns, log_target: bool, source: str) -> np.ndarray:
    values = _measured(table, columns, log_target, source)
    return np.log(values) if log_target else values


def _known_scores(values: np.ndarray, names: Sequence[str], source: str) -> np.ndarray:
    gaps = np.isnan(values)
    if gaps.any():
        row, column = (int(i) for i in np.argwhere(gaps)[0])
        raise DataError(
            f"{source}: {names[column]!r} is empty in {int(gaps.any(1).sum())} rows, first in row {row + 1}: "
            "without a score nothing can be learnt from a row. Leave them out."
        )
    return values
