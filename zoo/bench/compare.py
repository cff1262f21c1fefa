"""One job done twice: equal results first, then time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.bench.memory import peak_memory
from zoo.bench.report import Curve, Point, Row
from zoo.bench.timing import Call, interleave
from zoo.errors import ZooError


@dataclass(frozen=True)
class Job:
    """The same work by the zoo and by its peer, and the results of each that must agree."""

    name: str
    ours: Call
    peer: Call
    ours_result: Callable[[], Tensor]
    peer_result: Callable[[], Tensor]


def compare(job: Job, *, tolerance: float = 1e-4, repeats: int, warmup: int = 1, device: torch.device) -> Row:
    """Check that both compute the same, to `tolerance` of the largest value, then measure.

    Raises:
        ZooError: the results differ; nothing is timed.
    """
    difference = relative_difference(job.ours_result(), job.peer_result())
    if not difference <= tolerance:
        raise ZooError(
            f"{job.name}: the zoo and its peer differ by {difference:.1e} (allowed {tolerance:.0e}), so "
            "their times cannot be compared."
        )
    ours_bytes, peer_bytes = peak_memory(job.ours, device), peak_memory(job.peer, device)
    calls = {"ours": job.ours, "peer": job.peer}
    timings = interleave(calls, repeats=repeats, warmup=warmup, device=device)
    return Row(job.name, timings["ours"], timings["peer"], ours_bytes, peer_bytes, difference)


def relative_difference(ours: Tensor, peer: Tensor) -> float:
    """Largest absolute difference over the largest magnitude of `peer`; NaN anywhere gives NaN."""
    ours, peer = ours.detach(), peer.detach()
    return float((ours - peer).abs().max() / peer.abs().max())


def gradient_norm(network: nn.Module, loss: Tensor) -> Tensor:
    """Backward of the loss; the norm of all gradients, by which training steps are compared."""
    network.zero_grad()
    loss.backward()
    return torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm()


def scaling(
    name: str, job_at: Callable[[int], Call], sizes: Sequence[int], *, repeats: int, device: torch.device
) -> Curve:
    """Time and peak memory of `job_at(size)` for every size; the memory pass is the warm-up."""

    def measure(size: int) -> Point:
        call = job_at(size)
        peak = peak_memory(call, device)
        timing = interleave({name: call}, repeats=repeats, warmup=0, device=device)[name]
        return Point(size, timing.median, peak)

    return Curve(name, tuple(measure(size) for size in sizes))
