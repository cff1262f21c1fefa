"""Windows, groups and neighbourhoods against a dense mask: one training call, forward and backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from zoo.attention.attend import attend
from zoo.attention.neighbourhood import Neighbourhood, ShiftedWindows
from zoo.attention.packed import Groups
from zoo.attention.patterns import Pattern, Window
from zoo.bench.compare import Job
from zoo.bench.suite import Case, Growth, Suite
from zoo.bench.timing import Call

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Masked = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Made = Callable[[int, torch.device], Pattern]


def _window(n: int, device: torch.device) -> Pattern:
    return Window(128, causal=True)


def _neighbourhood(n: int, device: torch.device) -> Pattern:
    return Neighbourhood((n // 32, 32), 7, device=device)


def _windows(n: int, device: torch.device) -> Pattern:
    return ShiftedWindows((n // 32, 32), 8, shift=4, device=device)


def _documents(n: int, device: torch.device) -> Pattern:
    """Groups of 8, 16, .., 64 tokens, over and over."""
    lengths = torch.arange(8, 72, 8, device=device).repeat(-(-n // 288))
    return Groups(torch.arange(len(lengths), device=device).repeat_interleave(lengths)[:n])


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _eager_flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        n, device = mask.shape[-1], mask.device
        blocks = create_block_mask(lambda b, h, i, j: mask[0, 0, i, j], None, None, n, n, device)
        return cast(Tensor, flex_attention(q, k, v, block_mask=blocks))


def _tensors(n: int, heads: int, width: int, device: torch.device) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, n, width, generator=g).to(device).requires_grad_() for _ in range(3)]


def _ours(made: Made, n: int, device: torch.device) -> Attention:
    """The pattern is made at each call, as a layer does."""
    return lambda q, k, v: attend(q, k, v, pattern=made(n, device))


def _trained(attention: Attention, inputs: list[Tensor]) -> Tensor:
    """Output and gradients of one training call, flat."""
    out = attention(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return torch.cat([x.flatten() for x in (out, *grads)])


def _inferred(attention: Attention, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return attention(*(x.detach() for x in inputs))


def _case(
    name: str,
    made: Made,
    peer: Masked,
    target: float | None = None,
    run: Callable[[Attention, list[Tensor]], Tensor] = _trained,
) -> Case:
    """8 heads of width 64 on 1,024 tokens; the peer's mask is made once and not timed."""

    def build(device: torch.device) -> Job:
        inputs = _tensors(1024, 8, 64, device)
        mask = made(1024, device).mask(1, 1024, 1024, device)
        assert mask is not None

        def ours() -> Tensor:
            return run(_ours(made, 1024, device), inputs)

        def theirs() -> Tensor:
            return run(lambda q, k, v: peer(q, k, v, mask), inputs)

        return Job(name, ours, theirs, ours, theirs)

    return Case(name, build, target)


def _growth(name: str, made: Made, sizes: tuple[int, ...] = (1024, 2048, 4096, 8192)) -> Growth:
    def build(n: int, device: torch.device) -> Call:
        inputs = _tensors(n, 2, 32, device)
        return lambda: _trained(_ours(made, n, device), inputs)

    return Growth(name, build, sizes)


SUITE = Suite(
    cases=(
        _case("causal window of 128, N = 1,024, dense-mask softmax", _window, _softmax, target=3.0),
        _case("causal window of 128, N = 1,024, SDPA with a mask", _window, _sdpa),
        _case("2-D neighbourhood 32 x 32, kernel 7, dense-mask softmax", _neighbourhood, _softmax, 5.0),
        _case("2-D neighbourhood 32 x 32, kernel 7, SDPA with a mask", _neighbourhood, _sdpa),
        _case(
            "2-D neighbourhood 32 x 32, kernel 7, forward, eager flex_attention (NATTEN on a CPU)",
            _neighbourhood,
            _eager_flex,
            5.0,
            _inferred,
        ),
        _case("shifted windows of 8 x 8 on 32 x 32, dense-mask softmax", _windows, _softmax),
        _case("documents of 8 to 64 tokens, N = 1,024, dense-mask softmax", _documents, _softmax),
    ),
    growth=(
        _growth("causal window of 128", _window, (1024, 2048, 4096, 8192, 16384)),
        _growth("2-D neighbourhood, kernel 7", _neighbourhood),
        _growth("shifted windows of 8 x 8", _windows),
        _growth("documents of 8 to 64 tokens", _documents),
    ),
)
