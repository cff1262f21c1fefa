"""The fused log-sum-exp: gradients that the kernel itself does not know, and memory layouts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.attention import Causal, Padding, attend, backend

B, H, HK, N, D = 2, 4, 2, 70, 6


def qkv(values: int = D, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((H, D), (HK, D), (HK, values))
    return [torch.randn(B, heads, N, width, dtype=dtype, requires_grad=True) for heads, width in shapes]


def results(name: str, loss: Callable[[Tensor, Tensor], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    with backend(name):
        out, lse = attend(*inputs, pattern=Causal(), return_lse=True)
    return [out, lse, *torch.autograd.grad(loss(out, lse), inputs, materialize_grads=True)]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "both": lambda out, lse: out.square().sum() + lse.sin().sum(),
    "out": lambda out, lse: out.square().sum(),
    "lse": lambda out, lse: lse.sin().sum(),
    "some_rows_of_each": lambda out, lse: out[:, :, ::3].sum() + lse[:, :, ::2].sum(),
    "small_out": lambda out, lse: 1e-12 * out.square().sum() + lse.sin().sum(),
    "vanishing_out": lambda out, lse: 1e-25 * out.square().sum() + lse.sin().sum(),
    "channels_first": lambda out, lse: out.transpose(-1, -2).contiguous().sin().sum() + lse.sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("values", [1, D, 9])
def test_gradients_of_any_loss_equal_reference(loss: str, values: int) -> None:
    inputs = qkv(values)
    for ours, theirs in zip(
        results("sdpa", LOSSES[loss], inputs), results("reference", LOSSES[loss], inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_tiny_gradients_keep_their_digits() -> None:
    """Scaling the loss scales the gradients, down to far below what training meets."""
    inputs = qkv()
    whole = results("sdpa", LOSSES["both"], inputs)[2:]
    small = results("sdpa", lambda out, lse: 1e-14 * LOSSES["both"](out, lse), inputs)[2:]
    for ours, scaled in zip(whole, small, strict=True):
        torch.testing.assert_close(1e14 * scaled, ours, atol=1e-5, rtol=1e-4)


def test_no_gradient_is_no_gradient() -> None:
    for grad in results("sdpa", lambda out, lse: 0.0 * (out.sum() + lse.sum()), qkv())[2:]:
        assert not grad.any()


@pytest.mark.parametrize("moved", range(3))
def test_any_memory_layout_is_read_right(moved: int) -> None:
    inputs = qkv()
    expected = attend(*inputs, return_lse=True)
    inputs[moved] = inputs[moved].transpose(-1, -2).contiguous().transpose(-1, -2)
    for ours, theirs in zip(attend(*inputs, return_lse=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_that_see_nothing_stay_silent() -> None:
    inputs = qkv()
    seen = Padding(torch.tensor([[True] * N, [False] * N]))
    out, lse = attend(*inputs, pattern=seen, return_lse=True)
    assert not out[1].any()
    assert (lse[1] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[0].sum(), inputs)
    assert all(grad[0].any() and not grad[1].any() for grad in grads)


def test_second_derivatives_are_refused() -> None:
    inputs = qkv()
    out, lse = attend(*inputs, return_lse=True)
    (grad,) = torch.autograd.grad(out.sum() + lse.sum(), inputs[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"deriv|require grad"):
        torch.autograd.grad(grad.sum(), inputs[1])


@pytest.mark.parametrize("pattern", [None, Causal(), Padding(torch.arange(N).expand(B, N) < 40)])
def test_gradcheck(pattern) -> None:
    def program(*x: Tensor) -> tuple[Tensor, Tensor]:
        return attend(*x, pattern=pattern, return_lse=True)

    assert torch.autograd.gradcheck(program, qkv(9, torch.float64), fast_mode=True)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (N, N), (H, 1, N), (B, 1, 1, N), (1, H, N, N)], ids=str)
def test_a_bias_of_any_broadcastable_shape(shape: tuple[int, ...]) -> None:
    q, k, v = torch.randn(3, B, H, N, D)
    bias = torch.randn(shape)
    found = attend(q, k, v, bias=bias, return_lse=True)
    with backend("reference"):
        torch.testing.assert_close(found, attend(q, k, v, bias=bias, return_lse=True))


def test_where_kernels_are_to_be_differentiated_twice_the_log_sum_exp_is_not_fused() -> None:
    q, k, v = (torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def lse(*inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(*inputs, return_lse=True)[1]

    assert torch.autograd.gradgradcheck(lse, (q, k, v))
