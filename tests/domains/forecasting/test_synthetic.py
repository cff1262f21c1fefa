"""Generators: finite, reproducible, and with the structure that their names promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from domains.forecasting.batches import SyntheticSamples, collate
from domains.forecasting.data import ForecastData
from domains.forecasting.synthetic import GENERATORS, UNIVARIATE, draw_group
from domains.forecasting.synthetic.kernels import BANK, GRID, PERIODS, draw, kernel_synth
from domains.forecasting.synthetic.multivariate import lead_lag
from domains.forecasting.synthetic.sales import ELASTICITY, simulated_sales
from domains.forecasting.synthetic.seasonal import PERIODS as SEASONS
from domains.forecasting.synthetic.seasonal import seasonal
from zoo.errors import ConfigError


@pytest.mark.parametrize("generator", GENERATORS)
def test_groups_are_finite_reproducible_and_not_constant(generator: str) -> None:
    rows = 1 if generator in UNIVARIATE else 4
    for index in range(20):
        one, again = (
            draw_group(np.random.default_rng([0, index]), rows, 200, generator=generator, missing=0.0)
            for _ in range(2)
        )
        assert one.values.shape == (rows, 200)
        assert one.values.dtype == np.float32
        assert np.isfinite(one.values).all()
        assert one.values.std(axis=1).max() > 0.5
        np.testing.assert_array_equal(one.values, again.values)


def test_the_bank_is_the_published_one() -> None:
    x = np.linspace(0, 1, GRID)
    assert len(PERIODS) == 21
    assert len(BANK) == 33
    periodic = BANK[0](x)  # period 24 in steps of 1 / 1024, so that it recurs after 24 of them
    assert periodic[0] == pytest.approx(1)
    assert periodic[24] > 0.999
    assert periodic[12] < 0.2
    assert np.linalg.eigvalsh(BANK[21](x[:50])).min() > -1e-9  # dot product: a matrix, not by lag


@pytest.mark.parametrize("place", [0, 21, 24, 27, 30])
def test_draws_of_a_kernel_have_its_covariance(place: int) -> None:
    kernel = BANK[place](np.arange(30) / (GRID - 1) + 0.5)
    draws = draw(np.random.default_rng(0), 5000, kernel)
    expected = kernel if kernel.ndim == 1 else kernel[0]
    np.testing.assert_allclose(draws.T[0] @ draws / len(draws), expected, atol=0.1)


def test_a_piece_longer_than_the_interval_goes_on() -> None:
    assert kernel_synth(np.random.default_rng(0), 2, GRID + 100).shape == (2, GRID + 100)


def test_most_seasonal_series_repeat_with_a_usual_season() -> None:
    rng = np.random.default_rng(0)
    recurring = []
    for _ in range(100):
        steps = np.diff(seasonal(rng, 400))
        recurring.append(max(np.corrcoef(steps[p:], steps[:-p])[0, 1] for p in SEASONS) > 0.7)
    assert 0.5 < np.mean(recurring) < 0.9


def test_followers_repeat_their_leaders_later() -> None:
    rng = np.random.default_rng(3)
    walk = lambda count, length: np.cumsum(rng.standard_normal((count, length)), axis=1)  # noqa: E731
    best = 0.0
    for _ in range(10):
        values = lead_lag(rng, 2, 400, walk)
        leader, follower = np.diff(values[0]), np.diff(values[1])
        found = [np.corrcoef(leader[: len(leader) - lag], follower[lag:])[0, 1] for lag in range(49)]
        best = max(best, np.abs(found).max())
    assert best > 0.5


def test_covariates_come_after_targets_and_gaps_spare_the_known_ones() -> None:
    groups = [draw_group(np.random.default_rng(i), 5, 100, covariates=1.0, missing=1.0) for i in range(40)]
    assert {group.num_targets for group in groups} == {1, 2, 3, 4}
    assert any(group.num_known for group in groups)
    assert all(group.num_targets + group.num_known <= 5 for group in groups)
    for group in groups:
        assert not np.isnan(group.values[5 - group.num_known :]).any()
    assert sum(np.isnan(group.values).any() for group in groups) > 30


def test_an_unknown_generator_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'kernel'\. Did you mean 'kernels'"):
        draw_group(np.random.default_rng(0), 1, 50, generator="kernel")
    with pytest.raises(ConfigError, match="'lead_lag' makes groups"):
        draw_group(np.random.default_rng(0), 1, 50, generator="lead_lag")


def samples(**options: Any) -> SyntheticSamples:
    return SyntheticSamples(16, rows=6, context_length=64, horizon=48, batch_size=4, **options)


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    one, other = samples(seed=1), samples(seed=1)
    other[0]
    np.testing.assert_array_equal(one[5].context, other[5].context)
    other.set_epoch(1)
    assert one[5].context.shape != other[5].context.shape or not np.array_equal(
        one[5].context, other[5].context, equal_nan=True
    )


def test_validation_samples_stay() -> None:
    data = ForecastData(steps=1, rows=4, context_length=64)
    data.setup()
    for dataset, stays in ((data.train_set, False), (data.val_set, True)):
        before = dataset[0].context
        dataset.set_epoch(3)
        after = dataset[0].context
        assert (before.shape == after.shape and bool((before - after).nan_to_num().eq(0).all())) == stays


def test_samples_of_a_batch_share_the_steps_of_the_future() -> None:
    dataset = samples()
    ahead = [dataset[i].future.shape[1] for i in range(16)]
    assert all(len(set(ahead[i : i + 4])) == 1 for i in range(0, 16, 4))
    assert set(ahead) <= {12, 24, 48}
    batch = collate([dataset[i] for i in range(4)])
    assert len(batch.context) == 24
    assert batch.groups.unique().tolist() == list(range(int(batch.groups.max()) + 1))
    targets, known = ~batch.target.isnan().all(dim=1), ~batch.future.isnan().all(dim=1)
    assert not (targets & known).any()


def test_a_batch_is_of_groups_or_of_single_series() -> None:
    alone, grouped = samples(multivariate=0.0), samples(multivariate=1.0)
    assert len(collate([alone[i] for i in range(4)]).groups.unique()) == 24
    sizes = collate([grouped[i] for i in range(4)]).groups.unique(return_counts=True)[1]
    assert (sizes > 1).sum() >= 4


def test_sales_follow_visits_and_price_of_the_day_before() -> None:
    table = simulated_sales(shops=3, weeks=30, seed=1)
    assert table.shape == (3 * 210, 6)
    assert table.groupby("timestamp").holiday.nunique().eq(1).all()
    for _, shop in table.groupby("item_id"):
        sales, price, visits = (np.log(shop[name].to_numpy()) for name in ("sales", "price", "visits"))
        known = np.stack([price[:-1], visits[:-1], np.ones(209)], axis=1)
        found, *_ = np.linalg.lstsq(known, sales[1:], rcond=None)
        assert found[:2] == pytest.approx([-ELASTICITY, 1.0], abs=0.1)


def test_sales_of_a_seed_are_made_as_a_table(tmp_path: Path) -> None:
    [path] = ForecastData.make(tmp_path, weeks=4, seed=2)
    assert path.name == "sales.csv"
    again = simulated_sales(weeks=4, seed=2)
    assert pd.read_csv(path).sales.to_numpy() == pytest.approx(again.sales.to_numpy(), rel=1e-5)
