"""Chronos-2: forecasts of the pipeline, its operators, data frames."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import zoo
from domains.forecasting.models.patches import denormalise, location_and_scale, normalise, patches
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.pipeline.inputs import prepare
from domains.forecasting.pipeline.quantiles import interpolated, probability_masses, weighted_quantiles
from domains.forecasting.weights import load_folder
from parity.fixture import Fixture

LEVELS = torch.tensor([0.01, *np.arange(0.05, 0.951, 0.05).round(2), 0.99])


def _forecaster(fixture: Fixture) -> Forecaster:
    model: Any = zoo.from_official("chronos2", fixture.state_dict(), **fixture.spec["config"])
    return Forecaster(model)


def _named(case: str, results: list[Tensor]) -> dict[str, Tensor]:
    return {f"output/{case}/{i}": result for i, result in enumerate(results)}


# ---- cases of the pipeline ---------------------------------------------------------------------------------


def cases(fixture: Fixture) -> dict[str, Tensor]:
    forecaster = _forecaster(fixture)
    (x,) = fixture.inputs("x")
    out: dict[str, Tensor] = {}
    for name, case in fixture.spec["cases"].items():
        if name == "embed":
            out |= _named(name, forecaster.embed(x[:2, None])[0])
            continue
        horizon = case["prediction_length"]
        inputs = _case_inputs(fixture, name, x, horizon)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name == "predict_quantiles":
                quantiles, medians = forecaster.predict_quantiles(inputs, horizon, case["quantile_levels"])
                out |= _named(name, quantiles) | _named("predict_mean", medians)
            else:
                out |= _named(name, forecaster.predict_series(inputs, horizon, **case["options"]))
    return out


def _case_inputs(fixture: Fixture, name: str, x: Tensor, horizon: int) -> Any:
    arrays = {
        "tensor_univariate": x[:, None],
        "tensor_multivariate": x.view(2, 4, -1),
        "list_mixed_lengths": [x[0], x[1, 30:], x[2:4, 10:], x[4, 85:]],
        "list_cross_learning": [x[0], x[1, 30:], x[5]],
        "small_batches": list(x[:6]),
        "cross_learning_small_batches": list(x[:6]),
    }
    if name in arrays:
        return arrays[name]
    return _dicts(fixture, name, horizon) if name.startswith("dicts") else x[:3, None]


def _dicts(fixture: Fixture, name: str, horizon: int) -> list[dict[str, Any]]:
    past = {"dicts_covariates": ("temp", "visits", "weather", "promo"), "dicts_past_only": ("visits",)}
    items = []
    for i in range(3):
        target = fixture.tensors[f"input/dict_target_{i}"].numpy()
        values = {key: fixture.tensors[f"input/dict_{key}_{i}"].numpy() for key in past.get(name, ("temp",))}
        if "weather" in values:
            values["weather"] = np.array(["sun", "rain", "fog", "snow"], dtype=object)[values["weather"]]
        steps = len(target)
        item: dict[str, Any] = {
            "target": target,
            "past_covariates": {key: value[:steps] for key, value in values.items()},
        }
        later = {key: value[steps:] for key, value in values.items() if key != "visits"}
        if later:
            item["future_covariates"] = {key: np.resize(value, horizon) for key, value in later.items()}
        items.append(item)
    return items


# ---- operators ---------------------------------------------------------------------------------------------


def operators(fixture: Fixture) -> dict[str, Tensor]:
    series, values, samples, weights = fixture.inputs("series", "quantile_values", "samples", "weights")
    loc, scale = location_and_scale(series)
    z, plain = (normalise(series, loc, scale, arcsinh=flag) for flag in (True, False))
    queries = torch.tensor(fixture.spec["config"]["query_levels"])
    return {
        "output/loc": loc,
        "output/scale": scale,
        "output/asinh_norm": z,
        "output/plain_norm": plain,
        "output/asinh_inverse": denormalise(z, loc, scale, arcsinh=True),
        "output/plain_inverse": denormalise(plain, loc, scale, arcsinh=False),
        "output/patches": patches(series, 16, 16, fill=torch.nan),
        "output/interpolated": interpolated(values, LEVELS, queries),
        "output/prob_mass_21": probability_masses(LEVELS.tolist()),
        "output/prob_mass_9": probability_masses(np.arange(0.1, 0.95, 0.1).tolist()),
        "output/weighted_quantiles": weighted_quantiles(samples, weights, LEVELS),
        **_encodings(fixture),
    }


def _encodings(fixture: Fixture) -> dict[str, Tensor]:
    told = fixture.spec["inputs"]["categorical"]
    found: dict[str, Tensor] = {}
    for kind, copies in (("target", 1), ("ordinal", 2)):
        items = [
            {
                "target": fixture.tensors[f"input/target_{i}"].expand(copies, -1),
                "past_covariates": {"c": np.array(told["past"][i], dtype=object)},
                "future_covariates": {"c": np.array(told["future"][i], dtype=object)},
            }
            for i in range(3)
        ]
        for i, item in enumerate(prepare(items, 3)):
            found[f"output/{kind}_encoded_context_{i}"] = item.context[-2:]
            found[f"output/{kind}_encoded_future_{i}"] = item.future[-2:]
    return found


# ---- data frames -------------------------------------------------------------------------------------------


def frames(fixture: Fixture) -> dict[str, Tensor]:
    forecaster = _forecaster(fixture)
    df, future = (_frame(fixture.spec[key]) for key in ("df", "future_df"))
    inputs = {"with_future": (df, future), "two_targets": (df.drop(columns="kind"), None)}
    out = {}
    for name, call in fixture.spec["calls"].items():
        result = forecaster.predict_frame(
            *inputs[name],
            horizon=call["prediction_length"],
            target=call["target"],
            levels=call["quantile_levels"],
        )
        stated = _frame(fixture.spec["output_frames"][name])
        rows = result[list(stated.columns)].astype({"item_id": object, "target_name": object})
        pd.testing.assert_frame_equal(
            rows, stated.astype({"item_id": object, "target_name": object}), check_dtype=False
        )
        columns = ["predictions", *map(str, call["quantile_levels"])]
        out[f"output/{name}"] = torch.tensor(result[columns].to_numpy())
    return out


def _frame(told: dict[str, Any]) -> pd.DataFrame:
    frame = pd.DataFrame(told["data"], columns=told["columns"])
    return frame.assign(timestamp=pd.to_datetime(frame["timestamp"]))


# ---- checkpoints -------------------------------------------------------------------------------------------


def checkpoint(fixture: Fixture, folder: Path) -> dict[str, Tensor]:
    """Forecasts from the folders alone, the adapter's base named by its path."""
    (x,) = fixture.inputs("x")
    adapter = folder.parent / "chronos2_dummy_lora"
    model = load_folder(folder)
    with torch.no_grad():
        z = model(x, num_output_patches=3).normalised
    adapted = Forecaster.from_folder(adapter, base=folder)
    return (
        {"output/normalised": z}
        | _named("predict", Forecaster(model).predict_series(x[:, None], 40))
        | _named("predict_lora", adapted.predict_series(x[:, None], 40))
    )
