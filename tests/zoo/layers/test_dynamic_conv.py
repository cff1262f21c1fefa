"""Dynamic depth-wise convolution: the fast form is the definition, forward and backward, at any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zoo.bench.memory import peak_memory
from zoo.errors import ConfigError
from zoo.layers import dynamic_conv as module
from zoo.layers.dynamic_conv import dynamic_conv, predicted_conv, reference

SIZES = [(9, 11), (1, 1), (1, 7), (6, 1), (2, 13)]


def inputs(
    size: tuple[int, int],
    batch: int = 2,
    kernel: tuple[int, int] = (3, 3),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    z = torch.randn(batch, 6, *size, dtype=dtype, requires_grad=True)
    return z, torch.randn(batch, 2, *kernel, *size, dtype=dtype, requires_grad=True)


def predictor(
    size: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, features, weight and bias for 2 groups of 3 x 3 filters from 4 features."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    return leaf(2, 6, *size), leaf(2, 4, *size), leaf(18, 4), leaf(18)


def by_definition(z: Tensor, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    filters = nn.functional.conv2d(features, weight[:, :, None, None], bias)
    return reference(z, filters.unflatten(1, (2, 3, 3)))


@pytest.fixture(params=[1, 20, 10**6], ids=["rows", "bands", "whole"])
def _band(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BAND", request.param)


def close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def test_definition_in_words() -> None:
    """Pixel (0, 0) of channel 4, of the second group of three, sees zeros beyond the border."""
    z, filters = inputs((4, 5))
    expected = sum(filters[1, 1, 1 + i, 1 + j, 0, 0] * z[1, 4, i, j] for i in range(2) for j in range(2))
    close(reference(z, filters)[1, 4, 0, 0], expected)


@pytest.mark.usefixtures("_band")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", [(7, 7), (1, 1), (3, 5), (5, 1)])
def test_equals_the_definition_with_its_gradients(size: tuple[int, int], kernel: tuple[int, int]) -> None:
    z, filters = inputs(size, kernel=kernel)
    actual, expected = dynamic_conv(z, filters), reference(z, filters)
    close(actual, expected)
    upstream = torch.randn_like(expected)
    close(
        torch.autograd.grad(actual, (z, filters), upstream),
        torch.autograd.grad(expected, (z, filters), upstream),
    )


@pytest.mark.usefixtures("_band")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_predicted_filters_equal_those_of_a_convolution(size: tuple[int, int], with_bias: bool) -> None:
    z, features, weight, bias = predictor(size)
    given = (z, features, weight, bias if with_bias else None)
    actual, expected = predicted_conv(*given, groups=2), by_definition(*given)
    close(actual, expected)
    leaves = [t for t in given if t is not None]
    upstream = torch.randn_like(expected)
    close(torch.autograd.grad(actual, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.usefixtures("_band")
def test_gradients_by_finite_differences() -> None:
    assert torch.autograd.gradcheck(dynamic_conv, inputs((2, 3)), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda *given: predicted_conv(*given, groups=2), predictor((2, 3)), fast_mode=True
    )


def test_layout_in_memory_does_not_matter() -> None:
    z, features, weight, bias = (t.detach() for t in predictor((5, 7)))
    expected = predicted_conv(z, features, weight, bias, 2)
    last = torch.channels_last
    moved = predicted_conv(z.to(memory_format=last), features.to(memory_format=last), weight, bias, 2)
    assert torch.equal(moved, expected)
    assert moved.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_is_added_up_in_float32(dtype: torch.dtype) -> None:
    z, filters = (t.detach().to(dtype).requires_grad_() for t in inputs((8, 9), kernel=(7, 7)))
    out = dynamic_conv(z, filters)
    exact = reference(z.double(), filters.double())
    assert out.dtype == dtype
    close(out, exact.to(dtype), torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert (z.grad is not None and z.grad.dtype) == dtype
    assert (filters.grad is not None and filters.grad.dtype) == dtype


def test_compiles_whole_with_its_backward_pass() -> None:
    torch._dynamo.reset()
    z, features, weight, bias = given = predictor((5, 6), torch.float32)

    def program() -> Tensor:
        return predicted_conv(z, features, weight, bias, 2).sin()

    actual, expected = torch.compile(program, fullgraph=True, backend="aot_eager")(), program()
    close(actual, expected, 1e-6)
    close(torch.autograd.grad(actual.sum(), given), torch.autograd.grad(expected.sum(), given), 1e-5)


def test_custom_operators_keep_their_word() -> None:
    z, features, weight, bias = predictor((3, 4))
    joined = torch.cat([weight, bias[:, None]], 1).detach().requires_grad_()
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(module._apply, (z, features, joined, [3, 3], 2), test_utils=tests)


def test_filters_of_a_large_map_never_exist_all_at_once() -> None:
    z, features = torch.randn(1, 48, 200, 200), torch.randn(1, 12, 200, 200)
    weight, bias = torch.randn(49 * 8, 12), torch.randn(49 * 8)
    peak = peak_memory(lambda: predicted_conv(z, features, weight, bias, 8), torch.device("cpu"))
    filters = 4 * 49 * 8 * 200 * 200
    assert peak < 0.6 * filters
    z.requires_grad_()

    def step() -> None:
        predicted_conv(z, features, weight, bias, 8).sum().backward()

    assert peak_memory(step, torch.device("cpu")) < 1.5 * filters


def test_operations_are_counted() -> None:
    z, features, weight, bias = predictor((5, 7))
    with FlopCounterMode(display=False) as counter:
        predicted_conv(z, features, weight, bias, 2)
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * (6 * 9 + 18 * 4)


def test_what_does_not_fit_is_told() -> None:
    z, filters = inputs((4, 5))
    with pytest.raises(ConfigError, match=r"\(B, G, kh, kw, H, W\), not \(2, 2, 3, 3, 4\)"):
        dynamic_conv(z, filters[..., 0])
    with pytest.raises(ConfigError, match="differ in B, H or W"):
        dynamic_conv(z[:, :, :3], filters)
    with pytest.raises(ConfigError, match="6 channels cannot be shared out evenly to 4 groups"):
        dynamic_conv(z, filters.repeat(1, 2, 1, 1, 1, 1))
    with pytest.raises(ConfigError, match="odd, not 2 x 3"):
        dynamic_conv(z, filters[:, :, :2])
    with pytest.raises(ConfigError, match="does not give square filters of 2 groups from 4 features"):
        predicted_conv(z, z[:, :4], z.new_zeros(20, 4), None, 2)
