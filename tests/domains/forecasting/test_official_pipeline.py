"""The same numbers as the package `chronos-forecasting`, on drawn models and awkward series.

The cases are a sample of a longer search (a thousand drawn cases of `drawn_case`).
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import zoo
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.weights import save_folder

chronos = pytest.importorskip("chronos")
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = (1, 2, 5, 16, 17, 31, 50, 100, 150)


def pair(rng: np.random.Generator, folder: Path) -> tuple[Forecaster, Any]:
    """A forecaster with a drawn model, and the official pipeline of the same weights."""
    torch.manual_seed(int(rng.integers(1000)))
    model: Any = zoo.create_model(
        "chronos2",
        d_model=int(rng.choice([16, 32])),
        d_kv=int(rng.choice([4, 8])),
        d_ff=32,
        num_layers=int(rng.integers(1, 4)),
        num_heads=int(rng.choice([1, 2, 4])),
        initializer_factor=0.4,
        activation=str(rng.choice(["relu", "gelu_new"])),
        context_length=int(rng.choice([64, 100, 128])),
        patch_size=int(rng.choice([8, 16])),
        max_output_patches=int(rng.choice([1, 2, 64])),
        use_arcsinh=bool(rng.random() < 0.8),
        quantiles=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9) if rng.random() < 0.2 else zoo_quantiles(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_folder(model, folder)
        return Forecaster(model), chronos.Chronos2Pipeline.from_pretrained(str(folder), device_map="cpu")


def zoo_quantiles() -> tuple[float, ...]:
    from domains.forecasting.models.chronos2 import QUANTILES

    return QUANTILES


def series(rng: np.random.Generator, steps: int, variates: int = 1) -> np.ndarray:
    """Walks, constants, large and whole numbers, with values, stretches or rows missing: float32 `(v, T)`."""
    kind = rng.choice(["walk", "walk", "constant", "large", "whole", "missing"])
    x = rng.standard_normal((variates, steps)).cumsum(-1)
    if kind == "constant":
        x[:] = x[:, :1] * rng.choice([1, 100])
    elif kind == "large":
        x = x * 1e4 + 1e5
    elif kind == "whole":
        x = np.round(3 * x)
    x = x.astype(np.float32)
    if rng.random() < 0.4:
        x[rng.random(x.shape) < rng.choice([0.05, 0.5, 0.95])] = np.nan
    if rng.random() < 0.3:
        x[:, rng.integers(steps) :][:, :40] = np.nan
    if kind == "missing":
        x[rng.integers(variates)] = np.nan
    return x


def covariate(rng: np.random.Generator, kind: str, steps: int, *, ahead: bool = False) -> np.ndarray:
    if kind == "number":
        return series(rng, steps)[0]
    if kind == "flag":
        return rng.random(steps) < 0.5
    names = rng.choice(["u", "v", "w", *(["new"] if ahead else [])], steps).astype(object)
    names[rng.random(steps) < 0.1] = None
    return names


def drawn_dicts(rng: np.random.Generator, lengths: list[int], horizon: int) -> list[dict[str, Any]]:
    kinds = {name: rng.choice(["number", "flag", "text"]) for name in "zab" if rng.random() < 0.7}
    known = {name: rng.random() < 0.8 for name in kinds if rng.random() < 0.6}
    variates = int(rng.choice([1, 1, 3]))
    return [
        {
            "target": series(rng, steps, variates),
            "past_covariates": {name: covariate(rng, kind, steps) for name, kind in kinds.items()},
            "future_covariates": {
                name: covariate(rng, kinds[name], horizon, ahead=True) if given else None
                for name, given in known.items()
            },
        }
        for steps in lengths
    ]


def drawn_case(seed: int, folder: Path) -> tuple[Forecaster, Any, Any, int, dict[str, Any]]:
    """Both contestants, inputs, horizon and options."""
    rng = np.random.default_rng(seed)
    ours, theirs = pair(rng, folder)
    horizon = int(rng.choice([1, 7, 30, 60]))
    lengths = [int(rng.choice(LENGTHS)) for _ in range(rng.integers(1, 7))]
    form = ("list", "array", "dicts", "dicts")[seed % 4]
    if form == "dicts":
        inputs: Any = drawn_dicts(rng, lengths, horizon)
    elif form == "array":
        inputs = np.stack([series(rng, lengths[0], 2) for _ in lengths])
    else:
        inputs = [series(rng, steps, int(rng.choice([1, 1, 4]))) for steps in lengths]
    options = {"batch_size": int(rng.choice([1, 3, 256])), "cross_learning": bool(rng.random() < 0.3)}
    if rng.random() < 0.4:
        options["context_length"] = int(rng.choice([5, 40, 90]))
    return ours, theirs, inputs, horizon, options


def agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """To 1e-5 of what a row spreads over, or to 25 units in the last place of its values."""
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        for row, other in zip(found, expected, strict=True):
            spread, size = float(other.max() - other.min()), float(other.abs().max())
            difference = float((row - other).abs().max())
            assert difference <= max(1e-5 * spread, 25 * 1.2e-7 * size)


@pytest.mark.parametrize("seed", range(16))
def test_forecasts_of_drawn_series(seed: int, tmp_path: Path) -> None:
    ours, theirs, inputs, horizon, options = drawn_case(seed, tmp_path)
    expected = theirs.predict(copy.deepcopy(inputs), prediction_length=horizon, **options)
    agree(ours.predict_series(inputs, horizon, **options), expected)
    levels = [0.02, 0.25, 0.5, 0.777]
    quantiles, medians = ours.predict_quantiles(inputs, horizon, levels, **options)
    expected, middle = theirs.predict_quantiles(
        copy.deepcopy(inputs), prediction_length=horizon, quantile_levels=levels, **options
    )
    agree(quantiles, expected)
    agree(medians, middle)


@pytest.mark.parametrize("seed", [0, 1, 4, 5, 9])
def test_embeddings_of_drawn_series(seed: int, tmp_path: Path) -> None:
    ours, theirs, inputs, _, options = drawn_case(seed, tmp_path)
    options.pop("cross_learning")
    (tokens, scales), (expected, moments) = ours.embed(inputs, **options), theirs.embed(inputs, **options)
    for found, other in zip(tokens, expected, strict=True):
        torch.testing.assert_close(found, other, atol=3e-5, rtol=1e-4)
    for found, other in zip(scales, moments, strict=True):
        agree(list(found), list(other))


def test_constant_series_of_one_and_five_steps_beside_long_ones(tmp_path: Path) -> None:
    """Their scale is 0 or a unit in the last place, as the length of the longest series has it."""
    rng = np.random.default_rng(0)
    ours, theirs = pair(rng, tmp_path)
    inputs = [np.full(steps, 0.1 * (i + 1), np.float32) for i, steps in enumerate([1, 5, 5, 31, 40, 5, 1, 7])]
    inputs += [series(rng, 90), series(rng, 64, 3)]
    agree(ours.predict_series(inputs, 20), theirs.predict(inputs, prediction_length=20))


@pytest.mark.parametrize("seed", range(6))
def test_forecasts_of_drawn_frames(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    ours, theirs = pair(rng, tmp_path)
    horizon, freq = int(rng.choice([1, 7, 20])), ("h", "D", "MS", "W", "15min", "QS")[seed]
    targets = ["y", "x"][: rng.integers(1, 3)]
    kinds = {"price": "number", "open": "flag", "kind": "text"}
    known = [name for name in kinds if rng.random() < 0.6]
    past, future = [], []
    for name in rng.permutation(5):
        steps = int(rng.choice([3, 17, 60]))
        stamps = pd.date_range("2001-02-01", periods=steps + horizon, freq=freq)
        columns = dict(zip(targets, series(rng, steps, len(targets)), strict=True))
        columns |= {column: covariate(rng, kind, steps) for column, kind in kinds.items()}
        past.append(pd.DataFrame({"item_id": f"s{name}", "timestamp": stamps[:steps], **columns}))
        ahead = {column: covariate(rng, kinds[column], horizon, ahead=True) for column in known}
        future.append(pd.DataFrame({"item_id": f"s{name}", "timestamp": stamps[steps:], **ahead}))
    df = pd.concat(past).sample(frac=1, random_state=seed)
    future_df = pd.concat(future).sample(frac=1, random_state=seed) if known else None
    levels = [0.1, 0.5, 0.77]
    found: Any = ours.predict_frame(df, future_df, horizon=horizon, target=targets, levels=levels)
    expected = theirs.predict_df(
        df, future_df=future_df, prediction_length=horizon, target=targets, quantile_levels=levels
    )
    names, values = ["item_id", "timestamp", "target_name"], ["predictions", "0.1", "0.5", "0.77"]
    assert list(found.columns) == list(expected.columns) == [*names, *values]
    pd.testing.assert_frame_equal(found[names], expected[names], check_dtype=False)
    rows = [torch.tensor(frame[values].to_numpy()).view(-1, horizon, 4) for frame in (found, expected)]
    agree([rows[0]], [rows[1]])
