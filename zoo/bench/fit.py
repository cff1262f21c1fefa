"""A plain training loop by fixed steps, for comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Generator, Tensor, nn

from zoo.attention.layers import auxiliary_loss
from zoo.bench.timing import stopwatch


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    *,
    steps: int,
    rows: int,
    batch_size: int,
    generator: Generator,
) -> float:
    """Train for so many steps; what attention layers want minimised is added to the loss.

    Args:
        loss: of the rows with these numbers.
        rows: how many there are; all are seen in random order before one is seen again.

    Returns:
        Seconds, as `zoo.bench.timing` measures them.
    """

    def run() -> None:
        for chosen in islice(shuffled(rows, batch_size, generator), steps):
            optimizer.zero_grad()
            (loss(chosen) + auxiliary_loss(model)).backward()
            optimizer.step()
            schedule.step()

    model.train()
    return stopwatch(next(model.parameters()).device)(run)


def shuffled(rows: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Numbers of rows in batches, in a new order whenever all have been seen, without end."""
    while True:
        yield from torch.randperm(rows, generator=generator).split(batch_size)
