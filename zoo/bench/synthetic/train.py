"""Training of a token model on a synthetic task, by fixed steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.bench.fit import fit
from zoo.bench.synthetic.base import IGNORED, Task
from zoo.bench.synthetic.model import TokenModel

_TOKENS_AT_ONCE = 2**15
"""Of a batch that is tested."""
_TOKENS_TESTED = 2**17
"""At most, in one test."""


@dataclass(frozen=True)
class Budget:
    """How a model is trained: as in the measurements that the floors of the tests were taken from."""

    dim: int = 64
    num_heads: int = 1
    depth: int = 2
    kernel: int | None = 3
    steps: int = 1500
    batch_size: int = 64
    examples: int = 19_200
    """That are drawn once, and shuffled anew whenever all have been seen."""
    lr: float = 2e-3
    weight_decay: float = 0.1
    tested: int = 512
    """Fresh examples."""


@dataclass(frozen=True)
class Learned:
    """What a trained model reaches."""

    accuracy: float
    """On fresh examples of the task as trained."""
    tests: dict[str, float]
    """On those of `Task.tests`."""
    seconds: float
    """Of training; CPU time where torch computes on one thread."""
    parameters: int


def learned(
    attention: str | Mapping[str, Any],
    task: Task,
    budget: Budget,
    *,
    seed: int = 0,
    device: torch.device | None = None,
) -> Learned:
    """Train a token model with an attention layer on a task, and test it.

    Everything follows from the seed: weights, examples and their order; the tests are the same for all seeds.
    """
    device = device or torch.device("cpu")
    torch.manual_seed(seed)
    model = TokenModel(
        attention,
        task.vocab,
        dim=budget.dim,
        num_heads=budget.num_heads,
        depth=budget.depth,
        kernel=budget.kernel,
        places=task.length if task.counts_places or budget.kernel is None else None,
    ).to(device)
    draw = torch.Generator().manual_seed(seed + 1)
    drawn = task.draw(budget.examples, draw)
    tokens, labels = drawn.tokens.to(device), drawn.labels.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), budget.lr, weight_decay=budget.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)

    def loss(chosen: Tensor) -> Tensor:
        return model.loss(tokens[chosen], labels[chosen], IGNORED)

    seconds = fit(
        model,
        loss,
        optimizer,
        schedule,
        steps=budget.steps,
        rows=len(tokens),
        batch_size=budget.batch_size,
        generator=draw,
    )
    return Learned(
        accuracy(model, task, budget.tested, device),
        {name: accuracy(model, harder, budget.tested, device) for name, harder in task.tests().items()},
        seconds,
        sum(p.numel() for p in model.parameters()),
    )


@torch.inference_mode()
def accuracy(model: TokenModel, task: Task, count: int, device: torch.device) -> float:
    """The task's score on so many fresh examples, at most 2^17 tokens of them."""
    model.eval()
    count = max(1, min(count, _TOKENS_TESTED // task.length))
    drawn = task.draw(count, torch.Generator().manual_seed(2**31 - 1))
    rows = max(1, _TOKENS_AT_ONCE // task.length)
    predicted = [model(part.to(device)).argmax(-1).cpu() for part in drawn.tokens.split(rows)]
    return task.score(torch.cat(predicted), drawn.labels)
