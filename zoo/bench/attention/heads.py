"""Log-sum-exp, sinks, forget gates and attention over depth against their formulas with explicit weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.attention.attend import attend
from zoo.attention.layers.depth import attention_residual
from zoo.attention.layers.forgetting import Before, forgetting, stick_breaking
from zoo.attention.merge import merge, sink
from zoo.attention.patterns import Causal, Window
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call

Outputs = tuple[Tensor, ...]
Program = Callable[..., Outputs]
Inputs = Callable[[int, torch.device], list[Tensor]]


def _lse(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return attend(q, k, v, pattern=Causal(), return_lse=True)


def _explicit_lse(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    scores = _scores(q, k, k.shape[2])
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _sinks(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Outputs:
    return (sink(*attend(q, k, v, pattern=Causal(), return_lse=True), logit),)


def _explicit_sinks(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Outputs:
    return (_with_column(_scores(q, k, k.shape[2]), logit) @ v,)


def _window_sinks(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Outputs:
    return (sink(*attend(q, k, v, pattern=Window(128, causal=True), return_lse=True), logit),)


def _explicit_window_sinks(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> Outputs:
    return (_with_column(_scores(q, k, 128), logit) @ v,)


def _forgetting(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Outputs:
    return forgetting(q, k, v, F.logsigmoid(gates))


def _explicit_forgetting(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Outputs:
    total = F.logsigmoid(gates).cumsum(-1)
    scores = _scores(q, k, k.shape[2]) + total[..., None] - total[..., None, :]
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _stick_breaking(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    return (attend(q, k, v, pattern=Before(), kernel=stick_breaking),)


def _merged(q: Tensor, k: Tensor, v: Tensor) -> Outputs:
    parts = zip(k.chunk(4, dim=2), v.chunk(4, dim=2), strict=True)
    return merge(*(attend(q, keys, values, return_lse=True) for keys, values in parts))


def _depth(query: Tensor, norm: Tensor, *sources: Tensor) -> Outputs:
    return attention_residual(sources, query, norm)


def _stacked_depth(query: Tensor, norm: Tensor, *sources: Tensor) -> Outputs:
    stacked = torch.stack(sources)
    weights = (F.rms_norm(stacked, query.shape, norm, 1e-6) @ query).softmax(0)
    return (weights[..., None] * stacked).sum(0), weights


def _scores(q: Tensor, k: Tensor, window: int) -> Tensor:
    i = torch.arange(k.shape[2], device=k.device)
    behind = i[:, None] - i
    return (q @ k.mT * q.shape[-1] ** -0.5).masked_fill((behind < 0) | (behind >= window), -torch.inf)


def _with_column(scores: Tensor, logit: Tensor) -> Tensor:
    """Weights beside one more score per row, whose weight is dropped."""
    column = logit[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]


def _heads(heads: int, width: int, *further: Callable[[int], tuple[int, ...]]) -> Inputs:
    """q, k, v `(1, heads, N, width)`, and tensors of further shapes."""
    shapes = [lambda n: (1, heads, n, width)] * 3 + list(further)
    return lambda n, device: _random([shape(n) for shape in shapes], device)


def _sources(width: int) -> Inputs:
    """A query, a norm, and 24 sources `(1, N, width)`."""
    return lambda n, device: _random([(width,), (width,), *[(1, n, width)] * 24], device)


def _random(shapes: list[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]


def _trained(program: Program, inputs: list[Tensor]) -> Tensor:
    """Outputs and gradients of one training call, flat."""
    outputs = program(*inputs)
    grads = torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
    return torch.cat([x.flatten() for x in (*outputs, *grads)])


def _case(name: str, program: Program, peer: Program, inputs: Inputs) -> Case:
    def build(device: torch.device) -> Job:
        given = inputs(1024, device)

        def ours() -> Tensor:
            return _trained(program, given)

        def theirs() -> Tensor:
            return _trained(peer, given)

        return Job(name, ours, theirs, ours, theirs)

    return Case(name, build)


def _growth(name: str, program: Program, inputs: Inputs, **sizes: tuple[int, ...]) -> Growth:
    def build(n: int, device: torch.device) -> Call:
        given = inputs(n, device)
        return lambda: _trained(program, given)

    return Growth(name, build, **sizes)


_QKV = _heads(8, 64)
_QKV_LOGIT = _heads(8, 64, lambda n: (8, 1))
_QKV_GATES = _heads(8, 64, lambda n: (1, 8, n))

SUITE = Suite(
    cases=(
        _case("causal softmax with log-sum-exp, N = 1,024", _lse, _explicit_lse, _QKV),
        _case("causal softmax with sinks, N = 1,024", _sinks, _explicit_sinks, _QKV_LOGIT),
        _case(
            "causal window of 128 with sinks, N = 1,024", _window_sinks, _explicit_window_sinks, _QKV_LOGIT
        ),
        _case("forgetting attention, N = 1,024", _forgetting, _explicit_forgetting, _QKV_GATES),
        _case("attention residual of 24 sources, N = 1,024", _depth, _stacked_depth, _sources(256)),
    ),
    growth=(
        _growth("causal softmax with log-sum-exp", _lse, _heads(1, 32)),
        _growth("causal window of 128 with sinks", _window_sinks, _heads(2, 32, lambda n: (2, 1))),
        _growth("merge of four parts", _merged, _heads(1, 32)),
        _growth("forgetting attention", _forgetting, _heads(1, 32, lambda n: (1, 1, n))),
        _growth("stick-breaking attention", _stick_breaking, _heads(1, 32), sizes=(256, 512, 1024, 2048)),
        _growth("attention residual of 24 sources", _depth, _sources(64)),
    ),
)
