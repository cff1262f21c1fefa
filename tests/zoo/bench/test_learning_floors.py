"""What mechanisms learn on the synthetic tasks, and what they cannot: small trainings; full ones (slow).

The floors lie below recorded runs: `Budget()` in docs/attention/comparison.md; of the small trainings,
softmax recalls 0.92, a window 0.11; parity beyond the trained length, 0.97 with rates up to 2, else 0.50.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zoo.bench.mechanisms.contestants import Contestant
from zoo.bench.synthetic import MQAR, Induction, Needle, Parity, Task
from zoo.bench.synthetic.model import TokenModel
from zoo.bench.synthetic.train import Budget, Learned, learned

RECALL = MQAR(32, 24, 3, power=1.0)
SMALL = Budget(dim=32, steps=300, lr=5e-3)
TINY = Budget(dim=16, depth=1, steps=250, batch_size=32, lr=5e-3)


def small(name: str, task: Task, budget: Budget = SMALL, **options: Any) -> Learned:
    return learned(Contestant(name).short() | options, task, budget)


# ---- recall ------------------------------------------------------------------------------------------------


def test_softmax_recalls_many_values() -> None:
    assert small("multihead", RECALL).accuracy > 0.7


@pytest.mark.parametrize(("name", "options"), [("local", {"window": 4}), ("gam", {"slots": 16})])
def test_a_window_and_slots_without_writing_do_not_recall(name: str, options: dict[str, Any]) -> None:
    assert small(name, RECALL, **options).accuracy < 0.2


def test_softmax_finds_what_followed_a_token_beyond_the_trained_length() -> None:
    found = small("multihead", Induction(8, 32, (32, 64)))
    assert found.accuracy > 0.9
    assert found.tests["64"] > 0.8


def test_softmax_finds_a_needle_at_any_depth() -> None:
    grid = Needle(32, 1, lengths=(32, 64), depths=(0.0, 1.0))
    assert min(small("multihead", grid).tests.values()) > 0.9


def test_no_needle_reaches_through_windows_that_end_before_it() -> None:
    """Each of two blocks hands on 3 tokens of its window and 2 of its convolution: 10 tokens at most."""
    model = TokenModel({"name": "local", "window": 4}, Needle().vocab, dim=16).eval()
    far, near = (
        Needle(64, 1, depth=depth).draw(8, torch.Generator().manual_seed(0)).tokens for depth in (0.0, 1.0)
    )
    changed = torch.cat([(far[:, :53] + 1) % 10, far[:, 53:]], dim=1)
    assert torch.equal(model(far)[:, -1], model(changed)[:, -1])
    assert not torch.equal(model(near)[:, -1], model((near + 1) % 10)[:, -1])


# ---- parity ------------------------------------------------------------------------------------------------


def test_rates_up_to_two_track_parity_beyond_the_trained_length() -> None:
    found = small("deltanet_negative", Parity(16, (16, 32, 48)), TINY)
    assert found.accuracy > 0.99
    assert min(found.tests.values()) > 0.9


@pytest.mark.parametrize("name", ["multihead", "deltanet", "gla"])
def test_softmax_and_states_that_keep_their_sign_guess_parity_beyond_the_trained_length(name: str) -> None:
    found = small(name, Parity(16, (16, 32, 48)), TINY)
    assert max(found.tests["32"], found.tests["48"]) < 0.6


# ---- the full trainings, a minute to five each -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multihead", "deltanet"])
def test_recall_in_full_is_solved(name: str) -> None:
    assert small(name, MQAR(), Budget()).accuracy >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "gam"])
def test_recall_in_full_stays_near_chance(name: str) -> None:
    """A window of 8 reaches the few values that stand right before their question."""
    assert small(name, MQAR(), Budget()).accuracy < 0.1


def test_the_same_seed_gives_the_same_model() -> None:
    short = Budget(dim=16, depth=1, steps=3, batch_size=4, examples=16, tested=64)
    task = MQAR(16, 16, 2)
    first, again = (learned("multihead", task, short, seed=1) for _ in range(2))
    other = learned("multihead", task, short, seed=2)
    assert (first.accuracy, first.tests) == (again.accuracy, again.tests)
    assert first.parameters == other.parameters


def test_places_are_told_where_the_task_counts_them_or_nothing_else_does() -> None:
    tokens = torch.randint(8, (1, 12))
    told = TokenModel("multihead", 8, dim=16, places=12)
    told_by_layers = TokenModel("multihead", 8, dim=16)
    assert told.places is not None
    assert told_by_layers.places is None
    asked = torch.zeros(1, 12, dtype=torch.bool)
    asked[0, 3] = asked[0, 7] = True
    for model in (told, told_by_layers):
        assert torch.allclose(model(tokens, asked), model(tokens)[asked], atol=1e-6)
