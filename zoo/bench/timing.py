"""Times of several calls taken in turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The seconds that one call took in each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.seconds, [25, 75])
        return float(low), float(high)


@dataclass(frozen=True)
class Ratio:
    """How many times as long the peer takes: median over median, with a 95 % interval."""

    value: float
    low: float
    high: float


def interleave(
    calls: Mapping[str, Call], *, repeats: int, warmup: int = 1, device: torch.device | None = None
) -> dict[str, Timing]:
    """Time every call once per round, in an order that rotates from round to round.

    Args:
        calls: name -> what to time.
        repeats: rounds that count; `warmup` rounds before them do not.
        device: a CUDA device is timed with its own events; a CPU by the wall clock, or by the CPU time of
            the process when torch runs on one thread (which other programs disturb far less).
    """
    timer = stopwatch(device or torch.device("cpu"))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(warmup + repeats):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            elapsed = timer(calls[name])
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def ratio(peer: Timing, ours: Timing, *, draws: int = 2000) -> Ratio:
    """Peer over ours, the interval by bootstrap over rounds (both of a round are drawn together)."""
    pairs = np.array([peer.seconds, ours.seconds])
    rounds = np.random.default_rng(0).integers(pairs.shape[1], size=(draws, pairs.shape[1]))
    medians = np.median(pairs[:, rounds], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
    return Ratio(peer.median / ours.median, float(low), float(high))


def stopwatch(device: torch.device) -> Callable[[Call], float]:
    """What measures the seconds of one call on `device`."""
    if device.type == "cuda":
        return _cuda_seconds
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(call: Call) -> float:
        start = clock()
        call()
        return clock() - start

    return seconds


def _cuda_seconds(call: Call) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Let torch compute with exactly this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
