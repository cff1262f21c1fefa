"""Errors of predicted scores."""

from __future__ import annotations

import numpy as np

LIMITS = (3, 5, 10)
"""Percent."""
PERCENTILES = (90, 95, 99)

METRICS = (
    *("MAE", "MSE", "RMSE", "MAPE"),
    *(f"APE<{limit}" for limit in LIMITS),
    *(f"P{percentile} APE" for percentile in PERCENTILES),
)
"""MAE, MSE and RMSE in the unit of the score; the others in percent."""


def absolute_percentage_errors(measured: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """`100 |predicted - measured| / |measured|` of the rows whose score is not 0."""
    known = measured != 0
    return 100 * np.abs(predicted[known] - measured[known]) / np.abs(measured[known])


def errors(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float | None]:
    """All of `METRICS` over the rows `(R,)`; a row whose score is 0 has no percentage error.

    Shares with an error below a limit, and percentiles of it, as Li et al. 2024 report them. None stands for
    percentages where every score is 0, and for all where there are no rows.
    """
    if not len(measured):
        return dict.fromkeys(METRICS)
    difference = np.abs(predicted - measured)
    mse = float(np.square(difference).mean())
    found: dict[str, float | None] = {"MAE": float(difference.mean()), "MSE": mse, "RMSE": mse**0.5}
    ape = absolute_percentage_errors(measured, predicted)
    if not len(ape):
        return found | {name: None for name in METRICS if name not in found}
    found["MAPE"] = float(ape.mean())
    found |= {f"APE<{limit}": float(100 * (ape < limit).mean()) for limit in LIMITS}
    return found | {f"P{p} APE": float(np.percentile(ape, p)) for p in PERCENTILES}
