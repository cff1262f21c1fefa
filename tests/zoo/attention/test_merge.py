"""Merged branches and sinks are the softmax over all that they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError, Causal, Padding, attend
from zoo.attention.merge import merge, sink

B, H, HK, N, D = 2, 4, 2, 9, 6


def qkv(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, heads, N, D, dtype=dtype, requires_grad=True) for heads in (H, HK, HK)]


def branches(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    ranges = zip([0, *cuts], [*cuts, N], strict=True)
    return [attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True) for a, b in ranges]


@pytest.mark.parametrize("cuts", [[], [4], [1, 2, 7]], ids=str)
def test_merged_parts_equal_the_whole_with_gradients(cuts: list[int]) -> None:
    inputs = qkv()
    results = []
    for out, lse in (merge(*branches(*inputs, cuts)), attend(*inputs, return_lse=True)):
        grads = torch.autograd.grad((out * out.detach().cos()).sum() + lse.sin().sum(), inputs)
        results.append((out, lse, *grads))
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-5)


def test_merge_ignores_parts_that_see_nothing() -> None:
    q, k, v = qkv()
    nothing = attend(q, k, v, pattern=Padding(torch.zeros(1, N, dtype=torch.bool)), return_lse=True)
    whole = attend(q, k, v, return_lse=True)
    out, lse = merge(nothing, whole, nothing)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])
    out, lse = merge(nothing, nothing)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_sink_is_one_more_key_without_a_value() -> None:
    q, k, v = qkv()
    logit = torch.randn(H, requires_grad=True)
    cotangent = torch.randn(B, H, N, D)
    ours = sink(*attend(q, k, v, pattern=Causal(), return_lse=True), logit[:, None])
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * D**-0.5
    scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
    column = logit[None, :, None, None].expand(B, H, N, 1)
    weights = torch.cat([scores, column], dim=-1).softmax(-1)
    theirs = weights[..., :-1] @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad((ours * cotangent).sum(), (q, k, v, logit)),
        torch.autograd.grad((theirs * cotangent).sum(), (q, k, v, logit)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_sink_of_minus_infinity_is_plain_softmax() -> None:
    q, k, v = qkv()
    seen = Padding(torch.tensor([[True] * N, [False] * N]))
    out, lse = attend(q, k, v, pattern=seen, return_lse=True)
    logit = torch.full((H, 1), -torch.inf, requires_grad=True)
    found = sink(out, lse, logit)
    torch.testing.assert_close(found, out)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (q, k, v, logit)))


def test_gradcheck() -> None:
    def program(q: Tensor, k: Tensor, v: Tensor, logit: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = merge(*branches(q, k, v, [3]))
        return sink(out, lse, logit), lse

    logit = torch.randn(H, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(program, (*qkv(torch.float64), logit), fast_mode=True)


def test_half_precision_stays_close() -> None:
    q, k, v = (x.detach() for x in qkv())
    exact = merge(*branches(q, k, v, [4]))[0]
    half = merge(*branches(*(x.bfloat16() for x in (q, k, v)), [4]))[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.03, rtol=0.03)


def test_parts_of_different_shape_are_named() -> None:
    q, k, v = qkv()
    out, lse = attend(q, k, v, return_lse=True)
    with pytest.raises(AttentionError, match="nothing to merge"):
        merge()
    with pytest.raises(AttentionError, match="one shape"):
        merge((out, lse), (out[:1], lse[:1]))
    with pytest.raises(AttentionError, match="one shape"):
        merge((out, lse[..., None]))
