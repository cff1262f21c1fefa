"""Generators of the synthetic tasks: labels found again by brute force, chance lines by guessing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from statistics import median

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from zoo.bench.synthetic import (
    IGNORED,
    MQAR,
    TASKS,
    Induction,
    ListOps,
    Needle,
    Parity,
    SelectiveCopy,
    Task,
)
from zoo.bench.synthetic.listops import WORDS
from zoo.bench.synthetic.recall import recalled
from zoo.errors import ConfigError

SMALL: tuple[Task, ...] = (
    MQAR(32, 32, 4),
    MQAR(32, 32, 4, random_fill=False),
    SelectiveCopy(8, 20, 5),
    Induction(8, 16, (16, 32)),
    Needle(24, 3),
    Needle(24, 1, depth=0.5),
    ListOps(longest=40),
    Parity(12, (12, 24)),
)
tasks = pytest.mark.parametrize("task", SMALL, ids=lambda task: f"{task.name}-{SMALL.index(task)}")
Row = list[int]


def drawn(task: Task, count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    examples = task.draw(count, Generator().manual_seed(seed))
    return examples.tokens, examples.labels


def _recall(row: Row, task: MQAR) -> dict[int, int]:
    """Answers at the even places behind the pairs that hold a key: what is asked, and fillers by chance."""
    values = {row[2 * i]: row[2 * i + 1] for i in range(task.pairs)}
    places = range(2 * task.pairs, len(row), 2)
    return {place: values[row[place]] for place in places if row[place] in values}


def _copy(row: Row, task: SelectiveCopy) -> dict[int, int]:
    data = [token for token in row[: task.context] if token < task.symbols]
    return dict(enumerate(data, task.context))


def _induce(row: Row, task: Induction) -> dict[int, int]:
    return {len(row) - 1: row[row.index(task.symbols) + 1]}


def _find(row: Row, task: Needle) -> dict[int, int]:
    start = row.index(task.mark) + 1
    return dict(enumerate(row[start : start + task.digits], len(row) - task.digits))


def _evaluate(words: list[str]) -> int:
    """By a stack, and Python's own functions."""
    stack: list[list] = [[]]
    for word in words:
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            name, *values = stack.pop()
            found = {"[MIN": min, "[MAX": max, "[MED": median, "[SM": lambda v: sum(v) % 10}[name](values)
            stack[-1].append(int(found))
        else:
            stack[-1].append(int(word))
    return stack[0][0]


def _calculate(row: Row, task: ListOps) -> dict[int, int]:
    words = [WORDS[token] for token in row if WORDS[token] != "_"]
    return {len(words) - 1: _evaluate(words)}


def _count(row: Row, task: Parity) -> dict[int, int]:
    return {i: sum(row[: i + 1]) % 2 for i in range(task.first, len(row))}


BRUTE: dict[str, Callable[..., dict[int, int]]] = {
    "mqar": _recall,
    "selective_copy": _copy,
    "induction": _induce,
    "needle": _find,
    "listops": _calculate,
    "parity": _count,
}


@tasks
def test_labels_are_those_of_an_independent_count(task: Task) -> None:
    tokens, labels = drawn(task)
    for row, asked in zip(tokens.tolist(), labels.tolist(), strict=True):
        given = {i: label for i, label in enumerate(asked) if label != IGNORED}
        found = BRUTE[task.name](row, task)
        if task == SMALL[0]:  # a random filler may be a key that is not asked
            found = {i: found[i] for i in given}
        assert given == found


@tasks
def test_tokens_and_answers_are_in_the_vocabulary(task: Task) -> None:
    tokens, labels = drawn(task)
    assert tokens.shape == labels.shape == (200, task.length)
    assert 0 <= tokens.min() <= tokens.max() < task.vocab
    assert 0 <= labels[labels != IGNORED].min() <= labels.max() < task.vocab


