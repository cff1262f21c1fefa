"""The forecaster on series in every form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import zoo
from domains.forecasting.pipeline import Forecaster
from domains.forecasting.pipeline.forecaster import batches
from domains.forecasting.pipeline.inputs import prepare
from domains.forecasting.pipeline.quantiles import interpolated, probability_masses, weighted_quantiles
from zoo.errors import ConfigError, DataError

SMALL = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "initializer_factor": 0.4}


def forecaster(**options: Any) -> Forecaster:
    model: Any = zoo.create_model("chronos2", **(SMALL | {"context_length": 128} | options))
    return Forecaster(model)


def walk(*shape: int) -> Tensor:
    return torch.randn(*shape).cumsum(-1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


# ---- forms -------------------------------------------------------------------------------------------------


def test_arrays_lists_and_dicts_are_the_same_series() -> None:
    predictor, x = forecaster(), walk(3, 2, 50)
    expected = predictor.predict_series(x, 20)
    forms: list[Any] = [x.numpy(), list(x), [series.numpy() for series in x], [{"target": s} for s in x]]
    for form in forms:
        for found, series in zip(predictor.predict(form, 20), expected, strict=True):
            assert series.shape == (2, 21, 20)
            close(torch.as_tensor(found), series)


def test_series_of_any_length_come_back_in_their_order() -> None:
    predictor = forecaster()
    inputs = [walk(90), walk(2, 17), walk(200), walk(1, 1), walk(5)]
    together = predictor.predict_series(inputs, 20, batch_size=3)
    for series, found in zip(inputs, together, strict=True):
        (alone,) = predictor.predict_series([series], 20)
        close(found, alone)


def test_passes_are_of_similar_size_and_similar_series() -> None:
    items = prepare([walk(2, steps) for steps in (64, 16, 48, 64, 16, 32)], 16)
    whole, *others = batches(items, 128, 256)
    assert whole.places == [0, 1, 2, 3, 4, 5]
    assert not others
    parts = [batch.places for batch in batches(items, 128, 256, most_steps=450, ahead=32)]
    assert parts == [[1, 4, 5, 2], [0, 3]]  # of 864 steps: 2 x (48 + 48 + 64 + 80) and 2 x (96 + 96)


def test_the_context_length_cuts_the_history() -> None:
    predictor, x = forecaster(), walk(2, 1, 100)
    short = predictor.predict_series(x[..., -40:], 10)
    for found, expected in zip(predictor.predict_series(x, 10, context_length=40), short, strict=True):
        close(found, expected)
    with pytest.warns(UserWarning, match="more than the 128 of the model"):
        predictor.predict_series(x, 10, context_length=4096)


def test_integers_and_half_precision_are_read() -> None:
    predictor, steps = forecaster(), torch.arange(30)
    whole, half = predictor.predict_series([steps, steps.bfloat16()], 5)
    close(whole, half)


# ---- covariates --------------------------------------------------------------------------------------------


def with_covariates(horizon: int = 20, **future: Any) -> dict[str, Any]:
    past = {"temp": walk(60).numpy(), "visits": walk(60).numpy(), "kind": np.array(["a", "b", None] * 20)}
    given = {"temp": walk(horizon).numpy(), "kind": np.array(["a", "c"] * (horizon // 2), dtype=object)}
    return {"target": walk(60).numpy(), "past_covariates": past, "future_covariates": given | future}


def test_rows_are_targets_then_past_only_then_known() -> None:
    (item,) = prepare([with_covariates()], 20)
    assert (item.num_targets, item.num_known, len(item.context)) == (1, 2, 4)
    assert item.future.isnan().all(1).tolist() == [True, True, False, False]


def test_the_future_of_a_past_covariate_is_not_read() -> None:
    """A known covariate changes the forecast; the same values as past-only covariate change nothing."""
    predictor, item = forecaster(), with_covariates()
    (known,) = predictor.predict_series([item], 20)
    item["future_covariates"].pop("temp")
    (past,) = predictor.predict_series([item], 20)
    assert (known - past).abs().max() > 1e-3
    item["future_covariates"]["temp"] = None
    (unavailable,) = predictor.predict_series([item], 20)
    close(unavailable, past)


def test_categories_become_means_of_the_target() -> None:
    """(mean + sum of the category) / (1 + its number); missing is a category, a new one gets the mean."""
    item = {
        "target": np.array([1.0, 3.0, np.nan, 8.0]),
        "past_covariates": {"c": np.array(["x", "x", "x", None], dtype=object)},
        "future_covariates": {"c": np.array(["x", None, "new"], dtype=object)},
    }
    (found,) = prepare([item], 3)
    assert found.context[1].tolist() == [pytest.approx(8 / 3)] * 3 + [6.0]
    assert found.future[1].tolist() == [pytest.approx(8 / 3), 6.0, 4.0]


def test_with_several_targets_categories_become_their_places() -> None:
    items = [
        {
            "target": np.ones((2, 3)),
            "past_covariates": {"flag": np.array(flags), "c": np.array(names, dtype=object)},
            "future_covariates": {"c": np.array(["b", "z", None], dtype=object)},
        }
        for flags, names in (([True, False, True], ["b", None, "b"]), ([True] * 3, ["a", "c", "b"]))
    ]
    first, second = prepare(items, 3)
    assert first.context[2].tolist() == [1.0, 0.0, 1.0]
    assert first.context[3].tolist() == [1.0, 3.0, 1.0]
    assert second.context[3].tolist() == [0.0, 2.0, 1.0]
    assert first.future[3, [0, 2]].tolist() == [1.0, 3.0]
    assert first.future[3, 1].isnan()


# ---- groups of series --------------------------------------------------------------------------------------


def test_cross_learning_makes_a_batch_one_group() -> None:
    predictor, x = forecaster(), walk(4, 1, 50)
    crossed = predictor.predict_series(x, 10, cross_learning=True)
    (together,) = predictor.predict_series(x.transpose(0, 1), 10)
    close(torch.cat(crossed), together)
    pairs = predictor.predict_series(x, 10, cross_learning=True, batch_size=2)
    (first,) = predictor.predict_series(x[:2].transpose(0, 1), 10)
    close(torch.cat(pairs[:2]), first)


# ---- long horizons -----------------------------------------------------------------------------------------


def test_a_long_horizon_starts_as_a_short_one() -> None:
    predictor, x = forecaster(max_output_patches=2), walk(3, 2, 50)
    short = predictor.predict_series(x, 32)
    with pytest.warns(UserWarning, match="more than the 32 that the model forecasts in one pass"):
        long = predictor.predict_series(x, 70)
    for a, b in zip(long, short, strict=True):
        assert a.shape == (2, 21, 70)
        close(a[..., :32], b)
        assert (a[..., 32:].diff(dim=1) >= -1e-5).all()  # pooled quantiles are sorted
    with pytest.raises(ConfigError, match="70 steps is more than the 32"):
        predictor.predict_series(x, 70, limit_horizon=True)


@pytest.mark.filterwarnings("ignore:A horizon of")
def test_one_unrolled_quantile_is_a_continued_median() -> None:
    """With one path the next block is the forecast that follows the median of the first."""
    predictor, x = forecaster(max_output_patches=1), walk(2, 1, 50)
    first = torch.stack(predictor.predict_series(x, 16))
    longer = torch.cat([x, first[:, :, 10]], -1)
    (second,) = predictor.predict_series(longer[:1], 16)
    (both,) = predictor.predict_series(x[:1], 32, unrolled_quantiles=[0.5])
    weights = torch.tensor(predictor.model.quantiles)
    expected = weighted_quantiles(second.transpose(1, 2), probability_masses(weights.tolist()), weights)
    close(both[..., 16:], expected.transpose(1, 2))


@pytest.mark.filterwarnings("ignore:A horizon of")
def test_known_covariates_replace_their_own_forecast() -> None:
    """The forecast of a block depends on what is known of the block before it."""
    predictor, item = forecaster(max_output_patches=1), with_covariates(40)
    (first,) = predictor.predict_series([item], 40)
    item["future_covariates"]["temp"] = item["future_covariates"]["temp"].copy()
    item["future_covariates"]["temp"][:16] += 5
    (second,) = predictor.predict_series([item], 40)
    assert (first - second)[..., 16:].abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:A horizon of")
def test_a_block_reads_no_more_than_the_context_length() -> None:
    predictor, x = forecaster(max_output_patches=1, context_length=32), walk(1, 1, 200)
    (long,) = predictor.predict_series(x, 48)
    (cut,) = predictor.predict_series(x[..., -32:], 48)
    close(long, cut)


# ---- quantiles ---------------------------------------------------------------------------------------------


def test_levels_between_are_interpolated_and_those_beyond_clamped() -> None:
    predictor, x = forecaster(), walk(2, 1, 50)
    full = predictor.predict_series(x, 10)
    with pytest.warns(UserWarning, match=r"from 0.01 to 0.99, which stand in"):
        quantiles, medians = predictor.predict_quantiles(x, 10, [0.001, 0.1, 0.125])
    for found, median, series in zip(quantiles, medians, full, strict=True):
        assert found.shape == (1, 10, 3)
        close(found[..., 0], series[:, 0])
        close(found[..., 1], series[:, 2])
        close(found[..., 2], (series[:, 2] + series[:, 3]) / 2)
        close(median, series[:, 10])
    with pytest.raises(ConfigError, match="must be probabilities"):
        predictor.predict_quantiles(x, 10, [50])


def test_weighted_quantiles_of_equal_weights() -> None:
    """Samples 1 .. 4 stand at 1/4 .. 4/4, whatever the sum of the weights."""
    samples, weights = torch.tensor([3.0, 1.0, 4.0, 2.0]), torch.full((4,), 2.0)
    levels = torch.tensor([0.1, 0.25, 0.375, 1.0])
    assert weighted_quantiles(samples, weights, levels).tolist() == pytest.approx([1, 1, 1.5, 4])


def test_masses_reach_half_way_to_the_neighbours() -> None:
    assert probability_masses([0.1, 0.5, 0.9]).tolist() == pytest.approx([0.25 / 0.9, 0.4 / 0.9, 0.25 / 0.9])


def test_one_level_stands_for_all() -> None:
    values = torch.tensor([[2.0], [3.0]])
    assert interpolated(values, torch.tensor([0.5]), torch.tensor([0.1, 0.9])).tolist() == [[2, 2], [3, 3]]


# ---- embeddings --------------------------------------------------------------------------------------------


def test_embeddings_have_a_token_for_each_patch_and_two_more() -> None:
    predictor = forecaster()
    tokens, scales = predictor.embed([walk(2, 50), walk(33)])
    assert [t.shape for t in tokens] == [(2, 6, 32), (1, 6, 32)]
    assert scales[0][0].shape == scales[0][1].shape == (2, 1)


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_a_series_without_values_is_told_and_forecast() -> None:
    with pytest.warns(UserWarning, match="Series 1 has no value at all"):
        found = forecaster().predict_series([walk(20), torch.full((20,), torch.nan)], 5)
    assert found[1].isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "no series"),
        (torch.randn(4, 50), r"axes \(series, variates, steps\), not \[4, 50\]"),
        ("sales.csv", "not as a str"),
        ({"target": np.ones(5)}, "not as a dict"),
        ([np.ones((1, 1, 5))], r"Series 0 has shape \[1, 1, 5\]"),
        ([np.ones(5), np.array(["a", "b"])], "Series 1 must hold numbers"),
        ([np.ones(5), np.ones(0)], "Series 1 is empty"),
        ([np.array([1.0, np.inf])], "Series 0 has infinite values"),
        ([np.array([1.0, 1e300])], "Series 0 has values beyond 3.4e[+]38"),
        ([np.ones(5), {"target": np.ones(5)}], "Series 0 is a ndarray, others are dicts"),
    ],
)
def test_inputs_that_cannot_be_used(inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        forecaster().predict(inputs, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": np.ones(5)}, "key 'targets'. Did you mean 'target'"),
        ({"past_covariates": [1]}, "past_covariates is a dict of name to values, not a list"),
        ({"past_covariates": {}}, "future 'a' without its past"),
        ({"past_covariates": {"a": np.ones(4)}}, r"the past 'a' has shape \[4\], not 5 steps as its target"),
        ({"future_covariates": {"a": np.ones(2)}}, r"the future 'a' has shape \[2\], not 3 steps"),
        ({"future_covariates": {"a": np.array([1, np.inf, 2])}}, "Series 1: .* infinite"),
        ({"future_covariates": {"a": ["x", "y", "z"]}}, "past of 'a' holds numbers, its future"),
        ({"future_covariates": {}}, r"Series 1 has the future_covariates \[\], series 0 has \['a'\]"),
        ({"future_covariates": {"a": None}}, "one of series 0 and 1, not for both"),
        ({"target": np.ones((2, 5))}, "Series 1 has 2 targets, series 0 has 1"),
    ],
)
def test_dicts_that_cannot_be_used(changes: dict, message: str) -> None:
    item = {
        "target": np.ones(5),
        "past_covariates": {"a": np.ones(5)},
        "future_covariates": {"a": np.ones(3)},
    }
    items = [item, item | changes]
    if "without its past" in message:
        items = items[::-1]
    with pytest.raises(DataError, match=message):
        forecaster().predict(items, 3)


def test_a_series_without_target_is_told() -> None:
    with pytest.raises(DataError, match="Series 0 has no 'target'"):
        forecaster().predict([{"past_covariates": {}}], 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_output_patches": 0}, "max_output_patches=0"),
        ({"context_length": 0}, "context_length=0"),
        ({"unrolled_quantiles": [0.12]}, r"unrolled_quantiles=\[0.12\] must be some of the model's"),
    ],
)
def test_options_that_cannot_be(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forecaster().predict(walk(1, 1, 20), 5, **options)


@pytest.mark.parametrize("horizon", [0, -3])
def test_a_horizon_has_steps(horizon: int) -> None:
    with pytest.raises(DataError, match="horizon"):
        forecaster().predict(walk(1, 1, 20), horizon)
