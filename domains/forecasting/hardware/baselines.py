"""Predictions that need no network: what NCPP is shown beside."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from domains.forecasting.hardware.encode import Encoder
from domains.forecasting.hardware.tables import keys

MEAN, WORKLOAD_MEAN, RIDGE, BOOSTING = "mean", "workload mean", "ridge", "boosting"
MOST_CATEGORIES = 200
"""Of one text that ridge and boosting tell apart; rarer ones count as one."""


def baselines(train: pd.DataFrame, test: pd.DataFrame, encoder: Encoder) -> dict[str, np.ndarray]:
    """Scores of the rows of `test`, `(R, targets)`, by name of the baseline.

    All learn from the scores in the scale that NCPP learns: the mean and the mean of the same workload (where
    columns name it), ridge regression and gradient-boosted trees on the scaled numbers and each text as a
    category.
    """
    known = encoder.scaled(encoder.scores(train))
    found = {MEAN: np.broadcast_to(known.mean(0), (len(test), known.shape[1]))}
    if encoder.columns.workload:
        found[WORKLOAD_MEAN] = _mean_of_workload(train, test, known, encoder)
    x, x_test = _features(train, test, encoder)
    for name, build in ((RIDGE, _ridge), (BOOSTING, _boosting)):
        columns = [build().fit(x, y).predict(x_test) for y in known.T]
        found[name] = np.stack(columns, axis=1)
    return {name: encoder.unscaled(scores) for name, scores in found.items()}


def _mean_of_workload(
    train: pd.DataFrame, test: pd.DataFrame, known: np.ndarray, encoder: Encoder
) -> np.ndarray:
    """The overall mean where a workload was not seen."""
    of_train, of_test = (keys(table, encoder.columns.workload) for table in (train, test))
    names, places = np.unique(of_train, return_inverse=True)
    sums = np.zeros((len(names), known.shape[1]))
    np.add.at(sums, places, known)
    means = dict(zip(names, sums / np.bincount(places)[:, None], strict=True))
    return np.stack([means.get(name, known.mean(0)) for name in of_test])


def _features(train: pd.DataFrame, test: pd.DataFrame, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Scaled numbers, and an indicator of each category."""
    from sklearn.preprocessing import OneHotEncoder

    parts = [(encoder.inputs(table).numbers for table in (train, test))]
    if texts := encoder.columns.texts:
        options: dict[str, Any] = {"max_categories": MOST_CATEGORIES, "handle_unknown": "infrequent_if_exist"}
        categories = OneHotEncoder(sparse_output=False, **options)
        named = [table[texts].fillna("").astype(str) for table in (train, test)]
        parts.append((categories.fit_transform(named[0]), categories.transform(named[1])))  # pyright: ignore
    x, x_test = (np.concatenate(side, axis=1) for side in zip(*parts, strict=True))
    return x, x_test


def _ridge() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=np.logspace(-3, 3, 13))


def _boosting() -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor

    return HistGradientBoostingRegressor(random_state=0)
