"""Titans: the memory against its definition in loops, and its variants beside attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.attention import AttentionError, scan
from zoo.attention.layers import create_attention
from zoo.attention.layers.base import AttentionLayer
from zoo.attention.layers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, NeuralMemory
from zoo.bench.memory import peak_memory

DIM, TOKENS = 6, 15


def memory(**options: Any) -> NeuralMemory:
    torch.manual_seed(0)
    given: dict[str, Any] = {"chunk_size": 2}
    layer = NeuralMemory(DIM, **given | options).double()
    nn.init.normal_(layer.memory_model_parameters[0], std=0.5)  # gamma starts at zero
    return layer


def tokens(length: int = TOKENS, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, DIM, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def by_definition(layer: NeuralMemory, x: Tensor, batch_size: int | None = None) -> Tensor:
    """One row, head, chunk and token at a time; the gradient of each chunk by automatic differentiation."""
    width = layer.to_keys.weight.shape[0] // layer.num_heads
    rows = []
    for row in x:
        stored, asked = layer.store_norm(row), layer.retrieve_norm(row)
        heads = []
        for head in range(layer.num_heads):
            own = slice(head * width, (head + 1) * width)
            k, v, q = (
                f(y)[:, own]
                for f, y in ((layer.to_keys, stored), (layer.to_values, stored), (layer.to_queries, asked))
            )
            rate = layer.to_adaptive_step(stored)[:, head].sigmoid() * layer.max_lr
            weights = [w[head] for w in layer.memory_model_parameters]
            anchor, momentum = weights, [torch.zeros_like(w) for w in weights]
            outs = []
            for t in range(len(row)):
                if (t + 1) % layer.chunk_size == 0:
                    begin = t + 1 - layer.chunk_size
                    if batch_size is not None and begin % batch_size == 0:
                        anchor = weights
                    loss = torch.zeros((), dtype=x.dtype)
                    for s in range(begin, t + 1):
                        loss = loss + rate[s] * (layer.net(anchor, k[s : s + 1]) - v[s]).square().mean()
                    grads = torch.autograd.grad(loss, anchor, retain_graph=True)
                    mean = stored[begin : t + 1].mean(0)
                    decay = layer.to_decay_factor(mean)[head].sigmoid()
                    carry = 0.0 if layer.to_momentum is None else layer.to_momentum(mean)[head].sigmoid()
                    momentum = [carry * s - g for s, g in zip(momentum, grads, strict=True)]
                    weights = [(1 - decay) * w + s for w, s in zip(weights, momentum, strict=True)]
                out = layer.net(weights, q[t : t + 1])
                if layer.retrieve_gate is not None:
                    out = out * layer.retrieve_gate(asked[t])[head].sigmoid()
                outs.append(out)
            heads.append(torch.cat(outs))
        rows.append(layer.combine_heads(torch.cat(heads, dim=-1)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 1, "norm_residual": False},
        {"depth": 1},
        {"depth": 3, "expansion": 1.5, "norm_residual": False, "max_lr": 0.3},
        {"momentum": False, "chunk_size": 1},
        {"num_heads": 2, "chunk_size": 4},
        {"num_heads": 3, "head_dim": 4, "batch_size": 4},
        {"batch_size": 2},
        {"batch_size": 6, "momentum": False},
        {"chunk_size": 16},
    ],
    ids=str,
)
def test_is_its_definition(options: dict[str, Any]) -> None:
    layer, x = memory(**options), tokens()
    expected = by_definition(layer, x, options.get("batch_size"))
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=1e-10)


def test_more_chunks_than_are_worked_on_together() -> None:
    layer, x = memory(chunk_size=1, batch_size=40), tokens(90, 1)
    torch.testing.assert_close(layer(x), by_definition(layer, x, 40), atol=1e-10, rtol=1e-10)


def test_linear_memory_that_starts_empty_and_keeps_everything_is_linear_attention() -> None:
    layer, x = memory(depth=1, norm_residual=False, momentum=False, chunk_size=1), tokens()
    nn.init.zeros_(layer.memory_model_parameters[0])
    nn.init.constant_(layer.get_parameter("to_decay_factor.0.bias"), -100.0)
    stored, asked = layer.store_norm(x), layer.retrieve_norm(x)
    q, k, v = layer.to_queries(asked), layer.to_keys(stored), layer.to_values(stored)
    written = v * layer.to_adaptive_step(stored).sigmoid() * 2 / DIM
    expected, _ = scan(q[:, None], k[:, None], written[:, None], scale=1.0)
    torch.testing.assert_close(layer(x), expected[:, 0], atol=1e-10, rtol=1e-10)


def test_momentum_that_forgets_at_once_is_none() -> None:
    layer, plain, x = memory(), memory(momentum=False), tokens()
    nn.init.constant_(layer.get_parameter("to_momentum.0.bias"), -100.0)
    plain.load_state_dict({name: w for name, w in layer.state_dict().items() if "momentum" not in name})
    torch.testing.assert_close(layer(x), plain(x), atol=1e-10, rtol=1e-10)


def test_a_sequence_shorter_than_a_chunk_reads_what_was_trained() -> None:
    layer, x = memory(chunk_size=16), tokens()
    weights = [w[0] for w in layer.memory_model_parameters]
    torch.testing.assert_close(layer(x), layer.net(weights, layer.to_queries(layer.retrieve_norm(x))))


def test_gradients_go_through_what_the_memory_learned() -> None:
    """Of the input, and of the parameters, which change the updates: second derivatives of the memory."""
    layer, x = memory(batch_size=4), tokens(7, 1).requires_grad_()
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


def test_it_learns_the_sequence_it_reads() -> None:
    """A linear map that no weight was trained for: the error falls from chunk to chunk, without training."""
    torch.manual_seed(0)
    layer = NeuralMemory(
        8, chunk_size=16, batch_size=16, depth=1, norm_residual=False, momentum=False, max_lr=0.25
    )
    nn.init.zeros_(layer.memory_model_parameters[0])
    nn.init.constant_(layer.get_parameter("to_decay_factor.0.bias"), -100.0)
    for linear in (layer.to_queries, layer.to_keys):
        nn.init.eye_(linear.weight)
    with torch.no_grad():
        x = torch.randn(1, 160, 8)
        error = (
            (layer(x) - layer.to_values(layer.store_norm(x)))
            .square()
            .mean((0, 2))
            .unflatten(0, (10, 16))
            .mean(1)
        )
    assert error[-1] < 0.01 * error[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_runs_without_gradients(mode: Callable[[], Any]) -> None:
    layer, x = memory(), tokens()
    with mode():
        quiet = layer(x)
    torch.testing.assert_close(quiet, layer(x))


@pytest.mark.parametrize("sizes", [[15], [1] * 15, [4, 1, 1, 9], [3, 7, 5]], ids=str)
@pytest.mark.parametrize("batch_size", [None, 8])
def test_parts_of_any_length_equal_the_whole(sizes: list[int], batch_size: int | None) -> None:
    layer, x = memory(chunk_size=4, batch_size=batch_size), tokens()
    cache = layer.init_cache(2)
    parts = [layer.step(part, cache) for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), atol=1e-10, rtol=1e-10)


def variants() -> dict[str, AttentionLayer]:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "memory": {"chunk_size": 3},
        "persistent": 2,
        "attention": {"rope_theta": 10.0},
    }
    return {
        "mac": MemoryAsContext(DIM, 3, segment=4, **options).double(),
        "mag": MemoryAsGate(DIM, 3, window=4, **options).double(),
        "mal": MemoryAsLayer(DIM, 3, window=4, **options).double(),
    }


@pytest.mark.parametrize("name", ["mac", "mag", "mal"])
def test_variants_in_parts_of_any_length_equal_the_whole(name: str) -> None:
    layer, x = variants()[name], tokens()
    cache = layer.init_cache(2)
    parts = [layer.step(part, cache) for part in x.split([5, 1, 1, 6, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["memory", "mac", "mag", "mal"])
def test_cache_does_not_grow(name: str) -> None:
    layer = memory() if name == "memory" else variants()[name]
    cache: Any = layer.init_cache(1)
    sizes = []
    for token in tokens(36, 1).split(1, dim=1):
        layer.step(token, cache)
        sizes.append(cache.nbytes())
    assert sizes[23] == sizes[35]  # 12 tokens: whole chunks and segments


@pytest.mark.parametrize("name", ["memory", "mac", "mag", "mal"])
def test_padding_anywhere_changes_nothing(name: str) -> None:
    layer, x = memory() if name == "memory" else variants()[name], tokens()
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, :3] = mask[1, 4:7] = mask[1, 11] = False
    out = layer(x, mask=mask)
    for row in range(2):
        torch.testing.assert_close(out[row][mask[row]], layer(x[row][mask[row]][None])[0])


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def test_context_variant_is_its_definition() -> None:
    torch.manual_seed(0)
    layer = MemoryAsContext(DIM, 1, segment=4, persistent=3, memory={"chunk_size": 3}).double()
    x, mac = tokens(11, 1), layer.attention
    state, outs = layer.memory.initial(x), []
    for part in x.split(4, dim=1):
        answers, attended = layer.memory.recall(part, state.weights), []
        for i in range(part.shape[1]):
            context = torch.cat([layer.persistent.tokens[None], answers[:, : i + 1], part[:, : i + 1]], dim=1)
            attended.append(
                mac.o_proj(softmax(mac.q_proj(part[:, i : i + 1]), mac.k_proj(context), mac.v_proj(context)))
            )
        y = torch.cat(attended, dim=1)
        learned, state = layer.memory.run(y, state)
        outs.append(layer.gate.attention_norm(y) * layer.gate.memory_norm(learned).sigmoid())
    torch.testing.assert_close(layer(x), torch.cat(outs, dim=1), atol=1e-10, rtol=1e-10)


def test_gate_and_series_are_made_of_memory_and_window() -> None:
    x, layers = tokens(), variants()
    gate, series = layers["mag"], layers["mal"]
    assert isinstance(gate, MemoryAsGate)
    assert isinstance(series, MemoryAsLayer)
    norms = gate.gate
    expected = norms.attention_norm(gate.attention(x)) * norms.memory_norm(gate.memory(x)).sigmoid()
    torch.testing.assert_close(gate(x), expected)
    torch.testing.assert_close(series(x), series.attention(series.memory(x)))


def test_every_query_of_the_window_sees_the_persistent_tokens() -> None:
    torch.manual_seed(0)
    layer = MemoryAsLayer(DIM, 1, window=4, persistent=3).double().attention
    x = tokens(9, 1)
    for i in range(9):
        seen = torch.cat([layer.persistent.tokens[None], x[:, max(0, i - 3) : i + 1]], dim=1)
        expected = layer.o_proj(
            softmax(layer.q_proj(x[:, i : i + 1]), layer.k_proj(seen), layer.v_proj(seen))
        )
        torch.testing.assert_close(layer(x)[:, i : i + 1], expected, atol=1e-10, rtol=1e-10)


def test_without_persistent_tokens_the_window_is_local_attention() -> None:
    torch.manual_seed(0)
    layer = MemoryAsLayer(DIM, 2, window=4, persistent=0).double().attention
    local = create_attention("local", DIM, num_heads=2, window=4, causal=True).double()
    local.load_state_dict({name: w for name, w in layer.state_dict().items() if "persistent" not in name})
    torch.testing.assert_close(layer(tokens()), local(tokens()))


def test_dropout_of_the_attention_acts_in_training_only() -> None:
    layer, x = MemoryAsGate(DIM, 2, attention={"dropout": 0.5}).double(), tokens()
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))


def test_memory_is_linear_in_the_tokens() -> None:
    layer, x = NeuralMemory(16, chunk_size=128), torch.randn(1, 2**12, 16)
    with torch.no_grad():
        assert peak_memory(lambda: layer(x), x.device) < 24 * 2**20  # all pairs: 64 MiB
    mac = MemoryAsContext(16, 1, segment=512, memory={"chunk_size": 128})
    with torch.no_grad():
        assert peak_memory(lambda: mac(x), x.device) < 24 * 2**20


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: memory(chunk_size=0), "at least one token"),
        (lambda: memory(batch_size=5), "multiple"),
        (lambda: memory(depth=0), "at least one matrix"),
        (lambda: memory(num_heads=4), "not divisible by 4"),
        (lambda: MemoryAsContext(DIM, 2, segment=0), "segment has at least one"),
        (lambda: MemoryAsGate(DIM, 2, persistent=-1), "not negative"),
        (lambda: MemoryAsGate(DIM, 2, memory={"chunks": 2}), "chunk_size"),
        (lambda: MemoryAsContext(DIM, 2, attention={"rope": 2}), "no argument 'rope'"),
        (lambda: MemoryAsContext(DIM, 2, attention={"causal": False}), "causal"),
        (lambda: MemoryAsGate(DIM, 2, attention={"causal": False}), "causal"),
        (lambda: _masked_step(memory()), "rows of one length"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(AttentionError, match=message):
        call()


def _masked_step(layer: NeuralMemory) -> Tensor:
    return layer(tokens(), mask=torch.ones(2, TOKENS, dtype=torch.bool), cache=layer.init_cache(2))
