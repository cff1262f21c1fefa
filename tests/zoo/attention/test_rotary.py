"""Rotary positions: both pairings, partial width."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.attention import AttentionError, rotary, rotary_tables


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
