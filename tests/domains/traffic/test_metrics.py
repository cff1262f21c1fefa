"""Masked errors against the formulas of the field, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.traffic.losses import build_loss
from domains.traffic.metrics import HorizonErrors, valid_targets
from zoo.errors import ConfigError


def forecasts(count: int = 50, horizon: int = 4, sensors: int = 6) -> tuple[Tensor, Tensor]:
    """Predictions and targets `[B, Q, N]`, a fifth of the targets 0."""
    target = 60 * torch.rand(count, horizon, sensors) + 5
    prediction = target + 5 * torch.randn_like(target)
    return prediction, target.masked_fill(torch.rand_like(target) < 0.2, 0.0)


def official(prediction: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Mean over everything with the mask divided by its own mean, NaN as 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mask = (target != 0).astype(np.float64)
        mask = np.nan_to_num(mask / mask.mean())
        error = np.abs(prediction - target)
        relative = np.nan_to_num(error / target * mask, nan=0.0, posinf=0.0, neginf=0.0)
        wape = np.nan_to_num((error * mask).sum() / (np.abs(target) * mask).sum())
    return {
        "mae": np.nan_to_num(error * mask).mean(),
        "rmse": np.sqrt(np.nan_to_num(error**2 * mask).mean()),
        "mape": 100 * relative.mean(),
        "wape": 100 * wape,
    }


def test_each_horizon_alone_is_the_masked_mean_of_the_field() -> None:
    prediction, target = forecasts()
    metric = HorizonErrors(4)
    metric.update(prediction, target)
    errors = metric.compute()
    for step in range(4):
        for name, value in official(
            prediction[:, step].double().numpy(), target[:, step].double().numpy()
        ).items():
            assert errors[name][step].item() == pytest.approx(value, rel=1e-6)


def test_average_is_pooled_over_steps() -> None:
    prediction, target = forecasts()
    metric = HorizonErrors(4)
    metric.update(prediction, target)
    errors = metric.compute()
    for name, value in official(prediction.double().numpy(), target.double().numpy()).items():
        assert errors[f"average_{name}"].item() == pytest.approx(value, rel=1e-6)


def test_result_does_not_depend_on_the_batches() -> None:
    prediction, target = forecasts()
    target[:7] = 0
    whole, parts = HorizonErrors(4), HorizonErrors(4)
    whole.update(prediction, target)
    for start, stop in ((0, 7), (7, 8), (8, 50)):
        parts.update(prediction[start:stop], target[start:stop])
    torch.testing.assert_close(parts.compute(), whole.compute(), rtol=1e-12, atol=0)


def test_all_targets_missing_gives_zero() -> None:
    metric = HorizonErrors(2)
    metric.update(torch.ones(3, 2, 4), torch.zeros(3, 2, 4))
    assert all((value == 0).all() for value in metric.compute().values())


@pytest.mark.parametrize("null_value", [0.0, -1.0, None])
def test_missing_targets_count_nowhere_whatever_the_forecast(null_value: float | None) -> None:
    prediction, target = forecasts()
    target = target + 1
    missing = torch.rand_like(target) < 0.3
    mask = ~missing
    hidden = {0.0: 0.0, -1.0: -1.0, None: torch.nan}[null_value]
    wild = prediction.masked_fill(missing, 1e6)
    metric, reference = HorizonErrors(4, null_value=null_value), HorizonErrors(4, null_value=None)
    metric.update(wild, target.masked_fill(missing, hidden))
    reference.update(prediction, target, mask)
    torch.testing.assert_close(metric.compute(), reference.compute())


def test_min_abs_leaves_out_small_targets() -> None:
    target = torch.tensor([0.0, 0.0005, -0.0005, 0.001, 5.0, torch.nan])
    assert valid_targets(target, min_abs=1e-3).tolist() == [False, False, False, True, True, False]


def test_zero_targets_that_count_do_not_make_the_percentage_infinite() -> None:
    metric = HorizonErrors(1, null_value=None)
    metric.update(torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 2.0]]]))
    errors = metric.compute()
    assert errors["mae"].item() == 1.0
    assert errors["mape"].item() == pytest.approx(25.0)


@pytest.mark.parametrize("name", ["masked_mae", "masked_mse", "masked_huber", "mae", "mse", "huber"])
def test_losses_follow_their_formula(name: str) -> None:
    prediction, target = forecasts()
    error = (prediction - target).abs()
    formula = {"mae": error, "mse": error**2, "huber": torch.where(error < 1, error**2 / 2, error - 0.5)}
    kept = formula[name.removeprefix("masked_")][
        target != 0 if name.startswith("masked_") else target == target
    ]
    torch.testing.assert_close(build_loss(name)(prediction, target), kept.mean())


def test_loss_without_targets_is_zero_with_zero_gradient() -> None:
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    loss = build_loss("masked_mae")(prediction, torch.zeros(2, 3, 4))
    loss.backward()
    assert loss.item() == 0
    assert (prediction.grad == 0).all()


def test_nan_target_leaves_the_gradient_finite() -> None:
    prediction = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.full((2, 3, 4), torch.nan)
    target[0, 0, 0] = 1.0
    build_loss("masked_mse", null_value=None)(prediction, target).backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert prediction.grad.count_nonzero() == 1


def test_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"loss\.name=masked_mea.*'masked_mae'"):
        build_loss("masked_mea")
