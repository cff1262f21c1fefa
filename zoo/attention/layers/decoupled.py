"""Heads of keys and heads of values, fewer than heads of queries, each shared in its own way."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.attention.errors import AttentionError
from zoo.attention.heads import expand, shared_map
from zoo.attention.layers.base import Inputs
from zoo.attention.layers.multihead import MultiHead


class DecoupledHeads(MultiHead, name="dha"):
    """DHA (Chen et al. 2024): `o_h = softmax(q_h K_{a(h)}^T / sqrt(D)) V_{b(h)}` with two maps a and b.

    The cache holds D (HkK + HkV) numbers per token. Equal maps are grouped-query attention.

    Args:
        dim: width of the tokens.
        num_heads: H.
        key_heads, value_heads: HkK and HkV, divisors of H; or the map, which one each of the H query heads
            reads, from 0 on; by default H.
        options: of `MultiHead`, without `num_kv_heads`.
    """

    paper = "https://arxiv.org/abs/2406.06567"
    key_map: Tensor
    value_map: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        key_heads: int | Sequence[int] | None = None,
        value_heads: int | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        if "num_kv_heads" in options:
            raise AttentionError("dha has key_heads and value_heads in place of num_kv_heads")
        super().__init__(dim, num_heads, **options)
        for kind, heads in (("key", key_heads), ("value", value_heads)):
            head_map = _head_map(kind, num_heads, heads)
            self.register_buffer(f"{kind}_map", head_map, persistent=False)
            linear = self.get_submodule(f"{kind[0]}_proj")
            assert isinstance(linear, nn.Linear)
            width = (int(head_map.max()) + 1) * self.head_dim
            self.set_submodule(
                f"{kind[0]}_proj", nn.Linear(linear.in_features, width, bias=linear.bias is not None)
            )

    def mix(self, given: Inputs) -> Tensor:
        out = super().mix(given)
        if self.training:
            fused = [m for m in (self.k_proj, self.v_proj) if isinstance(m, FusedProjection)]
            self.aux_loss = torch.stack([m.distance() for m in fused]).sum() if fused else None
        return out

    def read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().read(q, expand(k, self.key_map), expand(v, self.value_map), mask)


def _head_map(kind: str, num_heads: int, heads: int | Sequence[int] | None) -> Tensor:
    """The map `(H,)` that an option of `DecoupledHeads` stands for."""
    if heads is None or isinstance(heads, int):
        return shared_map(num_heads, num_heads if heads is None else heads)
    found = torch.tensor(list(heads))
    if len(found) != num_heads or set(found.tolist()) != set(range(int(found.max()) + 1)):
        raise AttentionError(
            f"a map of {kind} heads names one for each of {num_heads} query heads, and all of 0, 1, ..., "
            f"not {tuple(heads)}"
        )
    return found


class FusedProjection(nn.Module):
    """Heads under fusion (Chen et al. 2024, DHA): `W_g = sum_i w_i W_i` over the heads i of group g.

    The W_i are those of a pretrained projection; the w_i are learned, from 1 / size on.

    Args:
        linear: the projection to H heads.
        head_map: group of each head, `(H,)`.
        penalty: factor of the distance.
    """

    head_map: Tensor

    def __init__(self, linear: nn.Linear, head_map: Tensor, penalty: float) -> None:
        super().__init__()
        heads = len(head_map)
        self.weight = nn.Parameter(linear.weight.detach().unflatten(0, (heads, -1)).clone())
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().unflatten(0, (heads, -1)).clone())
        sizes = head_map.bincount()
        self.shares = nn.Parameter(1 / sizes[head_map].to(linear.weight))
        self.groups, self.penalty = len(sizes), penalty
        self.register_buffer("head_map", head_map.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, C)` to `(B, N, G D)`."""
        bias = None if self.bias is None else self._fused(self.bias).flatten()
        return F.linear(x, self._fused(self.weight).flatten(0, 1), bias)

    def _fused(self, parts: Tensor) -> Tensor:
        """`(H, D, ...)` to `(G, D, ...)`."""
        weighted = parts * self.shares.view(-1, *[1] * (parts.ndim - 1))
        empty = parts.new_zeros(self.groups, *parts.shape[1:])
        return empty.index_add(0, self.head_map, weighted.to(parts.dtype))

    def distance(self) -> Tensor:
        """How far the heads are from their group's, in squares over the squares of all, times the penalty.

        Smaller weights are no closer.
        """
        rest = self.weight - self._fused(self.weight)[self.head_map]
        return self.penalty * rest.square().sum() / self.weight.square().sum()

    @torch.no_grad()
    def linear(self) -> nn.Linear:
        """The projection to the fused heads alone."""
        weight = self._fused(self.weight).flatten(0, 1)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None).to(weight)
        linear.weight.copy_(weight)
        if self.bias is not None:
            linear.bias.copy_(self._fused(self.bias).flatten())
        return linear


def fuse_heads(
    layer: MultiHead,
    key_heads: int | Sequence[int],
    value_heads: int | Sequence[int],
    *,
    penalty: float = 1.0,
) -> DecoupledHeads:
    """The layer with fewer heads of keys and values, each a learned sum of pretrained ones.

    While it trains, its `aux_loss` is the penalty that pulls the heads of a group together; `settled` makes
    plain projections of it afterwards. At the start all heads of a group count alike, as in `gqa_from_mha`.

    Args:
        layer: multi-head attention, with as many heads of keys and values as of queries.
        key_heads, value_heads: of `DecoupledHeads`.
        penalty: the multiplier of the distance between the heads and their group's, to be raised in training.
    """
    if type(layer) is not MultiHead or layer.num_kv_heads != layer.num_heads:
        raise AttentionError(
            "heads are fused from a MultiHead with num_kv_heads = num_heads, not from a "
            f"{type(layer).__name__} with {layer.num_kv_heads} for {layer.num_heads}"
        )
    options = layer.options()
    del options["num_kv_heads"]
    fused = DecoupledHeads(layer.dim, key_heads=key_heads, value_heads=value_heads, **options)
    for name in ("q_proj", "o_proj", "q_norm", "k_norm"):
        fused.set_submodule(name, copy.deepcopy(layer.get_submodule(name)))
    fused.set_submodule("k_proj", FusedProjection(layer.k_proj, fused.key_map, penalty))
    fused.set_submodule("v_proj", FusedProjection(layer.v_proj, fused.value_map, penalty))
    return fused.to(layer.q_proj.weight.device).train(layer.training)


def settled(layer: DecoupledHeads) -> DecoupledHeads:
    """A copy of a layer after fusion, with the fused heads as plain projections: the same function."""
    plain = copy.deepcopy(layer)
    for name in ("k_proj", "v_proj"):
        projection = plain.get_submodule(name)
        if isinstance(projection, FusedProjection):
            plain.set_submodule(name, projection.linear())
    return plain
