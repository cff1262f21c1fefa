"""Rotary positions: both pairings, partial width."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.attention import AttentionError, plane_rotary, rotary, rotary_tables


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_pair_turns_by_position_times_frequency(interleaved: bool) -> None:
    """As complex numbers: `x_i exp(1j * position * theta^(-2i / width))`."""
    x = torch.randn(2, 3, 5, 8)
    positions = torch.tensor([0, 1, 4, 9, 100])
    out = rotary(x, *rotary_tables(positions, 8, theta=100.0), interleaved=interleaved)
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + 4) for i in range(4)]
    for i, (a, b) in enumerate(pairs):
        turn = torch.polar(torch.ones(5).double(), positions.double() * 100.0 ** (-2 * i / 8))
        expected = torch.complex(x[..., a], x[..., b]) * turn
        torch.testing.assert_close(
            torch.complex(out[..., a], out[..., b]).to(expected), expected, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        at_i, at_j = (rotary_tables(torch.tensor([p]), 8) for p in (i, j))
        return (
            (rotary(q, *at_i, interleaved=interleaved) * rotary(k, *at_j, interleaved=interleaved))
            .sum()
            .item()
        )

    assert math.isclose(score(3, 10), score(53, 60), abs_tol=1e-4)
    assert not math.isclose(score(3, 10), score(3, 11), abs_tol=1e-4)


def test_partial_rotary_leaves_the_other_channels() -> None:
    x = torch.randn(1, 2, 4, 10)
    cos, sin = rotary_tables(torch.arange(4), 6)
    out = rotary(x, cos, sin)
    assert torch.equal(out[..., 6:], x[..., 6:])
    torch.testing.assert_close(out[..., :6], rotary(x[..., :6], cos, sin))


def test_positions_may_differ_by_batch_entry_and_half_precision_stays() -> None:
    x = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    cos, sin = rotary_tables(positions[:, None], 8)
    out = rotary(x, cos, sin)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out[1:], rotary(x[1:], *rotary_tables(positions[1], 8)))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("must be even and positive, not 5", lambda: rotary_tables(torch.arange(3), 5)),
        (
            "turn 8 channels, but a head has 6",
            lambda: rotary(torch.zeros(1, 1, 3, 6), *rotary_tables(torch.arange(3), 8)),
        ),
        (
            "hold 4 positions, the tokens are 3",
            lambda: rotary(torch.zeros(1, 1, 3, 8), *rotary_tables(torch.arange(4), 8)),
        ),
        ("differ in shape", lambda: rotary(torch.zeros(1, 1, 3, 8), torch.zeros(3, 4), torch.zeros(3, 3))),
    ],
)
def test_bad_input_is_named(message: str, call) -> None:
    with pytest.raises(AttentionError, match=message):
        call()


def test_rotation_in_a_plane_is_the_exponential_of_its_generator() -> None:
    x = torch.randn(2, 3, 5, 6, dtype=torch.double)
    a, b = torch.randn(2, 3, 1, 6, dtype=torch.double)
    positions = torch.tensor([0, 1, 4, 9, 100])
    generator = a.mT @ b - b.mT @ a  # (H, D, D)
    turns = torch.linalg.matrix_exp(0.3 * positions[:, None, None].double() * generator[:, None])
    expected = torch.einsum("hnij,bhnj->bhni", turns, x)
    torch.testing.assert_close(plane_rotary(x, positions, a, b, frequency=0.3), expected)


def test_rotary_turns_in_planes_of_coordinates() -> None:
    x, positions, axes = torch.randn(2, 3, 5, 6), torch.tensor([0, 1, 4, 9, 30]), torch.eye(6)
    turned = x
    for i in range(3):
        frequency = 100.0 ** (-2 * i / 6)
        turned = plane_rotary(turned, positions, axes[i + 3], axes[i], frequency=frequency)
    expected = rotary(x, *rotary_tables(positions, 6, theta=100.0))
    torch.testing.assert_close(turned, expected, atol=1e-5, rtol=1e-5)


def test_scores_in_a_plane_depend_on_the_distance_alone() -> None:
    q, k, a, b = torch.randn(4, 1, 1, 1, 6, dtype=torch.double)
    plane = (a[0, 0, 0], b[0, 0, 0])

    def score(i: int, j: int) -> torch.Tensor:
        at_i, at_j = torch.tensor([i]), torch.tensor([j])
        return (plane_rotary(q, at_i, *plane) * plane_rotary(k, at_j, *plane)).sum()

    torch.testing.assert_close(score(3, 10), score(53, 60))


def test_parallel_vectors_turn_nothing_and_have_finite_gradients() -> None:
    x, a = torch.randn(1, 1, 3, 4), torch.ones(4, requires_grad=True)
    out = plane_rotary(x, torch.arange(3), a, 2 * a)
    torch.testing.assert_close(out, x)
    (grad,) = torch.autograd.grad(out.sum(), a)
    assert grad.isfinite().all()
    with pytest.raises(AttentionError, match="head width 4"):
        plane_rotary(x, torch.arange(3), torch.ones(5), torch.ones(5))