@tasks
def test_examples_follow_the_generator(task: Task) -> None:
    first, again, other = (drawn(task, 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@tasks
def test_no_blind_guess_beats_the_chance_line(task: Task) -> None:
    """The best constant answer reaches it, a random one does not pass it."""
    _, labels = drawn(task, 3000)
    answers = labels[labels != IGNORED].unique()
    best = max(task.score(torch.full_like(labels, int(answer)), labels) for answer in answers)
    assert best == pytest.approx(task.chance, rel=0.25, abs=0.005)
    guessed = answers[torch.randint(len(answers), labels.shape, generator=Generator().manual_seed(1))]
    assert task.score(guessed, labels) < task.chance + 0.03


@tasks
def test_scores_run_from_none_to_all(task: Task) -> None:
    _, labels = drawn(task)
    assert task.score(labels, labels) == 1
    assert task.score(labels + 1, labels) == 0


def test_gaps_of_recall_follow_the_power_law() -> None:
    task = MQAR(64, 64, 4)
    _, labels = drawn(task, 20_000)
    gaps = ((labels != IGNORED).nonzero()[:, 1] - 8) // 2
    counted = torch.bincount(gaps, minlength=28).double() / 20_000
    weights = torch.arange(1, 29, dtype=torch.double) ** (0.01 - 1)
    expected = torch.zeros(28, dtype=torch.double)
    shares = (weights / weights.sum()).numpy()
    random = np.random.default_rng(0)
    for _ in range(20_000):  # as the public generator draws them
        expected[random.choice(28, 4, replace=False, p=shares)] += 1 / 20_000
    assert (counted - expected).abs().max() < 0.015
    assert counted[0] > 3 * counted[7]


def test_recall_has_distinct_keys_below_and_values_above_the_middle() -> None:
    tokens, labels = drawn(MQAR(32, 32, 4))
    keys, values = tokens[:, 0:8:2], tokens[:, 1:8:2]
    assert all(len(set(row)) == 4 for row in keys.tolist())
    assert keys.min() >= 1
    assert keys.max() < 16 <= values.min()
    assert ((labels != IGNORED).sum(1) == 4).all()


def test_what_is_recalled_reads_the_pairs_only() -> None:
    row = torch.tensor([[3, 20, 5, 21, 0, 0, 5, 0, 3, 0, 7, 0]])
    wanted = [-100] * 6 + [21, -100, 20, -100, -100, -100]
    assert recalled(row, 2).tolist() == [wanted]


def test_needle_lies_at_its_depth() -> None:
    for depth, place in ((0.0, 0), (0.5, 8), (1.0, 17)):
        tokens, _ = drawn(Needle(24, 3, depth=depth), 5)
        assert (tokens == 10).nonzero()[:, 1].tolist() == [place] * 5
    anywhere, _ = drawn(Needle(24, 3), 500)
    assert Counter((anywhere == 10).nonzero()[:, 1].tolist()).keys() == set(range(18))


def test_parity_beyond_the_trained_length_asks_beyond_it_only() -> None:
    tests = Parity(12, (12, 24)).tests()
    assert (drawn(tests["12"])[1] != IGNORED).all()
    assert ((drawn(tests["24"])[1] != IGNORED) == (torch.arange(24) >= 12)).all()


def test_list_operations_keep_their_bounds() -> None:
    task = ListOps(shortest=20, longest=60, depth=3, arguments=4)
    for row in drawn(task, 100)[0].tolist():
        words = [WORDS[token] for token in row if WORDS[token] != "_"]
        assert 20 <= len(words) <= 60
        depth = deepest = 0
        for word in words:
            depth += word.startswith("[") - (word == "]")
            deepest = max(deepest, depth)
        assert deepest <= 3


def test_published_sizes_of_list_operations_can_be_drawn() -> None:
    task = ListOps(shortest=500, longest=2000, depth=10, arguments=10)
    tokens, labels = drawn(task, 3)
    assert ((tokens != WORDS.index("_")).sum(1) >= 500).all()
    assert ((labels != IGNORED).sum(1) == 1).all()


def test_tests_of_other_lengths_are_of_these_lengths() -> None:
    for task in TASKS.values():
        for name, harder in task.tests().items():
            assert harder.length == int(name.partition(" at ")[0].replace(",", ""))
            assert harder.vocab == task.vocab


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MQAR(length=16), "length"),
        (lambda: MQAR(16, 64, 8), "distinct keys"),
        (lambda: SelectiveCopy(context=8), "16 data tokens"),
        (lambda: Induction(length=2), "at least 3"),
        (lambda: Needle(4), "does not fit twice"),
        (lambda: Needle(depth=1.5), "0 to 1"),
        (lambda: ListOps(shortest=100), "100 to 64"),
        (lambda: dataclasses.replace(ListOps(), arguments=1), "arguments"),
    ],
)
def test_sizes_that_make_no_sense_are_told(build: Callable[[], Task], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
