"""Attention over depth: what it reduces to, its schedule, and its messages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError
from zoo.attention.layers.depth import AttentionResidual, AttentionResiduals, attention_residual

C = 6


def sources(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(count)
    return [torch.randn(2, 5, C, dtype=dtype) for _ in range(count)]


def stack(sublayers: int, block_size: int) -> AttentionResiduals:
    torch.manual_seed(1)
    model = AttentionResiduals(C, [nn.Linear(C, C) for _ in range(sublayers)], block_size=block_size)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7)
    return model


def test_one_source_is_read_as_it_is() -> None:
    (source,) = sources(1)
    out, weights = attention_residual([source], torch.randn(C), torch.randn(C))
    torch.testing.assert_close(out, source)
    assert (weights == 1).all()


def test_a_new_reader_takes_the_mean() -> None:
    given = sources(4)
    torch.testing.assert_close(AttentionResidual(C)(given), torch.stack(given).mean(0))


def test_the_order_of_sources_does_not_matter() -> None:
    given, query, norm = sources(4), torch.randn(C), torch.randn(C)
    out, weights = attention_residual(given, query, norm)
    back, reversed_weights = attention_residual(given[::-1], query, norm)
    torch.testing.assert_close(back, out)
    torch.testing.assert_close(reversed_weights.flip(0), weights)


def test_equals_the_formula() -> None:
    given, query, norm = sources(3), torch.randn(C), torch.randn(C)
    out, weights = attention_residual(given, query, norm, scale=0.3, eps=1e-5)
    r = torch.stack(given)
    keys = r * (r.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
    expected = (0.3 * keys @ query).softmax(0)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected[..., None] * r).sum(0))


@pytest.mark.parametrize(
    ("block_size", "read"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 2, 2, 3, 3, 4]), (6, [1, 2, 2, 2, 2, 2])]
)
def test_what_each_sublayer_reads(block_size: int, read: list[int]) -> None:
    """All committed sources, and the sum that grows, which the first sub-layer of a block has not."""
    model, counts = stack(6, block_size), []
    for reader in model.readers:
        reader.register_forward_pre_hook(lambda _module, args: counts.append(len(args[0])))
    model(sources(1)[0])
    assert counts == read


def test_the_sources_of_a_block_add_up() -> None:
    """Embedding, the sums of two blocks, and the half third one."""
    model, last = stack(5, 2), []
    written: list[Tensor] = []
    for sublayer in model.sublayers:
        sublayer.register_forward_hook(lambda _module, _args, out: written.append(out))
    model.last.register_forward_pre_hook(lambda _module, args: last.extend(args[0]))
    (x,) = sources(1)
    model(x)
    expected = [x, written[0] + written[1], written[2] + written[3], written[4]]
    for ours, theirs in zip(last, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck() -> None:
    vectors = [torch.randn(C, dtype=torch.float64) for _ in range(2)]
    given = [*vectors, *sources(3, torch.float64)]

    def program(query: Tensor, norm: Tensor, *r: Tensor) -> tuple[Tensor, Tensor]:
        return attention_residual(r, query, norm)

    assert torch.autograd.gradcheck(program, [x.requires_grad_() for x in given], fast_mode=True)


def test_half_precision_stays_close() -> None:
    given, query, norm = sources(3), torch.randn(C), torch.randn(C)
    exact, _ = attention_residual(given, query, norm)
    half, weights = attention_residual([x.bfloat16() for x in given], query, norm)
    assert (half.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0.05)


def test_compiles_without_breaks() -> None:
    model, (x,) = stack(4, 2), sources(1)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(AttentionError, match="no source"):
        attention_residual([], torch.zeros(C), torch.ones(C))
    with pytest.raises(AttentionError, match="one shape"):
        attention_residual([torch.zeros(2, C), torch.zeros(3, C)], torch.zeros(C), torch.ones(C))
    with pytest.raises(AttentionError, match="at least one sub-layer"):
        AttentionResiduals(C, [nn.Identity()], block_size=0)
