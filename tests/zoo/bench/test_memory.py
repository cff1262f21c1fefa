"""Peak memory of calls whose allocations are known."""

from __future__ import annotations

import torch

from zoo.bench.memory import peak_memory

CPU = torch.device("cpu")
MIB = 2**20


def _mib(n: int) -> torch.Tensor:
    return torch.ones(n * MIB // 4)


def test_peak_counts_what_lives_together_not_what_was_ever_made() -> None:
    def call() -> None:
        a = _mib(4)
        b = a + 1
        del a
        c = b * 2
        del b, c

    assert 8 * MIB <= peak_memory(call, CPU) < 8.1 * MIB


def test_what_lived_before_is_not_counted() -> None:
    before = _mib(16)
    assert 1 * MIB <= peak_memory(lambda: before[: MIB // 4] + 1, CPU) < 1.1 * MIB


def test_temporaries_inside_a_kernel_count() -> None:
    """The backward of a softmax product keeps the N x N weights: at least two of them live at the peak."""
    q = torch.randn(512, 8, requires_grad=True)
    matrix = 512 * 512 * 4

    def call() -> None:
        ((q @ q.T).softmax(-1) @ q).sum().backward()

    assert peak_memory(call, CPU) >= 2 * matrix


def test_the_measure_repeats_exactly() -> None:
    x = torch.randn(64, 64, requires_grad=True)

    def call() -> None:
        (x @ x).relu().sum().backward()
        x.grad = None

    assert peak_memory(call, CPU) == peak_memory(call, CPU)
