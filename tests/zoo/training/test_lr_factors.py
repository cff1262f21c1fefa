"""Other learning rates for parameters by their names."""

from __future__ import annotations

import pytest
from torch import nn

from zoo.errors import ConfigError
from zoo.training.optim import build_optimizer


def rates(**factors: float) -> dict[tuple[float, float], int]:
    """Numbers of parameters by learning rate and weight decay."""
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.5, lr_factors=factors)
    groups = optimizer.param_groups
    return {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}


def test_the_first_glob_that_matches_gives_the_factor() -> None:
    found = rates(**{"backbone.bias": 0.5, "backbone.*": 0.1})
    assert found == {(0.1, 0.5): 1, (0.5, 0.0): 1, (1.0, 0.5): 1, (1.0, 0.0): 1}
    assert rates() == {(1.0, 0.5): 2, (1.0, 0.0): 2}


def test_a_glob_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no parameter matches 'backbon\.\*'"):
        rates(**{"backbon.*": 0.1})
