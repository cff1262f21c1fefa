"""The linear recurrence in chunks against its step form, and against chunks computed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.scan import scan
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call

Program = Callable[..., Tensor]

KINDS = {
    "linear attention": (),
    "decay per head": ("log_decay",),
    "decay per channel": ("channel_decay",),
    "delta rule": ("beta",),
    "gated delta rule": ("log_decay", "beta"),
    "delta rule, decay per channel": ("channel_decay", "beta"),
}
"""Kind of recurrence -> its rates."""


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, **rates: Any) -> Tensor:
    return scan(q, k, v, **rates)[0]


def _by_steps(q: Tensor, k: Tensor, v: Tensor, **rates: Any) -> Tensor:
    return scan(q, k, v, form="step", **rates)[0]


def _chunk_by_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    size: int = 64,
) -> Tensor:
    """The chunk form in plain words; N divisible by `size`."""
    q = q * q.shape[-1] ** -0.5
    g = q.new_zeros(q.shape[:3]) if log_decay is None else log_decay
    state, outs = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for begin in range(0, q.shape[2], size):
        at = slice(begin, begin + size)
        queries, keys, written = q[:, :, at], k[:, :, at], v[:, :, at]
        c = g[:, :, at, None].cumsum(-2)
        kept = (c - c.mT).tril().exp().tril()
        if beta is not None:
            rate = beta[:, :, at, None]
            system = (rate * keys) @ keys.mT * kept
            missing = rate * (written - (keys * c.exp()) @ state)
            written = torch.linalg.solve_triangular(system, missing, upper=False, unitriangular=True)
        outs.append((queries @ keys.mT * kept) @ written + (queries * c.exp()) @ state)
        total = c[:, :, -1:]
        state = total.exp() * state + (keys * (total - c).exp()).mT @ written
    return torch.cat(outs, dim=2)


def _inputs(kind: str, heads: int, tokens: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """q, k of length 1, v `(1, heads, tokens, width)` and the rates."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, heads, tokens, *shape, generator=draw)

    q, k = (F.normalize(normal(width), dim=-1) for _ in range(2))
    tensors = {"q": q, "k": k, "v": normal(width)}
    for rate in KINDS[kind]:
        if rate == "beta":
            tensors["beta"] = normal().sigmoid()
        else:
            tensors["log_decay"] = 0.1 * F.logsigmoid(normal(*([width] if rate == "channel_decay" else [])))
    return {name: x.to(device).requires_grad_() for name, x in tensors.items()}


def _trained(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """Output and gradients of one training call, flat."""
    out = program(**inputs)
    gradients = torch.autograd.grad(out.sum(), list(inputs.values()))
    return torch.cat([x.flatten() for x in (out, *gradients)])


def _inferred(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return program(**inputs)


def _case(name: str, kind: str, run: Callable[..., Tensor], peer: Program, target: float) -> Case:
    def build(device: torch.device) -> Job:
        inputs = _inputs(kind, 8, 1024, 64, device)

        def ours() -> Tensor:
            return run(_in_chunks, inputs)

        def theirs() -> Tensor:
            return run(peer, inputs)

        return Job(name, ours, theirs, ours, theirs)

    return Case(name, build, target)


def _growth(kind: str) -> Growth:
    def build(tokens: int, device: torch.device) -> Call:
        inputs = _inputs(kind, 2, tokens, 32, device)
        return lambda: _trained(_in_chunks, inputs)

    return Growth(f"scan: {kind}", build)


_STEPS = [
    _case(f"{kind}: chunks against steps, N = 1,024", kind, _inferred, _by_steps, 5.0) for kind in KINDS
]
_PLAIN: list[Any] = [
    _case(
        f"{kind}: chunks at once against one by one, {what}, N = 1,024", kind, run, _chunk_by_chunk, 1 / 1.2
    )
    for kind, rates in KINDS.items()
    if "channel_decay" not in rates
    for what, run in (("forward", _inferred), ("training", _trained))
]

SUITE = Suite(cases=(*_STEPS, *_PLAIN), growth=tuple(_growth(kind) for kind in KINDS))
