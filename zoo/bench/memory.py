"""The peak of tensor memory during a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors alive at the worst moment of `call`, above those alive before it.

    On a CPU this is exact and repeatable: the profiler reports every allocation of torch's allocator, inside
    kernels too, and the running sum is followed to its maximum. (The process's resident memory would also
    count what the allocator keeps, and tracemalloc sees no tensor.) On CUDA the caching allocator counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return _cpu_peak(call)


def _cpu_peak(call: Callable[[], object]) -> int:
    # The profiler of a CUDA build reports the absence of a GPU as an error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        call()
    results: Any = profiler.kineto_results  # type: ignore[union-attr]
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
