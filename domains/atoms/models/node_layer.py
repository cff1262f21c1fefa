"""Any layer of the zoo among the atoms of a structure, in the place of AllScAIP's own attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.attention import AttentionError, Groups
from zoo.attention.layers import AttentionLayer, check_supports, create_attention

Attention = str | Mapping[str, Any]
"""The name of a layer (`zoo list attention`), or a mapping with its name and arguments."""


def node_layer(attention: Attention, width: int, num_heads: int) -> AttentionLayer:
    """A layer whose energies do not depend on the order of atoms, nor on what shares their batch.

    Raises:
        UnknownName: no layer of that name.
        AttentionError: an argument that the layer does not have, or a layer that cannot stand there.
    """
    layer = create_attention(attention, width, causal=False, num_heads=num_heads)
    check_supports(layer, "padding", "any_length", reason="structures of a batch have any numbers of atoms")
    check_supports(layer, "batch_invariant", reason="an energy does not depend on what shares a batch")
    return layer


def check_order(attention: Attention, width: int, num_heads: int) -> None:
    """Raises `AttentionError` where the tokens of a layer are not a set: tried out on a layer of its own."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        torch.default_generator.manual_seed(0)
        layer = node_layer(attention, width, num_heads).double().eval()
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=max(1, parameter.shape[-1] if parameter.ndim else 1) ** -0.5)
        x, order = torch.randn(1, 9, width, dtype=torch.float64), torch.randperm(9)
        there, back = layer(x)[:, order], layer(x[:, order])
    if not torch.allclose(there, back, rtol=1e-6, atol=1e-8):
        raise AttentionError(
            f"attention={attention!r}: {type(layer).__name__} depends on the order of its tokens, and atoms "
            "have none. These do not: multihead, gated, sinks, linear, moh, head_tokens, routing."
        )


def among_groups(layer: AttentionLayer, x: Tensor, groups: Groups) -> Tensor:
    """A layer on the tokens `(N, C)` of each group: padded within a bucket of groups of similar size."""
    parts = []
    for bucket in groups.plan:
        rows = x.index_select(0, bucket.queries.clamp(min=0).flatten()).unflatten(0, bucket.queries.shape)
        out = layer(rows, mask=bucket.queries >= 0 if bucket.ragged else None)
        parts.append(out[:, None])
    return groups.join(parts, 1, len(x))[0, 0]
