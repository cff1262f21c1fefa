"""Group position encoding: two counters, and a source that does not see the target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from zoo.attention import (
    AttentionError,
    Causal,
    SourceAndTarget,
    attend,
    backend,
    rotary,
    rotary_tables,
    stream_positions,
)

ARRIVAL = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1], dtype=torch.bool)


def test_each_kind_counts_its_own_tokens() -> None:
    both = torch.stack([ARRIVAL, ~ARRIVAL])
    expected = torch.tensor([[0, 1, 5, 2, 6, 7, 3, 8], [5, 6, 0, 7, 1, 2, 8, 3]])
    torch.testing.assert_close(stream_positions(both, offset=5), expected)
    torch.testing.assert_close(stream_positions(ARRIVAL, offset=5), expected[0])


@pytest.mark.parametrize("name", ["reference", "blocked", "sdpa"])
@pytest.mark.parametrize("queries", [8, 3])
def test_pattern_is_its_definition(name: str, queries: int) -> None:
    kinds = torch.stack([ARRIVAL, ~ARRIVAL])
    q, k, v = torch.randn(2, 2, queries, 4), torch.randn(2, 2, 8, 4), torch.randn(2, 2, 8, 4)
    mask = torch.zeros(2, 1, queries, 8, dtype=torch.bool)
    for b in range(2):
        for i in range(queries):
            own = i + 8 - queries
            for j in range(own + 1):
                mask[b, 0, i, j] = bool(kinds[b, own]) or not bool(kinds[b, j])
    with backend(name):
        out = attend(q, k, v, pattern=Causal() & SourceAndTarget(kinds))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected)


def test_the_source_is_what_it_is_alone_and_the_target_as_if_all_had_come_before() -> None:
    """Of a stream; the last target token has seen the whole source."""
    q, k, v = torch.randn(3, 1, 2, 8, 4, dtype=torch.double)

    def run(order: torch.Tensor) -> torch.Tensor:
        tables = rotary_tables(stream_positions(ARRIVAL)[order], 4)
        rows = [x[:, :, order] for x in (q, k, v)]
        pattern = Causal() & SourceAndTarget(ARRIVAL[order])
        return attend(rotary(rows[0], *tables), rotary(rows[1], *tables), rows[2], pattern=pattern)

    streamed = run(torch.arange(8))
    source = (~ARRIVAL).nonzero()[:, 0]
    torch.testing.assert_close(streamed[:, :, source], run(source))
    at_once = run(torch.cat([source, ARRIVAL.nonzero()[:, 0]]))
    torch.testing.assert_close(streamed[:, :, -1], at_once[:, :, -1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stream_positions(torch.zeros(3)), "True = target"),
        (lambda: SourceAndTarget(torch.zeros(3, dtype=torch.long)), "True = target"),
        (lambda: attend(*torch.randn(3, 1, 1, 5, 2), pattern=SourceAndTarget(ARRIVAL)), "do not fit"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        call()
