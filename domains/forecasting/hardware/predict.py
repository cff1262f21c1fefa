"""From a table of computers and trained weights to a table of scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import nn

from domains.forecasting.hardware.encode import Encoder
from domains.forecasting.hardware.metrics import METRICS, errors
from domains.forecasting.hardware.tables import SUFFIXES, read_table
from domains.forecasting.hardware.task import encoder_of
from zoo.cli.console import console
from zoo.devices import chosen_device
from zoo.errors import ConfigError
from zoo.files import atomic_path


def predict(model: nn.Module, facts: Mapping[str, Any], cfg: DictConfig) -> list[Path]:
    """Predict the scores of every row of `cfg.input`; write the table with them.

    Where the table holds the measured scores, too, the errors are shown, and drawn if asked for.

    Args:
        model: an NCPP in eval mode, as `zoo.load_model` returns it.
        facts: the `extra` stored with it, as `HardwareData.extra` makes it.
        cfg: as `configs/predict.yaml` with `configs/predict/forecasting/hardware.yaml`.

    Returns:
        The files written: the table, with a column `predicted TARGET` for each score, then the picture.

    Raises:
        DataError: a table that cannot be used; the message names column and row.
        CheckpointError: weights that do not say how they read tables.
        ConfigError: a setting that cannot be.
    """
    output = Path(cfg.output)
    if output.suffix not in SUFFIXES:
        raise ConfigError(f"output={output}: the suffix must be {' or '.join(SUFFIXES)}.")
    if not cfg.input:
        raise ConfigError("zoo predict needs rows to predict: input=FILE.")
    encoder, table = encoder_of(facts, "The checkpoint"), read_table(cfg.input)
    measured = _measured(encoder, table, str(cfg.input))
    if cfg.plots and measured is None:
        raise ConfigError(
            f"plots={cfg.plots}: a picture compares with the measured scores, and {cfg.input} has no column "
            f"{', '.join(encoder.columns.target)}."
        )
    scores = predicted(
        model, encoder, table, source=str(cfg.input), batch_size=cfg.batch_size, device=cfg.device
    )
    for i, name in enumerate(encoder.columns.target):
        table[f"predicted {name}"] = scores[:, i]
    with atomic_path(output) as part:
        if output.suffix == ".csv":
            table.to_csv(part, index=False)
        else:
            table.to_parquet(part, index=False)
    if measured is None:
        return [output]
    console.print(_error_table(encoder, measured, scores))
    if not cfg.plots:
        return [output]
    from domains.forecasting.hardware.plots import draw_scores

    picture = Path(cfg.plots) / "scores.png"
    draw_scores(measured, {"the model": scores}, picture, encoder, table)
    return [output, picture]


@torch.no_grad()
def predicted(
    model: nn.Module,
    encoder: Encoder,
    table: pd.DataFrame,
    *,
    source: str = "The table",
    batch_size: int = 256,
    device: str = "auto",
) -> np.ndarray:
    """The scores of every row in their own unit, `(R, targets)`."""
    place = chosen_device(device)
    model = model.to(place)
    inputs = encoder.inputs(table, source)
    parts = (torch.from_numpy(values).split(max(1, batch_size)) for values in (inputs.numbers, inputs.codes))
    scores = [model(numbers.to(place), codes.to(place)).cpu() for numbers, codes in zip(*parts, strict=True)]
    return encoder.unscaled(torch.cat(scores).numpy())


def _measured(encoder: Encoder, table: pd.DataFrame, source: str) -> np.ndarray | None:
    """The scores of the table; None if it lacks some."""
    if any(name not in table or table[name].isna().any() for name in encoder.columns.target):
        return None
    return encoder.scores(table, source)


def _error_table(encoder: Encoder, measured: np.ndarray, scores: np.ndarray) -> Table:
    shown = Table("score", *METRICS, title=f"Errors in {len(scores)} rows", title_justify="left")
    for i, name in enumerate(encoder.columns.target):
        values = errors(measured[:, i], scores[:, i]).values()
        shown.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values))
    return shown
