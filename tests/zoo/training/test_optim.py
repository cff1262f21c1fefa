"""Parameter groups, schedules and the moving average against their formulas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import toy
from torch import nn

from zoo.training.ema import EMA
from zoo.training.optim import build_schedule, parameter_groups, period


def test_no_weight_decay_on_vectors_and_named_tensors() -> None:
    model = toy.model()
    model.no_weight_decay = lambda: ["head.*"]
    decay = {}
    for group in parameter_groups(model, lr=1.0, weight_decay=0.1):
        decay |= {id(parameter): group["weight_decay"] for parameter in group["params"]}
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)] > 0}
    assert decayed == {"stem.weight"}


def test_gman_schedule_is_that_of_the_official_program() -> None:
    """lr = max(1e-5, 1e-3 * 0.7 ** (step // s)), s = decay_epoch * num_train // batch_size."""
    num_train, batch_size, decay_epoch = 1388, 32, 5
    s = decay_epoch * num_train // batch_size
    factor = build_schedule(
        lr=1e-3,
        total_steps=10_000,
        steps_per_epoch=Fraction(num_train, batch_size),
        name="step",
        gamma=0.7,
        every_epochs=decay_epoch,
        min_lr=1e-5,
    )
    for step in (0, 1, s - 1, s, s + 1, 2 * s, 13 * s, 14 * s):
        assert 1e-3 * factor(step) == pytest.approx(max(1e-5, 1e-3 * 0.7 ** (step // s)), rel=1e-12)


def test_period_in_steps_wins_over_epochs() -> None:
    assert period(Fraction(100, 8), 7, 5) == 7
    assert period(Fraction(100, 8), None, 5) == 62


@pytest.mark.parametrize("name", ["constant", "cosine", "exponential"])
def test_a_rate_below_the_floor_is_not_raised_to_it(name: str) -> None:
    factor = build_schedule(lr=1e-6, total_steps=10, steps_per_epoch=Fraction(4), name=name, min_lr=3e-5)
    assert [factor(step) for step in range(11)] == [1.0] * 11


def test_cosine_rises_linearly_then_falls_to_the_floor() -> None:
    factor = build_schedule(
        lr=1.0, total_steps=110, steps_per_epoch=Fraction(10), name="cosine", warmup_steps=10, min_lr=0.1
    )
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_exponential_has_no_stairs() -> None:
    factor = build_schedule(lr=1.0, total_steps=9, steps_per_epoch=Fraction(4), name="exponential", gamma=0.5)
    assert factor(2) == pytest.approx(math.sqrt(0.5))


def test_ema_averages_weights_and_copies_buffers() -> None:
    model = nn.BatchNorm1d(3)
    ema = EMA(decay=0.9)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=False, multi_avg_fn=ema._average)
    expected = None
    for updates in range(40):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
        average.update_parameters(model)
        decay = min(0.9, (1 + updates) / (10 + updates))
        weight = model.weight.detach()
        expected = weight.clone() if expected is None else decay * expected + (1 - decay) * weight
    torch.testing.assert_close(average.module.weight.detach(), expected)
    assert torch.equal(average.module.running_mean, model.running_mean)
