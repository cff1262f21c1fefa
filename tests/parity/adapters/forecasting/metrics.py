"""The metrics of forecasts, and the comparison of models over tasks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from domains.forecasting.metrics import judge, relative_errors, scores, skill_scores, win_rates
from parity.fixture import Fixture


def run(fixture: Fixture) -> tuple[dict[str, Tensor], dict[str, Any]]:
    y, quantiles, point, past, lengths, errors = (
        tensor.numpy()
        for tensor in fixture.inputs("y_true", "q_pred", "y_pred", "y_past", "y_past_lengths", "task_errors")
    )
    config = fixture.spec["config"]
    histories = np.split(past, np.cumsum(lengths)[:-1])
    task = judge(
        y, quantiles, histories, season=config["seasonality"], levels=config["quantile_levels"], point=point
    )
    relative = relative_errors(pd.DataFrame(errors), baseline=0)  # pyright: ignore[reportArgumentType]
    values = {name: [value] for name, value in scores(task).items()}
    values |= {"win_rate": win_rates(relative).tolist(), "skill_score": skill_scores(relative).tolist()}
    return {f"output/{name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}, {}


ADAPTERS = {"metrics": run}
