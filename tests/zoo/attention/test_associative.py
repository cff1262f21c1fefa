"""Gated associative memory: its definition, and what it cannot do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.attention import AttentionError
from zoo.attention.layers.associative import GatedAssociativeBlock, GatedAssociativeMemory
from zoo.bench.memory import peak_memory

DIM = 12


def memory(**options: int) -> GatedAssociativeMemory:
    torch.manual_seed(0)
    return GatedAssociativeMemory(DIM, **{"slots": 5} | options).double()


def tokens(length: int = 9) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("heads", [1, 3])
def test_is_its_definition_token_by_token(heads: int) -> None:
    layer, x = memory(num_heads=heads, kernel=4), tokens()
    bank, width = layer.memory_bank, DIM // heads
    expected = torch.zeros_like(x)
    for b, i in torch.cartesian_prod(torch.arange(2), torch.arange(x.shape[1])).tolist():
        local = layer.get_parameter("causal_conv.bias")
        for back in range(min(4, i + 1)):
            local = local + layer.causal_conv.weight[:, 0, 3 - back] * x[b, i - back]
        parts = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            parts.append((bank[:, own] @ x[b, i, own]).softmax(0) @ bank[:, own])
        near, far = layer.gate(x[b, i]).sigmoid().chunk(2)
        expected[b, i] = near * local + far * torch.cat(parts)
    torch.testing.assert_close(layer(x), expected, atol=1e-12, rtol=1e-12)


def test_no_token_reaches_beyond_the_convolution() -> None:
    """Why it cannot recall: the slots hold nothing of the sequence."""
    layer, x = memory(kernel=3), tokens()
    changed = x.clone()
    changed[:, 2] += 1
    moved = (layer(changed) - layer(x)).abs().amax((0, 2)) > 0
    assert moved.tolist() == [2 <= i < 5 for i in range(9)]


def test_block_is_the_memory_and_a_feed_forward_net_on_a_residual_stream() -> None:
    torch.manual_seed(0)
    block, x = GatedAssociativeBlock(DIM, slots=5).double(), tokens()
    mixing = memory()
    mixing.load_state_dict(
        {name: tensor for name, tensor in block.state_dict().items() if name in mixing.state_dict()}
    )
    between = x + mixing(block.ln1(x))
    torch.testing.assert_close(block(x), between + block.ffn(block.ln2(between)))


def test_gradients_in_double_precision() -> None:
    assert torch.autograd.gradcheck(memory(), (tokens(4).requires_grad_(),), fast_mode=True)


def test_padding_before_the_tokens_changes_nothing() -> None:
    layer, x = memory(), tokens()
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    torch.testing.assert_close(layer(x, mask=mask)[1, 4:], layer(x[1:, 4:])[0])


def test_cache_holds_the_reach_of_the_convolution_and_no_more() -> None:
    layer, x = memory(kernel=4), tokens()
    cache = layer.init_cache(2)
    for token in x.split(1, dim=1):
        layer.step(token, cache)
        assert cache.nbytes() == 2 * 3 * DIM * 8


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = GatedAssociativeMemory(16, slots=32), torch.randn(1, 2**12, 16)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 24 * 2**20  # all pairs: 64 MiB


@pytest.mark.parametrize(
    ("options", "message"), [({"slots": 0}, "one slot"), ({"kernel": 0}, "positive kernel")]
)
def test_mistakes_are_explained(options: dict[str, int], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        memory(**options)
